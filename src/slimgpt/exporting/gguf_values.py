"""Change the values of a checkpoint where llama.cpp's graphs compute with other ones."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gguf import MODEL_TENSOR as T
from torch import Tensor

from slimgpt.errors import ExportError
from slimgpt.exporting.gguf_graphs import Graph, ModelType, graph_of
from slimgpt.exporting.gguf_metadata import rotary, rotary_dim
from slimgpt.exporting.gguf_parts import Key, Part, Parts, head_dim_of, widths_of
from slimgpt.models.gguf_reading import rope_factors


def converted(parts: Parts, config: Any, model: ModelType, arch: str) -> Parts:
    """Change the tensors of a model for a graph; they are not yet padded.

    Norms get what the model adds to their weights. Rows of queries and keys are reordered where the
    graph rotates neighbouring rows and the model the halves of a head. Where the graph scales
    attention in another way, the queries make up for it. Factors of the rotary frequencies become a
    tensor, and so does a head that the model ties to its embedding, if the graph needs one.

    Raises
    ------
    ExportError
        If the graph does not have the biases of the model.
    """
    graph, result = graph_of(arch), {}
    scale = _query_scale(parts, config, model, graph)
    has_query_norm = Key(T.ATTN_Q_NORM, 0) in parts
    scaled = T.ATTN_Q_NORM if has_query_norm else T.ATTN_Q
    for key, part in parts.items():
        if key.suffix == ".bias":
            _check_bias(key, part, arch, graph)
        changes: list[Callable[[Tensor], Tensor]] = []
        if key.role.name.endswith("NORM") and key.suffix == ".weight" and model.norm_offset:
            changes.append(lambda tensor: tensor + model.norm_offset)
        if key.role in (T.ATTN_Q, T.ATTN_K) and graph.neighbours and not model.neighbours:
            changes.append(partial(_interleave, head_dim=head_dim_of(config), size=rotary_dim(config)))
        if key.role == scaled and scale != 1:
            changes.append(lambda tensor: tensor * scale)
        for change in changes:
            part = part.then(change)
        result[key] = part
    if graph.factors and rotary(config).get("rope_type") == "llama3":
        factors = rope_factors(config)
        result[Key(T.ROPE_FREQS, None)] = Part("", tuple(factors.shape), lambda: factors)
    if graph.output and Key(T.OUTPUT, None) not in parts:
        result[Key(T.OUTPUT, None)] = parts[Key(T.TOKEN_EMBD, None)]
    return result


def _check_bias(key: Key, part: Part, arch: str, graph: Graph) -> None:
    allowed = graph.biases
    if allowed is True or (allowed and key.role.name in allowed):
        return
    raise ExportError(
        f"llama.cpp's graph {arch} has no place for the tensor {part.stored_name}",
        hint="x",
    )


def _query_scale(parts: Parts, config: Any, model: ModelType, graph: Graph) -> float:
    """Factor by which the model scales queries more than the graph does."""
    if model.scale is None:
        return 1.0
    is_large = config.num_hidden_layers == graph.large
    heads = widths_of(parts, head_dim_of(config))[0].heads
    size = config.hidden_size // heads if is_large else head_dim_of(config)
    return (size / getattr(config, model.scale)) ** 0.5


def _interleave(tensor: Tensor, head_dim: int, size: int) -> Tensor:
    """Put the rows of a head that are rotated together, half a head apart, beside each other."""
    heads = tensor.unflatten(0, (-1, head_dim))
    halves = heads[:, :size].unflatten(1, (2, size // 2))
    heads[:, :size] = halves.transpose(1, 2).flatten(1, 2)
    return heads.flatten(0, 1)
