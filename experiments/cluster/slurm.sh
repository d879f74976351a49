#!/bin/bash
# A run of several processes on SLURM, which resumes after preemption:
#
#   sbatch --nodes=2 --gpus-per-node=8 experiments/cluster/slurm.sh \
#     python -m experiments.xright.train --mesh=fsdp=16 --workdir=/shared/run
#
# One process per node, with all accelerators of the node. Submit it at the top
# of the repository; all nodes need to read the workdir. jax finds the processes
# by the variables of SLURM. Two minutes before the time limit, SLURM sends
# SIGTERM: the run saves, and ends with the status 75. The job is then queued
# again and resumes.
#SBATCH --job-name=bilevel_jax
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ $# -eq 0 ]; then
  echo "slurm.sh: give a command, such as python -m experiments.xright.train" >&2
  exit 2
fi
# A lost process ends all others after a while; the status is the largest one.
srun --kill-on-bad-exit=0 "$@" --distributed
status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
