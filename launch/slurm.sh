#!/usr/bin/env bash
# One run on a SLURM cluster: one process per node, which uses all of the node's GPUs.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh --config=configs/imagenet_ipc10.py
#   DRY_RUN=1 launch/slurm.sh --config=...        print the srun command, start nothing
#
# Nodes, GPUs, partition and time are options of sbatch, everything else is the run's own. The
# processes find one another through SLURM. Two minutes before the time is over, and when the job
# is preempted, every process saves; the job is queued again and continues.
#
# PYTHON is the interpreter (default: python). The workdir, the data and JAX_COMPILATION_CACHE_DIR
# must be on a file system that all nodes see; see launch/README.md.
#SBATCH --job-name=prism_jax
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=prism_jax-%j.log
set -euo pipefail

if (($# == 0)); then
  echo "error: no --config=FILE was given: sbatch [options] $0 --config=FILE ..." >&2
  exit 2
fi

# Where JAX finds no GPU it takes the processor, for as long as the job may last: say so instead.
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
fi

# srun does not take --cpus-per-task over from the job.
command=(srun "--cpus-per-task=${SLURM_CPUS_PER_TASK:-16}" --kill-on-bad-exit=0 --label
  "${PYTHON:-python}" -m prism_jax.main "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# srun gives the highest status of all. 143: all were asked to stop and have saved; where one failed,
# no other ends with a higher one than its own.
status=0
"${command[@]}" || status=$?
if ((status == 143)) && [[ -n ${SLURM_JOB_ID:-} ]]; then
  echo "stopped with everything saved; queueing the job again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
