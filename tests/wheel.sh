#!/usr/bin/env bash
# What a user does first, with a wheel that is installed where the sources are not.
# Usage: tests/wheel.sh WHEEL PYTHON, where PYTHON has the dependencies.
set -euo pipefail
wheel=$(realpath "$1")
dependencies=$("$2" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$2" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check "$wheel"
# Last on the path, and without an editable install there, whose .pth file is not read.
site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$dependencies" > "$site/dependencies.pth"
cd "$environment"
export PATH="$environment/bin:$PATH" HF_HUB_OFFLINE=1 PYTHONPATH=
python - <<'PYTHON'
import slimgpt
from transformers import AutoModelForCausalLM, LlamaConfig

from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer

assert slimgpt.__file__.startswith(__import__("sys").prefix), slimgpt.__file__
tokenizer = load_tokenizer(find_model("smollm2-135m"))
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, **sizes)
AutoModelForCausalLM.from_config(config).save_pretrained("tiny")
tokenizer.save_pretrained("tiny")
PYTHON
slimgpt --version
slimgpt --help > help.txt
slimgpt families > families.txt
slimgpt prune tiny --output slim --ratio 0.3 --calibration pydocs --nsamples 2 --seqlen 32
slimgpt eval slim --against tiny --data pydocs --seqlen 32 --max-tokens 128
slimgpt report slim --against tiny --new-tokens 4 > report.txt
slimgpt export slim --to gguf
slimgpt bench slim --against tiny --prompt-length 8 --new-tokens 4 --repeats 1
slimgpt run table6 --small --output runs 2> error.txt && exit 1
grep --quiet -- --data-dir error.txt  # so the recipe was found by its name
echo "the wheel runs"
