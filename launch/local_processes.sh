#!/usr/bin/env bash
# Several processes on one machine over loopback: what a multi-host job does, on a laptop.
#   launch/local_processes.sh 2 2 run configs/quickstart.yaml --workdir runs/two
# starts 2 processes with 2 CPU devices each. The exit code is the first one that is not 0 (75: start again to go on).
set -uo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,4p' "$0" | cut -c3-
  exit 2
fi
processes=$1 devices=$2
shift 2
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i recursive-jax "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || { status=$?; [ $code -eq 0 ] && code=$status; }
done
exit $code
