"""Write a checkpoint as a GGUF file, for llama.cpp and tools built on it.

Tensors are read and written one at a time. The model is never run.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf import MODEL_TENSOR as T
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig

from slimgpt.errors import ExportError
from slimgpt.exporting.gguf_tokenizer import add_tokenizer
from slimgpt.models.family import PRUNED_PREFIX, family_of
from slimgpt.models.gguf_reading import ROPE_FACTORS, STATIC_ROPE, rope_factors
from slimgpt.models.layout import check_causal
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import Source
from slimgpt.models.weights import Weights, open_weights

log = logging.getLogger(__name__)

# llama.cpp's graph for each model type, if all layers have the same widths.
_ARCHS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# The only llama.cpp graph for layers of different widths: llama's with widths as arrays.
PER_LAYER_ARCH = "deci"

# Graphs whose loader requires a square q_proj. Llama's does not, and takes the same tensors.
_SQUARE_ATTENTION = {"qwen2"}

# Graphs that rotate neighbouring rows of q and k; transformers rotates the halves of a head.
_ROTATES_NEIGHBOURS = {"llama", PER_LAYER_ARCH}

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


@dataclass(frozen=True)
class _Widths:
    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: its final shape is known before it is read."""

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.qtype]
        return math.prod(self.shape) // block * size


def write_gguf(source: Source, file: Path, type_name: str) -> str:
    """Write a checkpoint, dense or pruned, as one GGUF file.

    Widths that llama.cpp cannot load are padded with zeros: a layer without channels, and rows that
    do not fill whole blocks of q8_0. Padding does not change the model's outputs.

    Parameters
    ----------
    source : Source
        The checkpoint, from `slimgpt.models.source.find_model`.
    file : Path
        The file to write. It is overwritten; after an error it is incomplete.
    type_name : {"f32", "f16", "bf16", "q8_0"}
        Type of the matrices; vectors are float32.

    Returns
    -------
    str
        Name of llama.cpp's graph: the family's, or ``deci`` if the layers differ.

    Raises
    ------
    ExportError
        If llama.cpp has no graph for the model, or the type cannot represent its values.
    UnsupportedModelError
        If weights are missing, do not have the shape in the config, differ although the config
        ties them, or are not finite.
    """
    config = load_config(source)
    check_causal(source.name, config)
    qtype = GGMLQuantizationType[type_name.upper()]
    weights = open_weights(source, config, "float32")
    layers = _padded_widths(config, gguf.GGML_QUANT_SIZES[qtype][0])
    arch = _find_arch(config, layers, weights)
    weights.check(build_skeleton(config))
    writer = GGUFWriter(file, arch)
    _add_hyperparameters(writer, config, layers)
    writer.add_name(Path(source.name).name)
    writer.add_file_type(_FILE_TYPES[type_name])
    add_tokenizer(writer, source, config)
    tensors = [*_rope_factors(config, arch), *_tensors(config, layers, arch, qtype, weights)]
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.qtype
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_quantise(tensor))
    finally:
        writer.close()
    return arch


def _stored_widths(config: PreTrainedConfig) -> list[_Widths]:
    family = family_of(config.model_type)
    kv_heads, heads = family.widths("attention")
    (channels,) = family.widths("ffn")
    return [
        _Widths(getattr(layer, heads), getattr(layer, kv_heads), getattr(layer, channels))
        for layer in config.per_layer_config
    ]


def _padded_widths(config: PreTrainedConfig, block: int) -> list[_Widths]:
    """Pad the widths for llama.cpp: never zero, and rows of output projections in whole blocks."""
    group = config.num_attention_heads // config.num_key_value_heads
    padded = []
    for layer in _stored_widths(config):
        kv_heads = _round_up(layer.kv_heads, block // math.gcd(block, group * _head_dim(config)))
        padded.append(_Widths(kv_heads * group, kv_heads, _round_up(layer.channels, block)))
    return padded


def _round_up(width: int, step: int) -> int:
    return max(math.ceil(width / step), 1) * step


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _find_arch(config: PreTrainedConfig, layers: list[_Widths], weights: Weights) -> str:
    """Choose the graph for this model; raise an error with the reason if there is none."""
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    if model_type not in _ARCHS:
        raise ExportError(
            f"models of type {model_type!r} cannot be written as GGUF",
            hint=f"model types that can: {', '.join(sorted(_ARCHS))}",
        )
    if config.hidden_act != "silu":
        raise ExportError(
            f"llama.cpp computes silu in the FFN, this model {config.hidden_act}",
            hint="this model cannot be written as GGUF: serve the checkpoint itself",
        )
    if len(set(layers)) == 1:
        arch = _ARCHS[model_type]
        is_square = layers[0].heads * _head_dim(config) == config.hidden_size
        return arch if is_square or arch not in _SQUARE_ATTENTION else "llama"
    names = _name_map(PER_LAYER_ARCH, len(layers))
    for name in weights.shapes:
        if name.endswith(".bias") or names.get_name(name, (".weight",)) is None:
            raise ExportError(
                f"the layers differ in width, and llama.cpp's graph for that "
                f"({PER_LAYER_ARCH}) has no place for {name}",
                hint="prune with --uniform: llama.cpp has a graph for that",
            )
    return PER_LAYER_ARCH


def _name_map(arch: str, num_layers: int) -> gguf.TensorNameMap:
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(by_name[arch], num_layers)


def _add_hyperparameters(
    writer: GGUFWriter, config: PreTrainedConfig, layers: list[_Widths]
) -> None:
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if window and window < context:
        log.warning(
            "llama.cpp computes full attention here, which equals the sliding window up to its "
            "%d tokens: the context ends there",
            window,
        )
        context = window
    columns = [list(column) for column in zip(*map(astuple, layers), strict=True)]
    alike = len(set(layers)) == 1
    heads, kv_heads, channels = (column[0] if alike else column for column in columns)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(channels)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _rope_factors(config: PreTrainedConfig, arch: str) -> Iterator[_Tensor]:
    """Factors by which llama.cpp divides the rotary frequencies, for models that scale them."""
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return
    if rope_type not in STATIC_ROPE or arch not in _ROTATES_NEIGHBOURS:
        raise ExportError(
            f"rotary embeddings of type {rope_type!r} cannot be written for the graph {arch}",
            hint=f"types that can, in graphs like llama's: default, {', '.join(STATIC_ROPE)}",
        )
    factors = rope_factors(config)
    yield _Tensor(ROPE_FACTORS, tuple(factors.shape), GGMLQuantizationType.F32, lambda: factors)


def _tensors(
    config: PreTrainedConfig,
    layers: list[_Widths],
    arch: str,
    qtype: GGMLQuantizationType,
    weights: Weights,
) -> Iterator[_Tensor]:
    """The tensors of the checkpoint under llama.cpp's names, padded to their widths."""
    names = _name_map(arch, len(layers))
    block = gguf.GGML_QUANT_SIZES[qtype][0]
    padded_sizes = [_sizes(config, layer) for layer in layers]
    for name, stored_shape in weights.shapes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_type_and_name(name, (".weight", ".bias"))
        if found is None:
            raise ExportError(
                f"llama.cpp's graph {arch} has no place for the tensor {name}",
                hint="this model cannot be written as GGUF: serve the checkpoint itself",
            )
        role, gguf_name = found
        if role == T.ATTN_ROT_EMBD:  # in old checkpoints; follows from the config
            continue
        shape = list(stored_shape)
        index = int(gguf_name.split(".")[1]) if gguf_name.startswith("blk.") else 0
        if role in padded_sizes[index]:
            dim, size = padded_sizes[index][role]
            if dim < len(shape):  # false for the bias of an output projection
                shape[dim] = size
        if len(shape) > 1 and shape[-1] % block:
            raise ExportError(
                f"{name} has rows of {shape[-1]} values, but {qtype.name} has blocks of {block}",
                hint="choose --type f16",
            )
        swap = role in (T.ATTN_Q, T.ATTN_K) and arch in _ROTATES_NEIGHBOURS
        yield _Tensor(
            gguf_name,
            tuple(shape),
            qtype if len(shape) > 1 else GGMLQuantizationType.F32,
            partial(_read, weights, name, shape, _head_dim(config) if swap else None),
        )


def _sizes(config: PreTrainedConfig, layer: _Widths) -> dict[T, tuple[int, int]]:
    """The pruned dimension of each projection of a layer, and its size."""
    head_dim = _head_dim(config)
    queries, keys = layer.heads * head_dim, layer.kv_heads * head_dim
    return {
        T.ATTN_Q: (0, queries),
        T.ATTN_K: (0, keys),
        T.ATTN_V: (0, keys),
        T.ATTN_OUT: (1, queries),
        T.FFN_GATE: (0, layer.channels),
        T.FFN_UP: (0, layer.channels),
        T.FFN_DOWN: (1, layer.channels),
    }


def _read(weights: Weights, name: str, shape: list[int], head_dim: int | None) -> Tensor:
    """Read a tensor, pad it with zeros to its shape, and reorder the rows of each head."""
    tensor = weights.read(name)
    missing = [wanted - size for wanted, size in zip(shape, tensor.shape, strict=True)]
    padding = [amount for size in reversed(missing) for amount in (0, size)]
    tensor = functional.pad(tensor, padding)
    if head_dim is None:
        return tensor
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _quantise(tensor: _Tensor) -> np.ndarray:
    values = tensor.read().numpy()
    largest = np.abs(values).max()
    limit = np.finfo(np.float16).max
    if tensor.qtype == GGMLQuantizationType.F16 and largest > limit:
        raise ExportError(
            f"{tensor.name} has values up to {largest:g}, but those of F16 end at {limit:g}",
            hint="choose --type bf16 or f32",
        )
    return gguf.quants.quantize(values, tensor.qtype)
