"""Change the values of a checkpoint where llama.cpp's graphs compute with other ones."""

from functools import partial
from typing import Any

import torch
from gguf import MODEL_TENSOR as T
from torch import Tensor

from slimgpt.exporting.gguf_graphs import ModelType, graph_of, no_place
from slimgpt.exporting.gguf_metadata import rotary, rotary_dim
from slimgpt.exporting.gguf_parts import Key, Part, Parts, head_dim_of, widths_of
from slimgpt.models.gguf_reading import rope_factors

_PROJECTIONS = {
    "qkv": (T.ATTN_Q, T.ATTN_K, T.ATTN_V),
    "output": (T.ATTN_OUT,),
    "ffn": (T.FFN_GATE, T.FFN_UP, T.FFN_DOWN),
}


def converted(parts: Parts, config: Any, model: ModelType, arch: str) -> Parts:
    """Change the tensors of a model for a graph; they are not yet padded.

    Norms get what the model adds to their weights. Rows of queries and keys are reordered where the
    graph rotates neighbouring rows and the model the halves of a head. Factors that the graph does
    not have become part of the weights. Factors of the rotary frequencies become a tensor, and so
    does a head that the model ties to its embedding, if the graph needs one or they differ then.

    Raises
    ------
    ExportError
        If the graph does not have the biases of the model.
    """
    graph, changed = graph_of(arch), dict(parts)
    scales = _scales(parts, config, model, arch)
    if graph.output or T.OUTPUT in scales:
        changed.setdefault(Key(T.OUTPUT, None), parts[Key(T.TOKEN_EMBD, None)])
    reorder = partial(_interleaved, head_dim=head_dim_of(config), size=rotary_dim(config))
    for key, part in changed.items():
        if key.suffix == ".bias":
            _check_bias(key, part, arch)
        elif key.role.name.endswith("NORM") and model.norm_offset:
            changed[key] = part.then(lambda tensor: tensor + model.norm_offset)
        elif key.role == T.FFN_GATE_INP_SHEXP:  # one row
            changed[key] = part.then(Tensor.flatten, part.shape[1:])
        if key.role in (T.ATTN_Q, T.ATTN_K) and graph.neighbours and not model.neighbours:
            changed[key] = part.then(reorder)
        if key.role in scales:
            changed[key] = changed[key].then(partial(Tensor.mul, other=scales[key.role]))
    return changed | _rotary_factors(config)


def _rotary_factors(config: Any) -> Parts:
    """Factors of the rotary frequencies, by which llama.cpp divides."""
    rope = rotary(config)
    found = {}
    if rope.get("rope_type") == "llama3":
        found = {T.ROPE_FREQS: rope_factors(config)}
    elif rope.get("rope_type") == "longrope":
        found = {
            T.ROPE_FACTORS_LONG: torch.tensor(rope["long_factor"]),
            T.ROPE_FACTORS_SHORT: torch.tensor(rope["short_factor"]),
        }
    return {
        Key(role, None): Part("", tuple(factors.shape), factors.clone)
        for role, factors in found.items()
    }


def _check_bias(key: Key, part: Part, arch: str) -> None:
    for name, roles in _PROJECTIONS.items():
        if key.role in roles and name not in graph_of(arch).biases:
            raise no_place(arch, part.stored_name)


def _scales(parts: Parts, config: Any, model: ModelType, arch: str) -> dict[T, float]:
    """Factors of weights that make up for what the graph does not compute, if they are not 1."""
    scales, is_own, size = {}, arch == model.graph, head_dim_of(config)
    if model.scale and not (is_own and "attention.scale" in model.keys):
        if config.num_hidden_layers == graph_of(arch).large:
            size = config.hidden_size // widths_of(parts, size)[0].heads
        query = T.ATTN_Q_NORM if Key(T.ATTN_Q_NORM, 0) in parts else T.ATTN_Q
        scales[query] = _power(config, *model.scale) * size**0.5
    if not is_own:
        scales |= {T[role]: _power(config, *power) for role, power in model.folded.items()}
    return {role: scale for role, scale in scales.items() if scale != 1}


def _power(config: Any, key: str, exponent: float) -> float:
    return getattr(config, key) ** exponent


def _interleaved(tensor: Tensor, head_dim: int, size: int) -> Tensor:
    """Put rows that are rotated together, half of the rotated part apart, beside each other."""
    heads = tensor.unflatten(0, (-1, head_dim)).clone()
    halves = heads[:, :size].unflatten(1, (2, size // 2))
    heads[:, :size] = halves.transpose(1, 2).flatten(1, 2)
    return heads.flatten(0, 1)
