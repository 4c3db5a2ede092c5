#!/usr/bin/env bash
# Test and measure SlimGPT on one GPU: no network, no root, with the machine's own torch.
#
#     benchmarks/gpu/run.sh [--device cuda] [--minutes 8] [--output DIR] [--steps NAME …] [--tiny]
#
# Wheels in benchmarks/gpu/wheels are used for packages that are missing or older (fetch them with
# fetch_wheels.sh). DIR/results.json and DIR/table.txt are rewritten after each result. The exit
# code is not 0 if a step failed, and the last line names it. A step without time left is skipped,
# and one that takes too long is ended. `--device cpu --tiny` is a rehearsal.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
"$python" "$here/install.py" "$here/wheels" "$packages"
export PYTHONPATH="$root/src:$packages:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" "$here/run.py" --spent "$SECONDS" "$@"
