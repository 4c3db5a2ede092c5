"""Predict the size of the GGUF file of a model that does not exist yet."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from gguf import MODEL_TENSOR as T
from transformers import PreTrainedConfig

from slimgpt.errors import ExportError
from slimgpt.exporting.gguf import Layout, lay_out, start_file
from slimgpt.exporting.gguf_graphs import model_type_of
from slimgpt.exporting.gguf_parts import head_dim_of
from slimgpt.models.layout import check_causal
from slimgpt.models.loading import build_skeleton
from slimgpt.models.source import EMBEDDED_MODELS, Source
from slimgpt.models.stored import StoredTensor
from slimgpt.models.weights import Weights, saved_tensors

_QUERIES = (T.ATTN_Q, T.ATTN_OUT)
_KEYS = (T.ATTN_K, T.ATTN_V)
_FFN = (T.FFN_GATE, T.FFN_UP, T.FFN_DOWN)

NAME_BYTES = 255  # of the name of the file's model, at most


@dataclass(frozen=True)
class LayerBytes:
    """What the units of a layer take: bytes for each `step` of them, begun ones included.

    Units of attention are key/value groups; query heads if they all share one.
    """

    attention: int
    attention_step: int
    ffn: int
    ffn_step: int


@dataclass(frozen=True)
class GgufSize:
    """Size of a file at most, and the parts of it that shrink with the units of its layers."""

    num_bytes: int
    layers: list[LayerBytes]


def gguf_size(source: Source, config: PreTrainedConfig, type_name: str) -> GgufSize:
    """Predict the size of a file without reading any weights.

    The file's metadata are written, for their size, to a temporary file.

    Parameters
    ----------
    source : Source
        The model with the tokenizer, dense or pruned.
    config : PreTrainedConfig
        The config whose tensors are written.
    type_name : {"f32", "f16", "bf16", "q8_0"}
        Type of the matrices.

    Raises
    ------
    ExportError
        If llama.cpp has no graph for the model, or its size cannot be predicted.
    """
    check_causal(source.name, config)
    if source.gguf_file and source.name not in EMBEDDED_MODELS:
        raise ExportError(
            f"{source.name} is a GGUF file, and the tokenizer of a file made from it may differ, "
            "so the size of that file cannot be predicted",
            hint="ask for --target-params, or for --target-size without --target-type",
        )
    skeleton: Any = build_skeleton(config)
    tensors = {
        name: StoredTensor(partial(torch.zeros, tensor.shape), tuple(tensor.shape), "F32")
        for name, tensor in saved_tensors(skeleton).items()
    }
    weights = Weights(source, tensors, torch.float32, ())
    layout = lay_out(model_type_of(config.model_type), skeleton, weights, type_name)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        start_file(source, layout, weights, file).close()
        header = file.stat().st_size + NAME_BYTES
    align = gguf.GGUF_DEFAULT_ALIGNMENT
    values = sum(layout.num_bytes(*item) for item in layout.joined.items())
    return GgufSize(
        header + values + align * (1 + len(layout.joined)),
        [_layer_bytes(layout, index) for index in range(len(layout.layers))],
    )


def _layer_bytes(layout: Layout, index: int) -> LayerBytes:
    """What the units of a layer take; so many of them fill whole blocks."""
    layer, head_dim = layout.layers[index], head_dim_of(layout.config)
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[layout.type_name.upper()]][0]
    found = {
        roles: sum(
            layout.num_bytes(key, part)
            for key, part in layout.parts.items()
            # An output projection's bias does not shrink.
            if key.layer == index
            and key.role in roles
            and (key.suffix == ".weight" or key.role not in (T.ATTN_OUT, T.FFN_DOWN))
        )
        for roles in (_QUERIES, _KEYS, _FFN)
    }
    ffn = found[_FFN] // layer.channels * block
    if layer.kv_heads == 1 < layer.heads:  # the units are query heads, and their padding varies
        if head_dim % block:
            raise ExportError(
                f"heads of {head_dim} columns that share one kv head do not fill blocks of "
                f"{block}, so the size of a {layout.type_name} file cannot be predicted",
                hint="choose --target-type f16",
            )
        return LayerBytes(found[_QUERIES] // layer.heads, 1, ffn, block)
    step = block // math.gcd(block, layer.heads // layer.kv_heads * head_dim)
    both = found[_QUERIES] + found[_KEYS]
    return LayerBytes(both // layer.kv_heads * step, step, ffn, block)
