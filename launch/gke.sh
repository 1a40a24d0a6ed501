#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster, as a JobSet (or through xpk).
#
#   launch/gke.sh apply  --name NAME --image IMAGE --accelerator tpu-v5-lite-podslice --topology 4x4 --hosts 4
#                        --chips 4 --claim CLAIM --workdir /data/runs/NAME -- CONFIG [key=value ...]
#   launch/gke.sh logs | status | delete --name NAME
#   launch/gke.sh xpk    --name NAME --image IMAGE --cluster C --zone Z --tpu-type v5litepod-16 --workdir W -- CONFIG ...
#
# apply again with the same folder goes on where it stopped (a JobSet of that name is deleted first). A pod that ends is
# started again by the JobSet, up to 50 times; bad input (exit code 2) ends it.
# --claim: a PersistentVolumeClaim that all hosts write (Filestore), mounted at /data. --chips: of a host. --dry-run
# prints the manifest and the commands.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -gt 0 ] || usage
action=$1
shift
name='' image='' accelerator='' topology='' hosts='' chips=4 claim='' workdir='' cluster='' zone='' type='' spot=''
while [ $# -gt 0 ]; do
  valued "$@"
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --name) name=$2; shift ;;
    --image) image=$2; shift ;;
    --accelerator) accelerator=$2; shift ;;
    --topology) topology=$2; shift ;;
    --hosts) hosts=$2; shift ;;
    --chips) chips=$2; shift ;;
    --claim) claim=$2; shift ;;
    --workdir) workdir=$2; shift ;;
    --cluster) cluster=$2; shift ;;
    --zone) zone=$2; shift ;;
    --tpu-type) type=$2; shift ;;
    --spot) spot=1 ;;
    --) shift; break ;;
    -h | --help) usage 0 ;;
    *) fail "$1 is no option of $action" ;;
  esac
  shift
done
need --name "$name" "what the job is called"

command_json() {  # the run's words as a JSON list
  local word text='"recursive-jax", "run"'
  for word in "$@" --workdir "$workdir"; do
    word=${word//\\/\\\\}
    text+=", \"${word//\"/\\\"}\""
  done
  echo "[$text]"
}

manifest() {
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: 50
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: run, operator: In, values: [2]}
          template:
            metadata:
              annotations:
                alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
            spec:
              restartPolicy: Never
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
${spot:+                cloud.google.com/gke-spot: \"true\"
}              terminationGracePeriodSeconds: 300
              containers:
                - name: run
                  image: $image
                  command: $(command_json "$@")
                  ports:
                    - containerPort: 8471
                    - containerPort: 8477
                    - containerPort: 8482
                  resources:
                    requests: {google.com/tpu: $chips}
                    limits: {google.com/tpu: $chips}
                  volumeMounts:
                    - {name: data, mountPath: /data}
              volumes:
                - name: data
                  persistentVolumeClaim: {claimName: $claim}
EOF
}

case $action in
  apply)
    need --image "$image" "built by launch/Dockerfile"
    need --accelerator "$accelerator" "for example tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice"
    need --topology "$topology" "for example 4x4"
    need --hosts "$hosts" "machines of the slice: its chips by --chips"
    need --claim "$claim" "a PersistentVolumeClaim that all hosts write"
    need --workdir "$workdir" "the run's folder, under /data"
    [ $# -gt 0 ] || fail "a config is wanted behind --"
    do_ kubectl delete jobset "$name" --ignore-not-found  # one that has ended would stay as it is
    if [ -n "$DRY_RUN" ]; then
      echo "kubectl apply -f - <<'EOF'"
      manifest "$@"
      echo EOF
    else
      manifest "$@" | kubectl apply -f -
    fi
    ;;
  logs) do_ kubectl logs "--selector=jobset.sigs.k8s.io/jobset-name=$name" --all-containers --prefix --tail=50 ;;
  status) do_ kubectl get jobset "$name" -o wide ;;
  delete) do_ kubectl delete jobset "$name" ;;
  xpk)
    need --image "$image" "built by launch/Dockerfile"
    need --cluster "$cluster" "the cluster's name"
    need --zone "$zone" "the cluster's zone"
    need --tpu-type "$type" "for example v5litepod-16"
    need --workdir "$workdir" "the run's folder"
    [ $# -gt 0 ] || fail "a config is wanted behind --"
    words=$(quoted recursive-jax run "$@" --workdir "$workdir")
    do_ xpk workload create "--workload=$name" "--cluster=$cluster" "--zone=$zone" "--tpu-type=$type" \
      "--docker-image=$image" --max-restarts=50 "--command=${words% }"
    ;;
  *) fail "$action: apply, logs, status, delete or xpk is wanted" ;;
esac
