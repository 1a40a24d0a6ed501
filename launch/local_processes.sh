#!/usr/bin/env bash
# Several processes on one machine over loopback: what a multi-host job does, on a laptop.
#   launch/local_processes.sh 2 2 run configs/quickstart.yaml --workdir runs/two
# starts 2 processes with 2 CPU devices each. The exit code is the first one that is not 0 (75: start again to go on).
# --dry-run before the rest prints the commands.
set -uo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ "${1:-}" = --dry-run ] && { DRY_RUN=1; shift; }
[ $# -ge 3 ] || usage
[[ $1 =~ ^[0-9]+$ && $2 =~ ^[0-9]+$ ]] || fail "$1 processes of $2 devices: whole numbers are wanted"
processes=$1 devices=$2
shift 2
if [ -n "$DRY_RUN" ]; then
  for ((i = 0; i < processes; i++)); do
    do_ env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT \
      "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i" recursive-jax "$@"
  done
  exit 0
fi
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
pids=()
stopped=''
trap 'stopped=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i recursive-jax "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  status=$?
  [ -n "$stopped" ] && kill -0 "$pid" 2>/dev/null && { wait "$pid"; status=$?; }  # the signal cut the first wait short
  [ $code -eq 0 ] && code=$status
done
exit $code
