#!/usr/bin/env bash
# One run on all hosts of a TPU pod slice; a preempted slice is made again and the run continues.
#
#   TPU_NAME=prism TPU_ZONE=europe-west4-a TPU_TYPE=v5litepod-64 \
#     launch/tpu_pod.sh --config=configs/imagenet_ipc10.py --workdir=gs://bucket/runs/ipc10
#   DRY_RUN=1 ... launch/tpu_pod.sh --config=... --workdir=...     print the gcloud commands, start nothing
#
# TPU_NAME, TPU_ZONE       the slice (required)
# TPU_TYPE                 accelerator type; needed where the slice is to be made
# TPU_VERSION              runtime version (default: the one for TPU_TYPE)
# TPU_CREATE_FLAGS         more flags of `gcloud compute tpus tpu-vm create`, such as --spot
# RETRIES                  how often what ended badly is tried again (default: 20); waiting for a
#                          slice that the zone has no room for, or that is being made or repaired,
#                          does not count, nor does what was tried before a run that lasted an hour
#
# Deleted is only a slice that is PREEMPTED, TERMINATED, STOPPED or FAILED.
#
# The hosts get the last commit of this checkout, a Python for it (by uv: that of the runtime may be
# too old), and find one another by themselves. JAX_COMPILATION_CACHE_DIR and NPROC are theirs too.
set -euo pipefail

for name in TPU_NAME TPU_ZONE; do
  if [[ -z ${!name:-} ]]; then
    echo "error: $name is not set; see the head of $0" >&2
    exit 2
  fi
done
if (($# == 0)); then
  echo "error: no --config=FILE was given; see the head of $0" >&2
  exit 2
fi
if [[ " $* " != *" --workdir"* ]]; then
  echo "error: no --workdir was given; name a bucket (gs://...) or a folder that all hosts share" >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=(gcloud compute tpus tpu-vm)
where=("$TPU_NAME" "--zone=$TPU_ZONE")

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

runtime() {
  case ${TPU_TYPE:-} in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

everywhere() { run "${tpu[@]}" ssh "${where[@]}" --worker=all "--command=$1"; }

# The state of the slice in a word; NOT_FOUND where there is none. Fails where gcloud cannot say.
state() {
  if [[ -n ${DRY_RUN:-} ]]; then
    echo PREEMPTED
  elif ! "${tpu[@]}" describe "${where[@]}" --format='value(state)' 2>"$said"; then
    grep -q NOT_FOUND "$said" && echo NOT_FOUND
  fi
}

# A slice in place of one that is gone; status 3: the zone has no room for it.
create() {
  if [[ -z ${TPU_TYPE:-} ]]; then
    echo "error: there is no ready slice $TPU_NAME in $TPU_ZONE, and TPU_TYPE is not set" >&2
    exit 2
  fi
  # A preempted slice stays listed, and must go before another has its name.
  [[ $1 == NOT_FOUND ]] || run "${tpu[@]}" delete "${where[@]}" --quiet || true
  # What it says is shown and kept.
  # shellcheck disable=SC2086 # several flags in one variable
  { run "${tpu[@]}" create "${where[@]}" "--accelerator-type=$TPU_TYPE" \
    "--version=${TPU_VERSION:-$(runtime)}" ${TPU_CREATE_FLAGS:-} 2>&1 >&3 |
    tee "$said" >&2; } 3>&1 && return
  grep -q "no more capacity" "$said" || return 1
  echo "no room for $TPU_TYPE in $TPU_ZONE; asking again in a minute" >&2
  return 3
}

# Each step only after the one before: `set -e` is off where a function's status is asked for.
# Status 3: the slice is not there yet.
prepare() {
  local now
  : >"$said"
  if ! now=$(state); then
    echo "the state of $TPU_NAME is not known; nothing of it is changed:" >&2
    cat "$said" >&2
    return 1
  fi
  case $now in
    READY) ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED | NOT_FOUND) create "$now" || return $? ;;
    CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | STOPPING | DELETING)
      echo "$TPU_NAME is $now; looking again in a minute" >&2
      return 3
      ;;
    *)
      echo "$TPU_NAME is in the state '$now', which is not known; nothing of it is changed" >&2
      return 1
      ;;
  esac
  run git -C "$root" archive --prefix=prism_jax/ --output="$archive" HEAD &&
    run "${tpu[@]}" scp --worker=all "$archive" "$TPU_NAME:prism_jax.tar.gz" "--zone=$TPU_ZONE" &&
    everywhere "tar xzf prism_jax.tar.gz && cd prism_jax &&\
 python3 -m pip install --quiet --user uv &&\
 python3 -m uv venv --allow-existing --python 3.12 .venv &&\
 python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'"
}

archive=$(mktemp -d)/prism_jax.tar.gz
said=$(mktemp)  # by the last question about the slice, or attempt to make one
theirs=""
for name in JAX_COMPILATION_CACHE_DIR NPROC; do
  [[ -n ${!name:-} ]] && theirs+=" $name=$(printf '%q' "${!name}")"
done
# --distributed=on: nothing in the environment of a slice's host says that there are others.
command="cd prism_jax &&$theirs .venv/bin/python -m prism_jax.main --distributed=on"
command+=$(printf ' %q' "$@")
for ((attempt = 0; attempt <= ${RETRIES:-20}; attempt++)); do
  status=0
  ready=0
  prepare || ready=$?
  if ((ready == 0)); then
    began=$SECONDS
    everywhere "$command" || status=$?
    ((SECONDS - began < 3600)) || attempt=0
  elif ((ready == 3)); then
    attempt=$((attempt - 1))
    sleep 60
    continue
  else
    status=1
  fi
  # 0: done. 2: something given cannot be used; trying again would not help.
  if ((status == 0 || status == 2)); then
    exit "$status"
  fi
  echo "attempt $attempt ended with status $status; everything finished is kept" >&2
  sleep 30
done
exit "$status"
