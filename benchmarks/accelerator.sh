#!/usr/bin/env bash
# Everything that a GPU machine can show about this project, in one command of at most 8 minutes, without internet:
#
#   benchmarks/accelerator.sh [--out DIR] [--only STAGE,STAGE] [--rehearse]
#
# Each stage leaves its figures in DIR/figures.json and DIR/figures.md as it ends. What the image lacks is taken from
# benchmarks/.wheels, which benchmarks/wheels.sh fills beforehand. --rehearse: the same stages, small, on a CPU; what
# they print is no figure of any accelerator.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if compgen -G "$repo/benchmarks/.wheels/*.whl" >/dev/null && ! "$python" -c "import grain, pydantic, llguidance" 2>/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --target "$site" "$repo"/benchmarks/.wheels/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
"$python" "$repo/benchmarks/accelerator.py" "$@"
