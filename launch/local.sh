#!/usr/bin/env bash
# Several processes of one run on this machine, joined over the loopback interface.
#
#   launch/local.sh -n 2 --config=configs/digits_ipc10.py
#   launch/local.sh -n 4 -g --config=configs/imagenet_ipc10.py      one process per GPU, the first
#                                                  four, or those of CUDA_VISIBLE_DEVICES
#   DRY_RUN=1 launch/local.sh -n 2 --config=...                     print, start nothing
#
# One process with all devices needs no script: python -m prism_jax.main ...
# Everything after the options goes to the command unchanged. Where one process ends badly, the
# others save and stop; the same command continues.
set -euo pipefail

processes=2 gpus=""
while (($# > 0)); do
  case "$1" in
    -n) processes=${2:-}; shift 2 || shift ;;
    -g) gpus=yes; shift ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) break ;;
  esac
done
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "error: -n $processes; it must be a positive number" >&2
  exit 2
fi
if (($# == 0)); then
  echo "error: no --config=FILE was given; see $0 -h" >&2
  exit 2
fi

devices=()
if [[ -n $gpus ]]; then
  mapfile -t devices < <(seq 0 $((processes - 1)))
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"; fi
  if ((${#devices[@]} < processes)); then
    echo "error: -g -n $processes, and CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names" \
      "${#devices[@]}; lower -n" >&2
    exit 2
  fi
fi

python=${PYTHON:-python}
port=${PORT:-$((20000 + RANDOM % 20000))}
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

for ((i = 0; i < processes; i++)); do
  command=("$python" -m prism_jax.main "$@" "--coordinator=127.0.0.1:$port"
    "--processes=$processes" "--process=$i")
  [[ -n $gpus ]] && command=(env "CUDA_VISIBLE_DEVICES=${devices[i]}" "${command[@]}")
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

# The status of one that failed, if there is one; else of one that was asked to stop.
status=0
ended() {
  if (($1 != 0 && (status == 0 || status == 130 || status == 143))); then status=$1; fi
}
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  # A signal ends the first wait; the processes are still saving.
  while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
  ended "$code"
done
exit "$status"
