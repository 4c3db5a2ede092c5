"""Pruned and recovered models, quantised as people do; `quantised.sh` runs this."""

import ctypes
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimgpt
from slimgpt.data.samples import SampleOptions, calibration_tokens, evaluation_tokens
from slimgpt.evaluation.perplexity import mean_losses

pytestmark = pytest.mark.skipif(
    find_spec("llmcompressor") is None, reason="tests/engines/quantised.sh runs this"
)

MODEL, TEXT = "smollm2-135m", "pydocs"
GROUP = 64  # divides SmolLM2's hidden size of 576 and the pruned widths
Q4_K_M = 15  # llama.cpp's number of this file type


@pytest.fixture(scope="module", params=["uniform", "layers that differ"])
def recovered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 without a fifth, distilled for a few steps."""
    folder = tmp_path_factory.mktemp("models")
    slimgpt.prune(
        MODEL,
        folder / "pruned",
        ratio=0.2,
        calibration=TEXT,
        nsamples=8,
        seqlen=256,
        widths="scheduled",
        uniform=request.param == "uniform",
        multiple_of=GROUP,
    )
    slimgpt.recover(
        str(folder / "pruned"),
        folder / "recovered",
        method="distill",
        data=TEXT,
        eval_data=TEXT,
        tokens=2048,
        seqlen=256,
        eval_tokens=2048,
    )
    return folder / "recovered"


def perplexity(model: Any, tokenizer: Any) -> float:
    windows = evaluation_tokens(TEXT, tokenizer, 2048).unfold(0, 512, 512)
    return math.exp(mean_losses(model, None, windows).nll)


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def test_gptq_with_llm_compressor(recovered: Path, tmp_path: Path) -> None:
    """A compressed-tensors checkpoint, which transformers loads, is a quarter of the size."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    model, tokenizer = load(recovered)
    before = perplexity(model, tokenizer)
    tokens = calibration_tokens(TEXT, tokenizer, SampleOptions(16, 512)).tolist()
    samples = {"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]}
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": GROUP}
    recipe = GPTQModifier(
        config_groups={"weights": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    oneshot(
        model=model,
        dataset=Dataset.from_dict(samples),
        recipe=recipe,
        num_calibration_samples=len(tokens),
    )
    model.save_pretrained(tmp_path, save_compressed=True)
    tokenizer.save_pretrained(tmp_path)
    after = perplexity(*load(tmp_path))
    print(f"perplexity {before:.2f}, with 4 bits in groups of {GROUP} {after:.2f}")
    assert before < after < 1.5 * before
    sizes = [(f / "model.safetensors").stat().st_size for f in (recovered, tmp_path)]
    assert sizes[1] < 0.6 * sizes[0]  # the embedding stays in its type


def test_k_quants_with_llama_cpp(recovered: Path, tmp_path: Path) -> None:
    """llama.cpp's quantiser reads our file; rows of 576 values fall back to larger types."""
    import gguf

    if "per_layer_config" in (recovered / "config.json").read_text(encoding="utf-8"):
        pytest.skip("a GGUF file of layers that differ is no model for slimgpt eval")
    slimgpt.export(str(recovered), tmp_path / "f32.gguf", to="gguf", type="f32")
    assert quantise(tmp_path / "f32.gguf", tmp_path / "q4.gguf", Q4_K_M) == 0
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "q4.gguf").tensors
    }
    assert types["blk.5.ffn_up.weight"] == "Q5_0"  # 576 values are no whole blocks of 256
    before, after = (
        slimgpt.evaluate(model, data=(TEXT,), seqlen=(512,), max_tokens=2048).perplexity[0]
        for model in (str(recovered), str(tmp_path / "q4.gguf"))
    )
    print(f"perplexity {before.perplexity:.2f}, as Q4_K_M {after.perplexity:.2f}")
    assert after.perplexity < 1.2 * before.perplexity


class _Parameters(ctypes.Structure):
    """The first parameters of llama.cpp's quantiser, and room for the others."""

    _fields_ = (
        ("num_threads", ctypes.c_int32),
        ("file_type", ctypes.c_int32),
        ("others", ctypes.c_byte * 504),
    )


def quantise(source: Path, destination: Path, file_type: int) -> int:
    """Call llama.cpp's quantiser, as llama-quantize does; returns 0 if it succeeds."""
    folder = Path(os.environ["LLAMA_LIBRARIES"])
    for pattern in ("libggml-base.so", "libggml.*so"):
        ctypes.CDLL(str(next(folder.glob(pattern)).resolve()), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(next(folder.glob("libllama.*so")).resolve()))
    library.llama_model_quantize_default_params.restype = _Parameters
    parameters = library.llama_model_quantize_default_params()
    parameters.file_type = file_type
    names = (str(path).encode() for path in (source, destination))
    return library.llama_model_quantize(*names, ctypes.byref(parameters))
