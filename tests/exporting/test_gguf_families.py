"""Every model type as GGUF, held against llama.cpp itself."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MODEL_TYPES, tiny_config
from gguf import GGUFReader
from llama_cpp import check_agreement
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import slimgpt
from slimgpt.allocation.shapes import BlockWidths, SublayerShape, Width
from slimgpt.checkpoint.writer import pruned_config
from slimgpt.errors import ExportError
from slimgpt.models.blocks import bind
from slimgpt.models.family import family_of

ONE_WIDTH = "one width for all"
SQUARE = "as many as the hidden size"


@dataclass(frozen=True)
class Expected:
    """The graph of a dense model, of one with fewer heads and channels, and for layers that differ.

    Or what the refusal says.
    """

    dense: str
    uniform: str | None = None
    per_layer: str = ONE_WIDTH

    def __getitem__(self, kind: str) -> str:
        return {"dense": self.dense, "per-layer": self.per_layer}.get(kind) or (
            self.uniform or self.dense
        )


EXPECTED = {
    "apertus": Expected("apertus"),
    "arcee": Expected("arcee"),
    "cohere": Expected("command-r", SQUARE),
    "cohere2": Expected("cohere2", SQUARE),
    "cwm": Expected("llama", per_layer="deci"),
    "ernie4_5": Expected("ernie4_5", per_layer="deci"),
    "exaone4": Expected("exaone4", SQUARE),
    "falcon": Expected("falcon"),
    "gemma": Expected("gemma"),
    "gemma2": Expected("gemma2"),
    "gemma3_text": Expected("gemma3"),
    "glm": Expected("chatglm", SQUARE),
    "glm4": Expected("glm4"),
    "gpt2": Expected("gpt2"),
    "gpt_neox": Expected("gptneox"),
    "granite": Expected("granite", per_layer="deci"),
    "granitemoe": Expected("granitemoe"),
    "hunyuan_v1_dense": Expected("hunyuan-dense"),
    "llama": Expected("llama", per_layer="deci"),
    "ministral": Expected("llama", per_layer="deci"),
    "ministral3": Expected("mistral3", per_layer="deci"),
    "mistral": Expected("llama", per_layer="deci"),
    "mixtral": Expected("llama"),
    "nemotron": Expected("nemotron", SQUARE),
    "olmo": Expected("olmo", SQUARE),
    "olmo2": Expected("olmo2", SQUARE),
    "olmo3": Expected("olmo2", SQUARE),
    "olmoe": Expected("olmoe"),
    "phi": Expected("phi2", SQUARE),
    "phi3": Expected("phi3", "llama", "deci"),
    "qwen2": Expected("qwen2", "llama", "deci"),
    "qwen2_moe": Expected("qwen2moe", SQUARE),
    "qwen3": Expected("qwen3", per_layer="openelm"),
    "qwen3_moe": Expected("qwen3moe"),
    "seed_oss": Expected("seed_oss", per_layer="deci"),
    "smollm3": Expected("smollm3"),
    "stablelm": Expected("stablelm"),
    "starcoder2": Expected("starcoder2", SQUARE),
}

NOT_WRITTEN = "models of type '.*' cannot be written as GGUF"

# As wide as all query heads, and weights for which llama.cpp's GELU, a table in half precision, is
# near enough.
COMMON = {"hidden_size": 64, "initializer_range": 0.1}

KINDS = ("attention", "ffn", "experts")

MIXED = ["sliding_attention", "sliding_attention", "full_attention"]

OPTIONS: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": False, "tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True},
    "exaone4": {"sliding_window": 128, "layer_types": ["sliding_attention"] * 3},
    "falcon": {"initializer_range": 0.05},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12},
    "granite": {"attention_multiplier": 0.2},
    "granitemoe": {"attention_multiplier": 0.2},
    "olmoe": {"num_key_value_heads": 8},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"mlp_only_layers": []},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}

Export = Callable[..., tuple[Any, PreTrainedModel]]


def config_of(model_type: str, **options: Any) -> PreTrainedConfig:
    config = tiny_config(model_type, **COMMON | OPTIONS.get(model_type, {}) | options)
    for key in [key for key, value in options.items() if value is None]:
        setattr(config, key, None)
    return config


@pytest.fixture
def export(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Export:
    """Write a random model with this config."""

    def write(config: PreTrainedConfig, type_name: str = "f32") -> tuple[Any, PreTrainedModel]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        file = tmp_path / "model.gguf"
        return slimgpt.export(str(tmp_path / "model"), file, type=type_name), model

    return write


def query_heads(model_type: str) -> PreTrainedConfig:
    """Layers with other numbers of query heads per group."""
    config = config_of(model_type)
    keys = family_of(model_type).widths("attention")
    layers = [dict(zip(keys, counts, strict=True)) for counts in ((4, 8), (4, 4), (1, 3))]
    pruned = pruned_config(config, widths(config, uniform=False), uniform=False)
    values = pruned.to_dict() | {"per_layer_config": dict(enumerate(layers))}
    return type(pruned)(**values)


def widths(
    config: PreTrainedConfig, uniform: bool, kinds: tuple[str, ...] = KINDS
) -> list[BlockWidths]:
    """Fewer units in each sublayer of these kinds that can be pruned, and smaller experts."""
    if uniform and family_of(config.model_type).rebuilds_attention:
        kinds = tuple(kind for kind in kinds if kind != "attention")
    with torch.device("meta"):
        shapes = [block.shape for block in bind(AutoModelForCausalLM.from_config(config))]

    def width(sublayer: SublayerShape, quarters: int) -> Width:
        if sublayer.is_fixed or sublayer.kind not in kinds:
            return sublayer.num_units
        if sublayer.kind == "experts":
            return sublayer.num_units // 2, sublayer.parts * quarters // 4
        return sublayer.num_units * quarters // 4

    return [
        tuple(width(sublayer, 2 if uniform else 1 + index) for sublayer in shape.sublayers)
        for index, shape in enumerate(shapes)
    ]


def prompt(config: PreTrainedConfig, arch: str) -> list[int]:
    """Longer than the sliding window where the graph has one."""
    has_window = arch in ("cohere2", "gemma2", "gemma3", "olmo2")
    window = 128 if has_window else getattr(config, "sliding_window", None) or 128
    return list(range(10, 13 if window < 40 else 40))


@pytest.mark.parametrize("kind", ["dense", "uniform", "per-layer"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_llama_cpp_computes_the_same(model_type: str, kind: str, export: Export) -> None:
    config = config_of(model_type)
    expected = EXPECTED[model_type][kind] if model_type in EXPECTED else NOT_WRITTEN
    if kind != "dense" and model_type in EXPECTED:
        uniform = kind == "uniform"
        config = pruned_config(config, widths(config, uniform), uniform)
    if " " in expected:
        with pytest.raises(ExportError, match=expected) as error:
            export(config)
        assert ("--uniform" in str(error.value.hint)) == (model_type in EXPECTED)
        return
    result, model = export(config)
    assert result.arch == expected
    check_agreement(result.output, model, prompt(config, expected))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3"])
def test_groups_of_other_sizes_in_each_layer(model_type: str, export: Export) -> None:
    config = query_heads(model_type)
    result, model = export(config)
    check_agreement(result.output, model, prompt(config, result.arch))
    heads = GGUFReader(result.output).fields[f"{result.arch}.attention.head_count"]
    assert heads.contents() == [8, 4, 3]


def test_fewer_and_smaller_experts_with_all_heads(export: Export) -> None:
    config = config_of("qwen2_moe")
    config = pruned_config(config, widths(config, uniform=True, kinds=("experts",)), uniform=True)
    result, model = export(config)
    check_agreement(result.output, model, prompt(config, result.arch))
    fields = GGUFReader(result.output).fields
    found = ("expert_count", "expert_used_count", "expert_feed_forward_length")
    assert [fields[f"qwen2moe.{key}"].contents() for key in found] == [3, 2, 8]
    assert fields["qwen2moe.expert_shared_feed_forward_length"].contents() == 24


def test_experts_are_padded_to_whole_blocks(export: Export) -> None:
    result, model = export(config_of("qwen2_moe"), "q8_0")
    shapes = {tensor.name: list(tensor.shape) for tensor in GGUFReader(result.output).tensors}
    assert shapes["blk.0.ffn_down_exps.weight"] == [32, 64, 6]  # from 16, GGUF's order
    assert shapes["blk.0.ffn_up_exps.weight"] == [64, 32, 6]
    assert shapes["blk.0.ffn_down_shexp.weight"] == [32, 64]  # from 24
    # llama.cpp rounds activations to 8 bits too, which random weights make the most of.
    check_agreement(result.output, model, list(range(10, 40)), tolerance=0.3)


def test_a_head_of_its_own_needs_layers_of_one_width(export: Export) -> None:
    """llama.cpp's only graph with q/k norms and widths of each layer has none."""
    config = config_of("qwen3", tie_word_embeddings=False)
    with pytest.raises(ExportError, match=r"\(openelm\) takes the embedding as the head") as error:
        export(pruned_config(config, widths(config, uniform=False), uniform=False))
    assert "--uniform" in str(error.value.hint)


YARN = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LOCAL = {"rope_type": "default", "rope_theta": 20000.0}
FASTER = LOCAL | {"rope_theta": 10000.0}
LONG = {"long_factor": [1.0, 2.0, 3.0], "short_factor": [1.0, 1.1, 1.2]}


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", YARN | {"rope_type": "yarn", "attention_factor": 1.5, "beta_fast": 16.0}),
        ("qwen3", YARN | {"rope_type": "yarn"}),
        ("ministral3", YARN | {"rope_type": "yarn", "llama_4_scaling_beta": 0.5}),
        (
            "olmo3",
            {
                "full_attention": YARN | {"rope_type": "yarn"},
                "sliding_attention": LOCAL | {"rope_theta": 10000.0},
            },
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": LOCAL,
            },
        ),
        ("phi3", YARN | LONG | {"rope_type": "longrope", "partial_rotary_factor": 0.75}),
        (
            "apertus",
            YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rotary_embeddings(model_type: str, rope: dict[str, Any], export: Export) -> None:
    """Beyond the original context, in which some of them differ from that within it."""
    options = {"original_max_position_embeddings": 32} if model_type == "phi3" else {}
    config = config_of(model_type, rope_parameters=deepcopy(rope), **options)
    result, model = export(config)
    check_agreement(result.output, model, list(range(10, 50)))


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("qwen3", {"attention_bias": True}, r"qwen3 has no place for the tensor .*\.bias"),
        ("stablelm", {"qk_layernorm": True}, r"stablelm has no place for the tensor .*_layernorm"),
        ("gemma", {"hidden_activation": None, "hidden_act": "silu"}, "computes gelu_pytorch_tanh"),
        ("gemma2", {"attn_logit_softcapping": None}, "needs a value for attn_logit_softcapping"),
        ("gemma3_text", {"final_logit_softcapping": 5.0}, "with final_logit_softcapping=5.0"),
        ("falcon", {"alibi": True}, "with alibi=True"),
        ("starcoder2", {"use_bias": False}, "with use_bias=False"),
        ("cohere", {"use_qk_norm": True}, "with use_qk_norm=True"),
        ("olmo", {"clip_qkv": 8.0}, "with clip_qkv=8.0"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, r"layers without rotary .*: \[2, 3\]"),
        (
            "exaone4",
            {"sliding_window": 8, "layer_types": MIXED},
            r"layers without rotary .*: \[2\]",
        ),
        ("olmo3", {"layer_types": [*MIXED[1:], "full_attention"]}, r"in the layers \[0\]"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": LOCAL, "sliding_attention": FASTER}},
            "base",
        ),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"no place for the tensor model\.layers\.1\.mlp"),
        ("qwen3_moe", {"norm_topk_prob": False}, "with norm_topk_prob=False"),
        ("olmoe", {"num_key_value_heads": 4}, "8 query heads share 4 keys and values"),
        ("phimoe", {}, "does not subtract the mean in norms"),
        ("llama", {"rope_parameters": LOCAL | {"partial_rotary_factor": 0.5}}, "4 of 8 dimensions"),
    ],
)
def test_what_a_graph_does_not_compute_is_refused(
    model_type: str, options: dict[str, Any], message: str, export: Export
) -> None:
    with pytest.raises(ExportError, match=message) as error:
        export(config_of(model_type, **options))
    assert error.value.hint
