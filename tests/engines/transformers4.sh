#!/usr/bin/env bash
# Load uniform results in transformers 4.57, in an environment of its own ($VENV, 1 GB), and compare
# ids and logits with those of the version that is installed beside slimgpt ($PYTHON).
set -euo pipefail
cd "$(dirname "$0")/../.."
VENV=${VENV:-.venv-transformers4}
PYTHON=${PYTHON:-python}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

if [ ! -e "$VENV/ready" ]; then
  "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip --quiet install 'torch==2.13.0' 'transformers==4.57.*'
  touch "$VENV/ready"
fi

export HF_HUB_OFFLINE=1
"$PYTHON" tests/engines/transformers4.py write "$WORK"
env --unset=PYTHONPATH "$VENV/bin/python" tests/engines/transformers4.py check "$WORK"
