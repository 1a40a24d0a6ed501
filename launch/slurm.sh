#!/usr/bin/env bash
# A run on SLURM: one process a node, its GPUs together; requeued after a preemption.
#
#   launch/slurm.sh [--dry-run] --nodes N --gpus G --time 24:00:00 [--partition P] [--account A] --workdir DIR
#                   -- CONFIG [key=value ...]
#
# SLURM sends SIGTERM two minutes before the time is up: all processes save at the same step and end with 75, and the
# job is put back into the queue (--requeue), as after a lost process; the same folder goes on. --workdir: on the shared file system.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -gt 0 ] || usage
nodes=1 gpus=1 time=01:00:00 workdir='' more=()
while [ $# -gt 0 ]; do
  valued "$@"
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --nodes) nodes=$2; shift ;;
    --gpus) gpus=$2; shift ;;
    --time) time=$2; shift ;;
    --partition | --account) more+=("$1=$2"); shift ;;
    --workdir) workdir=$2; shift ;;
    --) shift; break ;;
    -h | --help) usage 0 ;;
    *) fail "$1 is no option" ;;
  esac
  shift
done
need --workdir "$workdir" "the run's folder, on the shared file system"
[ $# -gt 0 ] || fail "a config is wanted behind --"
words=$(quoted recursive-jax run "$@" --workdir "$workdir")
script="srun --kill-on-bad-exit=1 ${words% }; code=\$?; case \$code in 75|134|137|143) scontrol requeue \$SLURM_JOB_ID;; esac; exit \$code"
do_ sbatch "--job-name=$(basename "$workdir")" "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus" \
  "--time=$time" "${more[@]}" --requeue --signal=TERM@120 --open-mode=append "--output=$workdir.log" "--wrap=$script"
