"""The metadata of a GGUF file that say how a graph of llama.cpp computes a model."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import gguf
from gguf import GGUFWriter
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimgpt.errors import ExportError
from slimgpt.exporting.gguf_graphs import NOT_WRITTEN, UNIFORM, Graph, ModelType, Unrotated
from slimgpt.exporting.gguf_parts import Widths, head_dim_of

log = logging.getLogger(__name__)

# Names of the activation's key, of which a config has one.
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def check_graph(config: Any, model: ModelType, arch: str, graph: Graph) -> None:
    """Check that a graph computes what a config says.

    Raises
    ------
    ExportError
        If the activation differs, or a setting that the graph does not have.
    """
    found = next(getattr(config, key) for key in _ACTIVATIONS if hasattr(config, key))
    if found not in graph.activations:
        raise ExportError(
            f"llama.cpp's graph {arch} computes {graph.activations[0]} in the FFN, this model "
            f"{found}",
            hint=NOT_WRITTEN,
        )
    for key, needed in model.needs.items():
        value = getattr(config, key, needed)
        if bool(value) != needed:
            raise ExportError(
                f"llama.cpp's graph {arch} does not compute models with {key}={value}",
                hint=NOT_WRITTEN,
            )
    if graph.tied and not config.tie_word_embeddings:
        raise ExportError(
            f"the layers differ in width, and llama.cpp's graph for that ({arch}) takes the "
            "embedding as the head; this model has a head of its own",
            hint=UNIFORM,
        )
    ours, theirs = (_rotated(config, of) for of in (model.unrotated, graph.unrotated))
    if hasattr(config, "no_rope_layers"):
        ours = [bool(rotates) for rotates in config.no_rope_layers]
    if ours != theirs:
        layers = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len({*pair}) > 1]
        raise ExportError(
            f"llama.cpp's graph {arch} has other layers without rotary embeddings than this "
            f"model: {layers}",
            hint=NOT_WRITTEN,
        )


def _rotated(config: Any, unrotated: Unrotated) -> list[bool]:
    """Which layers rotate queries and keys."""
    slides = sliding_layers(config)
    if unrotated == "full":
        return slides if config.sliding_window is not None else [True] * len(slides)
    return [not unrotated or (layer + 1) % unrotated > 0 for layer in range(len(slides))]


def sliding_layers(config: Any) -> list[bool]:
    """Which layers attend only to the tokens in a sliding window."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    has_window = getattr(config, "sliding_window", None) is not None
    return [has_window and kind == "sliding_attention" for kind in kinds]


def add_metadata(
    writer: GGUFWriter, config: Any, model: ModelType, graph: Graph, layers: Sequence[Widths]
) -> None:
    """Add everything but the tokenizer.

    Parameters
    ----------
    writer : GGUFWriter
        Writer whose header is not yet written.
    config : PreTrainedConfig
        The model's config.
    model, graph : ModelType, Graph
        How it is written.
    layers : sequence of Widths
        The widths of the tensors that are written.

    Raises
    ------
    ExportError
        If the graph lacks the model's windows or the scaling of its rotary embeddings.
    """
    columns = [list(column) for column in zip(*map(astuple, layers), strict=True)]
    alike = len(set(layers)) == 1
    heads, kv_heads, channels, *_ = (column[0] if alike else column for column in columns)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context(writer, config, graph))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(channels)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    _add_experts(writer, config, layers[0])
    _add_rope(writer, config, graph)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in model.keys.items() if writer.arch == model.graph else ():
        found = getattr(config, value) if isinstance(value, str) else value
        if isinstance(found, bool):
            writer.add_bool(f"{writer.arch}.{key}", found)
        elif found is not None:
            writer.add_float32(f"{writer.arch}.{key}", found)
        else:
            raise ExportError(
                f"llama.cpp's graph {writer.arch} needs a value for {value}", hint=NOT_WRITTEN
            )


def _add_experts(writer: GGUFWriter, config: Any, layer: Widths) -> None:
    """Add the numbers and widths of experts, which are those of all layers."""
    if not layer.experts:
        return
    writer.add_expert_count(layer.experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(layer.channels)
    if layer.shared:
        writer.add_expert_shared_feed_forward_length(layer.shared)


def _context(writer: GGUFWriter, config: Any, graph: Graph) -> int:
    """Add the sliding window, or end the context with it."""
    slides, context = sliding_layers(config), config.max_position_embeddings
    if graph.window and (any(slides) or graph.window == "always"):
        period = slides.index(False) + 1 if False in slides else len(slides) + 1
        pattern = [layer % period > 0 for layer in range(1, len(slides) + 1)]
        if slides != pattern or not any(slides):
            raise ExportError(
                f"llama.cpp's graph {writer.arch} has sliding windows in all layers but every "
                f"n-th; this model has them in the layers {[i for i, s in enumerate(slides) if s]}",
                hint=NOT_WRITTEN,
            )
        writer.add_sliding_window(config.sliding_window)
        writer.add_uint32(f"{writer.arch}.attention.sliding_window_pattern", period)
    elif any(slides) and config.sliding_window < context:
        context = config.sliding_window
        log.warning(
            "llama.cpp computes full attention here, which equals the sliding window up to its "
            "%d tokens: the context ends there",
            context,
        )
    growth = rotary(config).get("llama_4_scaling_beta")
    if growth and graph.growth:
        writer.add_float32(f"{writer.arch}.attention.temperature_scale", growth)
    elif growth and (original := rotary(config)["original_max_position_embeddings"]) < context:
        context = original
        log.warning(
            "llama.cpp does not scale attention with the position here, which begins after %d "
            "tokens: the context ends there",
            context,
        )
    return context


def rotary(config: Any) -> dict[str, Any]:
    """Rotary embeddings of the layers that attend to all tokens; empty without any."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def rotary_dim(config: PreTrainedConfig) -> int:
    """Number of rotated dimensions of a head."""
    return int(head_dim_of(config) * rotary(config).get("partial_rotary_factor", 1.0))


def _add_rope(writer: GGUFWriter, config: Any, graph: Graph) -> None:
    rope = rotary(config)
    if not rope:
        return
    if not graph.partial and rotary_dim(config) != head_dim_of(config):
        raise ExportError(
            f"llama.cpp's graph {writer.arch} rotates whole heads, this model {rotary_dim(config)} "
            f"of {head_dim_of(config)} dimensions",
            hint=UNIFORM if graph.per_layer else NOT_WRITTEN,
        )
    writer.add_rope_dimension_count(rotary_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        _add_attention_factor(writer, config, rope)
    if graph.window and "sliding_attention" in config.rope_parameters:
        _add_local_base(writer, config.rope_parameters["sliding_attention"], rope, graph)
    possible = ["default", "linear", "yarn", *graph.rotary]
    if kind not in possible:
        raise ExportError(
            f"rotary embeddings of type {kind!r} cannot be written for the graph {writer.arch}",
            hint=f"types that can: {', '.join(possible)}",
        )


def _add_local_base(
    writer: GGUFWriter, local: Mapping[str, Any], rope: Mapping[str, Any], graph: Graph
) -> None:
    """Add the rotary base of layers with a sliding window, whose frequencies are not scaled."""
    own = local["rope_theta"] if graph.local_base else rope["rope_theta"]
    if local["rope_type"] != "default" or local["rope_theta"] != own:
        raise ExportError(
            f"llama.cpp's graph {writer.arch} does not have the rotary embeddings of this model in "
            f"sliding windows: type {local['rope_type']!r}, base {local['rope_theta']:g}",
            hint=NOT_WRITTEN,
        )
    if graph.local_base:
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", own)


def _add_attention_factor(writer: GGUFWriter, config: Any, rope: Mapping[str, Any]) -> None:
    """Add the factor of attention of yarn and longrope, and the limits of yarn."""
    layer_type = None if "rope_type" in config.rope_parameters else "full_attention"
    compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    _, factor = compute(config, device="cpu", layer_type=layer_type)
    if rope["rope_type"] == "yarn":
        factor /= 0.1 * math.log(rope["factor"]) + 1  # llama.cpp's own
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
        if not rope.get("truncate", True):
            raise ExportError(
                "llama.cpp always rounds the limits of yarn; this model has truncate=False",
                hint=NOT_WRITTEN,
            )
    writer.add_rope_scaling_attn_factors(factor)
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
