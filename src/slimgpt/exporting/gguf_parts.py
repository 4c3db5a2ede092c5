"""The tensors of a checkpoint as llama.cpp's graphs have them, each read when it is written."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import gguf
import torch
from gguf import MODEL_TENSOR as T
from gguf import TENSOR_NAMES
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimgpt.exporting.gguf_graphs import ModelType, no_place
from slimgpt.models.family import family_of
from slimgpt.models.weights import Weights

_QKV = (T.ATTN_Q, T.ATTN_K, T.ATTN_V)
_GATE_UP = (T.FFN_GATE, T.FFN_UP)


@dataclass(frozen=True)
class Widths:
    """Widths of a layer: query heads, key/value heads, channels of the FFN."""

    heads: int
    kv_heads: int
    channels: int

    def padded(self, head_dim: int, block: int) -> "Widths":
        """Widths that llama.cpp can load: never zero, output projections with whole blocks."""
        group = self.heads // self.kv_heads
        kv_heads = _round_up(self.kv_heads, block // math.gcd(block, group * head_dim))
        return Widths(kv_heads * group, kv_heads, _round_up(self.channels, block))


def _key(arch: str) -> gguf.MODEL_ARCH:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def _round_up(width: int, step: int) -> int:
    return max(math.ceil(width / step), 1) * step


@dataclass(frozen=True)
class Key:
    """Which tensor: its role, its layer (None outside of layers), and ``.weight`` or ``.bias``."""

    role: T
    layer: int | None
    suffix: str = ".weight"

    @property
    def name(self) -> str:
        """llama.cpp's name of the tensor."""
        return TENSOR_NAMES[self.role].format(bid=self.layer) + self.suffix


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, or rows of it, whose shape is known before it is read."""

    stored_name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def then(self, change: Callable[[Tensor], Tensor], shape: Sequence[int] = ()) -> Self:
        """Change the values when they are read, and perhaps the shape."""
        return replace(self, shape=tuple(shape) or self.shape, read=lambda: change(self.read()))

    def rows(self, index: Tensor) -> Self:
        """Select rows."""
        return self.then(lambda t: t[index], (len(index), *self.shape[1:]))


Parts = dict[Key, Part]


def head_dim_of(config: PreTrainedConfig) -> int:
    """Size of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def find_parts(model: ModelType, arch: str, skeleton: PreTrainedModel, weights: Weights) -> Parts:
    """Find the tensors of a checkpoint, (out, in features), fused projections taken apart.

    Parameters
    ----------
    model : ModelType
        How models of this type are written.
    arch : str
        The graph. What it does not have is found under the names of the model type's own graph.
    skeleton : PreTrainedModel
        The model without weights.
    weights : Weights
        The checkpoint, which has been checked against the skeleton.

    Raises
    ------
    ExportError
        If neither of the two has a place for a tensor.
    """
    config = skeleton.config
    transposed = {f"{n}.weight" for n, m in skeleton.named_modules() if isinstance(m, Conv1D)}
    keys = (_key(arch), _key(model.graph))
    maps = [gguf.get_tensor_name_map(key, config.num_hidden_layers) for key in keys]
    parts: Parts = {}
    for name, shape in weights.shapes.items():
        is_head = name == "lm_head.weight" and config.tie_word_embeddings
        if is_head or name.endswith(tuple(model.scalars.values())):
            continue
        found = [names.get_type_and_name(name, (".weight", ".bias")) for names in maps]
        role, gguf_name = found[0] or found[1] or (None, "")
        if role is None:
            raise no_place(arch, name)
        if role == T.ATTN_ROT_EMBD:  # in old checkpoints; follows from the config
            continue
        prefix, index, *_ = gguf_name.split(".")
        key = Key(role, int(index) if prefix == "blk" else None, name[name.rindex(".") :])
        part = Part(name, shape, partial(weights.read, name))
        parts[key] = part.then(torch.t, shape[::-1]) if name in transposed else part
    return _taken_apart(parts, config, model.by_group)


def _taken_apart(parts: Parts, config: PreTrainedConfig, by_group: bool) -> Parts:
    """Split fused projections: queries, keys and values, and gate and up projection."""
    inputs = [spec.inputs for spec in family_of(config.model_type).sublayers]
    gated = {name for modules in inputs for name, s in modules.items() if s == ("channel",) * 2}
    separate: Parts = {}
    for key, part in parts.items():
        roles, rows = (key.role,), torch.arange(part.shape[0])
        pieces: Sequence[Tensor] = (rows,)
        if key.role == T.ATTN_QKV:
            queries = parts[Key(T.ATTN_OUT, key.layer)].shape[1]
            keys = (len(rows) - queries) // 2
            roles, sizes = _QKV, (queries, keys, keys)
            if by_group:
                size = head_dim_of(config)
                rows = rows.unflatten(0, (keys // size, -1))
                sizes = (rows.shape[1] - 2 * size, size, size)
            pieces = [piece.flatten() for piece in rows.split(sizes, dim=-1)]
        elif part.stored_name.split(".")[-2] in gated:
            roles, pieces = _GATE_UP, rows.tensor_split(2)
        for role, piece in zip(roles, pieces, strict=True):
            separate[replace(key, role=role)] = part if len(roles) == 1 else part.rows(piece)
    return separate


def widths_of(parts: Parts, head_dim: int) -> list[Widths]:
    """Read the widths of all layers from the shapes of their tensors."""
    layers = sorted({key.layer for key in parts if key.layer is not None})
    return [
        Widths(
            parts[Key(T.ATTN_OUT, layer)].shape[1] // head_dim,
            parts[Key(T.ATTN_K, layer)].shape[0] // head_dim,
            parts[Key(T.FFN_DOWN, layer)].shape[1],
        )
        for layer in layers
    ]


def padded(parts: Parts, widths: Sequence[Widths], head_dim: int) -> Parts:
    """Pad the tensors with zeros to the given widths."""
    return {key: _pad(key, part, widths, head_dim) for key, part in parts.items()}


def _pad(key: Key, part: Part, widths: Sequence[Widths], head_dim: int) -> Part:
    if key.layer is None:
        return part
    layer = widths[key.layer]
    queries, keys = layer.heads * head_dim, layer.kv_heads * head_dim
    sizes = {
        T.ATTN_Q: (0, queries),
        T.ATTN_K: (0, keys),
        T.ATTN_V: (0, keys),
        T.ATTN_OUT: (1, queries),
        T.FFN_GATE: (0, layer.channels),
        T.FFN_UP: (0, layer.channels),
        T.FFN_DOWN: (1, layer.channels),
    }
    axis, size = sizes.get(key.role, (0, part.shape[0]))
    if axis >= len(part.shape) or part.shape[axis] == size:  # true for an output's bias
        return part
    padding = [0, 0] * (len(part.shape) - 1 - axis) + [0, size - part.shape[axis]]
    shape = [*part.shape[:axis], size, *part.shape[axis + 1 :]]
    return part.then(lambda tensor: functional.pad(tensor, padding), shape)


def joined(parts: Parts, arch: str) -> Parts:
    """Fuse the projections that a graph has only in one tensor.

    Raises
    ------
    ExportError
        If the graph has no place for a tensor.
    """
    tensors = gguf.MODEL_TENSORS[_key(arch)]
    fused = [
        (whole, roles)
        for whole, roles in ((T.ATTN_QKV, _QKV), (T.FFN_UP, _GATE_UP))
        if roles[0] not in tensors
    ]
    result: Parts = {}
    for key, part in parts.items():
        whole, roles = next((f for f in fused if key.role in f[1]), (key.role, (key.role,)))
        if whole not in tensors:
            raise no_place(arch, part.stored_name)
        keys = [replace(key, role=role) for role in roles]
        if key == keys[0] or keys[0] not in parts:
            found = [parts[k] for k in keys if k in parts]
            result[replace(key, role=whole)] = _concatenated(found)
    return result


def _concatenated(parts: Sequence[Part]) -> Part:
    first, *others = parts
    if not others:
        return first
    rows = sum(part.shape[0] for part in parts)
    return Part(
        first.stored_name,
        (rows, *first.shape[1:]),
        lambda: torch.cat([part.read() for part in parts]),
    )
