#!/usr/bin/env bash
# Everything that is asked of a device when one is at hand, in at most eight minutes:
#
#     benchmarks/on_device.sh [OUT]        # default: benchmarks/results/on_device
#
# A smoke of all five stages, the bits of runs made again, what products are rounded to, our timings
# beside the estimates of benchmarks/targets.py, and, where PyTorch is there and time is left, the
# commands of docs/performance.md. What is not timed runs at once, and compiles what is timed then,
# with the device to itself; on a TPU, which is one process' at a time, one after the other. Each
# writes OUT* when it is done, so that a device that is taken away leaves what there is.
# Environment: PYTHON (default: .venv's, else python3), LIMIT in seconds (480), CUT=1 (everything
# small; without a device too, to see that it runs).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

out=${1:-benchmarks/results/on_device}
limit=${LIMIT:-480}
python=${PYTHON:-.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TF_CPP_MIN_LOG_LEVEL=2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$out")"
: >"$out.log"

say() { echo "$*" | tee -a "$out.log"; }

# step NAME SECONDS COMMAND...: at most so long, and never beyond the limit
step() {
  local name=$1 most=$2 left=$((limit - SECONDS)) began=$SECONDS status
  shift 2
  most=$((most * patience))
  ((left < most)) && most=$left
  if ((most < 10)); then
    say "$name: not measured, no time is left"
    return
  fi
  timeout --kill-after=5 "$most" "$@" >"$work/$name.log" 2>&1
  status=$?
  tail -n 40 "$work/$name.log" >>"$out.log"
  if ((status == 0)); then
    say "$name: done in $((SECONDS - began)) s"
  elif ((status >= 124)); then
    say "$name: not measured, ended after $((SECONDS - began)) s (status $status)"
  else
    say "$name: FAILED with status $status: $(tail -n 1 "$work/$name.log")"
  fi
}

platform=$("$python" -c 'import jax; print(jax.devices()[0].platform)' 2>"$work/log")
if [[ -z $platform ]]; then
  say "JAX does not start: $(tail -n 1 "$work/log")"
  exit 2
fi
if [[ $platform == cpu && -z ${CUT:-} ]]; then
  say "not measured: no GPU or TPU is here. CUT=1 runs everything small on the CPU."
  exit 0
fi
say "$("$python" -c 'import jax; print(jax.device_count(), jax.devices()[0].device_kind)')"

patience=1  # where everything is small the machine may be, too
[[ -n ${CUT:-} ]] && patience=4
device=gpu shape=100x224 seconds=2 rounds=3 iterations=1000 networks=resnet18,mobilenet_v2
[[ $platform == cpu ]] && device=cpu
[[ -n ${CUT:-} ]] && shape=4x32 seconds=0.2 rounds=1 iterations=400 networks=resnet20

# The digits, every stage cut short.
short=(
  --config.squeeze.epochs=1 --config.relabel.epochs=2 --config.validate.epochs=2
  --config.validate.eval_every=2 --config.validate.students=convnet --config.squeeze.least_top1=0
  "--config.validate.controls=random_real"
)
# together COMMAND...: beside what comes next, where a device takes several processes
together() {
  if [[ $platform == tpu ]]; then "$@"; else "$@" & fi
}

# Several processes on one device: none may take its memory in advance.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
together step smoke 170 "$python" -m prism_jax.main --config="configs/digits_${CUT:+sre2l_}ipc10.py" \
  --workdir="$work/smoke" "${short[@]}" --config.recover.iterations=20
together step bits 170 "$python" benchmarks/bits.py --modes=on --workdir="$work/bits" --out="${out}_bits" \
  -- --config=configs/digits_sre2l_ipc10.py "${short[@]}" \
  "--config.recover.iterations=$iterations"
together step precision 170 "$python" benchmarks/precision.py --architectures="$networks" --size=64 \
  --as-it-is --out="${out}_precision"
[[ $platform == tpu ]] || step programs 170 "$python" benchmarks/on_device.py --prepare \
  --out="$out" --shape="$shape" --limit=$((165 * patience)) &
wait
unset XLA_PYTHON_CLIENT_PREALLOCATE
step timings 235 "$python" benchmarks/on_device.py --out="$out" --shape="$shape" \
  --seconds="$seconds" --limit=$((225 * patience))
if [[ -e $out.md ]]; then tee -a "$out.log" <"$out.md"; fi

if ! "$python" -c 'import torch, torchvision' 2>/dev/null; then
  say "PyTorch is not here: no comparison with it"
  exit
fi
options=(--device="$device" --rounds="$rounds" --seconds="$seconds" --shapes="$shape")
step recover 150 "$python" benchmarks/recover.py "${options[@]}" --out="${out}_recover"
step relabel 90 "$python" benchmarks/relabel.py "${options[@]}" --out="${out}_relabel"
step validate 90 "$python" benchmarks/validate.py "${options[@]}" --out="${out}_validate"
step not_deterministic 90 "$python" benchmarks/recover.py "${options[@]}" \
  --deterministic=off --pools=resnet18 --out="${out}_not_deterministic"
