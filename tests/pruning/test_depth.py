"""Dropped layers and attention that is gone: choice, patch, config, files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, Run, make_tiny_model, prune_blocks, sample_tokens
from families import MODEL_TYPES, tiny_config
from interruption import InterruptionError, fail_at_block, fingerprint
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import slimgpt
from slimgpt.calibration.activations import embed
from slimgpt.checkpoint.depth import first_droppable, without_layers
from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError, UnsupportedModelError
from slimgpt.methods.registry import make_method
from slimgpt.models.blocks import bind, blocks_of
from slimgpt.models.layout import family_in
from slimgpt.models.source import find_model
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weights import open_weights
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.pruning import depth
from slimgpt.pruning.block import Gap, prune_block
from slimgpt.pruning.depth import check_same_layers, divergences
from slimgpt.pruning.plan import config_without

OPTIONS = {"calibration": TEXT, "nsamples": 6, "seqlen": 32}

NUM_LAYERS = 5

# What has an entry for each layer, or names layers, in a tiny model of five.
_BY_LAYER: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0]},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]
    },
    "qwen2_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 2},
    "qwen3_moe": {"mlp_only_layers": [2]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "deepseek_v3": {"first_k_dense_replace": 2},
}

Make = Callable[[str], Path]


def deep_config(model_type: str) -> Any:
    options = _BY_LAYER.get(model_type, {})
    try:
        return tiny_config(model_type, num_hidden_layers=NUM_LAYERS, **options)
    except Exception:
        types = ["sliding_attention", "full_attention", "full_attention"] * 2
        return tiny_config(
            model_type, num_hidden_layers=NUM_LAYERS, layer_types=types[:NUM_LAYERS], **options
        )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = make_tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    return save(model, tokenizer, tmp_path_factory.mktemp("llama"))


@torch.no_grad()
def skipped_logits(model: Any, dropped: Sequence[int], tokens_NT: Tensor) -> Tensor:
    """Logits of a model of which some blocks return what they get."""
    returns_tuple = family_in(model.config).returns_tuple
    for index in dropped:
        blocks_of(model)[index].forward = lambda hidden_states, *args, **kwargs: (
            (hidden_states,) if returns_tuple else hidden_states
        )
    return model(tokens_NT, use_cache=False).logits


def load_exact(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_without_two_layers_the_stock_class_computes_the_same(
    model_type: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deep_config(model_type))
    dense = save(model, tokenizer, tmp_path / "dense")
    options = OPTIONS | {"method": "random", "drop_layers": 2}
    result = slimgpt.prune(str(dense), tmp_path / "slim", **options)
    dropped = result.plan.dropped
    assert len(dropped) == 2 and 0 not in dropped
    small = load_exact(result.output)
    assert small.config.model_type == model_type
    assert not hasattr(small.config, "auto_map")
    assert small.num_parameters() == result.plan.params_after
    tokens_NT = sample_tokens(2, 16)
    with torch.no_grad():
        logits = small(tokens_NT, use_cache=False).logits
    expected = skipped_logits(load_exact(dense), dropped, tokens_NT)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
