#!/usr/bin/env bash
# A run on a TPU VM slice, one host or many, with gcloud.
#
#   launch/tpu_vm.sh create --name NAME --zone ZONE --type v5litepod-16 [--version V] [--spot] [--queued] [--project P]
#   launch/tpu_vm.sh setup  --name NAME --zone ZONE             copies this checkout to every host and installs .[tpu]
#   launch/tpu_vm.sh run    --name NAME --zone ZONE --workdir DIR -- CONFIG [key=value ...]
#   launch/tpu_vm.sh logs | status | stop | delete --name NAME --zone ZONE [--workdir DIR]
#
# run: the same folder goes on where it stopped; babysit.sh brings it back after a preemption. Of a slice of several
# hosts, --workdir is a folder that all of them see (Filestore, say). stop: SIGTERM, all hosts save at the same step.
# --dry-run prints the commands of any of them. delete asks for nothing and takes the slice; never the folder.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -gt 0 ] || usage
action=$1
shift
name='' zone='' type='' version='' workdir='' project=() spot=() queued=''
while [ $# -gt 0 ]; do
  valued "$@"
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --name) name=$2; shift ;;
    --zone) zone=$2; shift ;;
    --type) type=$2; shift ;;
    --version) version=$2; shift ;;
    --project) project=("--project=$2"); shift ;;
    --workdir) workdir=$2; shift ;;
    --spot) spot=(--spot) ;;
    --queued) queued=1 ;;
    --) shift; break ;;
    -h | --help) usage 0 ;;
    *) fail "$1 is no option of $action" ;;
  esac
  shift
done
need --name "$name" "what the slice is called"
need --zone "$zone" "for example us-west4-a"
tpu=(gcloud compute tpus tpu-vm)
at=("--zone=$zone" "${project[@]}")
everywhere() { do_ "${tpu[@]}" ssh "$name" "${at[@]}" --worker=all "--command=$1"; }
first() { do_ "${tpu[@]}" ssh "$name" "${at[@]}" --worker=0 "--command=$1"; }

runtime() {  # the image of a generation
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

case $action in
  create)
    need --type "$type" "for example v5litepod-16, v5p-128, v6e-8"
    version=${version:-$(runtime "$type")}
    if [ -n "$queued" ]; then
      do_ gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${at[@]}" "--accelerator-type=$type" \
        "--runtime-version=$version" "${spot[@]}"
    else
      do_ "${tpu[@]}" create "$name" "${at[@]}" "--accelerator-type=$type" "--version=$version" "${spot[@]}"
    fi
    ;;
  setup)
    archive=$(mktemp -u "${TMPDIR:-/tmp}/recursive_jax-XXXXXX.tar.gz")
    [ -n "$DRY_RUN" ] && archive=recursive_jax.tar.gz
    do_ git archive --format=tar.gz "--output=$archive" HEAD
    do_ "${tpu[@]}" scp "$archive" "$name:recursive_jax.tar.gz" "${at[@]}" --worker=all
    everywhere "mkdir -p recursive_jax && tar -xzf recursive_jax.tar.gz -C recursive_jax && python3 -m venv venv && venv/bin/pip install -q -c recursive_jax/constraints.txt -e 'recursive_jax[tpu]' && venv/bin/recursive-jax doctor"
    [ -n "$DRY_RUN" ] || rm -f "$archive"
    ;;
  run)
    need --workdir "$workdir" "the run's folder, on a disk that every host sees"
    [ $# -gt 0 ] || fail "a config is wanted behind --"
    words=$(quoted "$@" --workdir "$workdir")
    everywhere "cd recursive_jax && . launch/tpu_env.sh && nohup launch/babysit.sh --log ~/babysit.log -- ../venv/bin/recursive-jax run ${words% } > ~/run.log 2>&1 < /dev/null & sleep 1"
    ;;
  logs) everywhere "tail -n 20 ~/run.log ~/babysit.log" ;;
  status)
    need --workdir "$workdir" "the run's folder"
    do_ "${tpu[@]}" describe "$name" "${at[@]}" "--format=value(state)"
    words=$(quoted "$workdir")
    first "cd recursive_jax && ../venv/bin/recursive-jax status ${words% }"
    ;;
  stop) everywhere "pkill -TERM -f '[b]abysit.sh' || true" ;;
  delete)
    if [ -n "$queued" ]; then
      do_ gcloud compute tpus queued-resources delete "$name" "${at[@]}" --force --quiet
    else
      do_ "${tpu[@]}" delete "$name" "${at[@]}" --quiet
    fi
    ;;
  *) fail "$action: create, setup, run, logs, status, stop or delete is wanted" ;;
esac
