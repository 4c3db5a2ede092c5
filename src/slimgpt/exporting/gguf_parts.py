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
_EXPERTS_GATE_UP = (T.FFN_GATE_EXP, T.FFN_UP_EXP)


@dataclass(frozen=True)
class Widths:
    """Widths of a layer.

    Attributes
    ----------
    heads, kv_heads : int
        Query heads, key/value heads.
    channels : int
        Channels of the FFN, or of each expert.
    experts, shared : int
        Experts, and channels of the expert that all tokens use; 0 without any.
    """

    heads: int
    kv_heads: int
    channels: int
    experts: int = 0
    shared: int = 0

    def padded(self, head_dim: int, block: int) -> "Widths":
        """Widths that llama.cpp can load: never zero, output projections with whole blocks."""
        group = self.heads // self.kv_heads
        kv_heads = _round_up(self.kv_heads, block // math.gcd(block, group * head_dim))
        channels = _round_up(self.channels, block)
        shared = _round_up(self.shared, block) if self.shared else 0
        return Widths(kv_heads * group, kv_heads, channels, self.experts, shared)


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
    archs = (_key(arch), _key(model.graph))
    maps = [gguf.get_tensor_name_map(key, config.num_hidden_layers) for key in archs]
    experts = _expert_keys(config)
    parts: Parts = {}
    for name, shape in weights.shapes.items():
        is_head = name == "lm_head.weight" and config.tie_word_embeddings
        if is_head or name.endswith(tuple(model.scalars.values())):
            continue
        key = experts.get(name) or _key_of(name, maps)
        if key is None:
            raise no_place(arch, name)
        if key.role == T.ATTN_ROT_EMBD:  # in old checkpoints; follows from the config
            continue
        part = Part(name, shape, partial(weights.read, name))
        parts[key] = part.then(torch.t, shape[::-1]) if name in transposed else part
    return _taken_apart(parts, config, model.by_group)


def _key_of(name: str, maps: Sequence[gguf.TensorNameMap]) -> Key | None:
    """Find a tensor under the names of the graphs."""
    for names in maps:
        if found := names.get_type_and_name(name, (".weight", ".bias")):
            prefix, index, *_ = found[1].split(".")
            layer = int(index) if prefix == "blk" else None
            return Key(found[0], layer, name[name.rindex(".") :])
    return None


def _expert_keys(config: PreTrainedConfig) -> dict[str, Key]:
    """Name the tensors of experts and routers; gate and up projections still count as one."""
    family, keys = family_of(config.model_type), {}
    for layer in range(config.num_hidden_layers):
        for spec in family.layer(config, layer):
            if spec.kind == "experts":
                module = f"{family.decoder}.{family.blocks}.{layer}.{spec.module}"
                keys[f"{module}.{spec.router}.weight"] = Key(T.FFN_GATE_INP, layer)
                keys[f"{module}.experts.gate_up_proj"] = Key(T.FFN_GATE_EXP, layer)
                keys[f"{module}.experts.down_proj"] = Key(T.FFN_DOWN_EXP, layer)
    return keys


def _taken_apart(parts: Parts, config: PreTrainedConfig, by_group: bool) -> Parts:
    """Split fused projections: queries, keys and values, and gate and up projection."""
    inputs = [spec.inputs for spec in family_of(config.model_type).sublayers]
    gated = {name for modules in inputs for name, s in modules.items() if s == ("channel",) * 2}
    separate: Parts = {}
    for key, part in parts.items():
        if key.role == T.FFN_GATE_EXP:
            for half, role in enumerate(_EXPERTS_GATE_UP):
                separate[replace(key, role=role)] = _half_of_experts(part, half)
            continue
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


def _half_of_experts(part: Part, half: int) -> Part:
    """Select the gate (0) or the up projections (1) of all experts."""
    experts, rows, columns = part.shape
    return part.then(lambda t: t.chunk(2, dim=1)[half], (experts, rows // 2, columns))


def widths_of(parts: Parts, head_dim: int) -> list[Widths]:
    """Read the widths of all layers from the shapes of their tensors."""

    def size(layer: int, role: T, axis: int) -> int:
        part = parts.get(Key(role, layer))
        return part.shape[axis] if part else 0

    return [
        Widths(
            size(layer, T.ATTN_OUT, 1) // head_dim,
            size(layer, T.ATTN_K, 0) // head_dim,
            size(layer, T.FFN_DOWN, 1) or size(layer, T.FFN_DOWN_EXP, 2),
            size(layer, T.FFN_DOWN_EXP, 0),
            size(layer, T.FFN_DOWN_SHEXP, 1),
        )
        for layer in sorted({key.layer for key in parts if key.layer is not None})
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
        T.FFN_GATE_EXP: (1, layer.channels),
        T.FFN_UP_EXP: (1, layer.channels),
        T.FFN_DOWN_EXP: (2, layer.channels),
        T.FFN_GATE_SHEXP: (0, layer.shared),
        T.FFN_UP_SHEXP: (0, layer.shared),
        T.FFN_DOWN_SHEXP: (1, layer.shared),
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
