# shellcheck shell=bash
# Sourced on a TPU VM: where this host stands in its slice, from the VM's own metadata, as JAX and the roll call want it.
attribute() {
  curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
ends=$(attribute worker-network-endpoints) # ID:PORT:ADDRESS of every host, with commas between
if [[ $ends == *,* ]]; then
  JAX_NUM_PROCESSES=$(tr ',' '\n' <<<"$ends" | wc -l)
  JAX_PROCESS_ID=$(attribute agent-worker-number)
  JAX_COORDINATOR_ADDRESS=$(cut -d, -f1 <<<"$ends" | cut -d: -f3):8476
  export JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_COORDINATOR_ADDRESS
fi
