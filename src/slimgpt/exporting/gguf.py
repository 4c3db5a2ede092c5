"""Write a checkpoint as a GGUF file, for llama.cpp and tools built on it.

Tensors are read and written one at a time. The model is never run.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import MODEL_TENSOR as T
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from transformers import PreTrainedConfig

from slimgpt.errors import ExportError
from slimgpt.exporting.gguf_graphs import NOT_WRITTEN, UNIFORM, ModelType, graph_of, model_type_of
from slimgpt.exporting.gguf_metadata import add_metadata, check_graph
from slimgpt.exporting.gguf_parts import (
    Part,
    Parts,
    Widths,
    find_parts,
    head_dim_of,
    joined,
    padded,
    widths_of,
)
from slimgpt.exporting.gguf_tokenizer import add_tokenizer
from slimgpt.exporting.gguf_values import converted
from slimgpt.models.layout import check_causal
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import Source
from slimgpt.models.weights import Weights, open_weights

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


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
        Type of the matrices; vectors and the weights of routers are float32.

    Returns
    -------
    str
        Name of llama.cpp's graph: the family's, or one for layers that differ.

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
    model, size = model_type_of(config.model_type), head_dim_of(config)
    qtype = GGMLQuantizationType[type_name.upper()]
    block = gguf.GGML_QUANT_SIZES[qtype][0]
    weights, skeleton = open_weights(source, config, "float32"), build_skeleton(config)
    weights.check(skeleton)
    widths = widths_of(find_parts(model, model.graph, skeleton, weights), size)
    layers = [layer.padded(size, block) for layer in widths]
    arch = _find_arch(config, model, layers)
    parts = find_parts(model, arch, skeleton, weights)
    graph = graph_of(arch)
    check_graph(config, model, arch, graph)
    writer = GGUFWriter(file, arch)
    add_metadata(writer, config, model, graph, layers)
    _add_scalars(writer, model, weights)
    writer.add_name(Path(source.name).name)
    writer.add_file_type(_FILE_TYPES[type_name])
    add_tokenizer(writer, source, config)
    parts = joined(padded(converted(parts, config, model, arch), layers, size), arch)
    _write_tensors(writer, parts, qtype)
    return arch


def _find_arch(config: PreTrainedConfig, model: ModelType, layers: Sequence[Widths]) -> str:
    """Choose the graph for layers of these widths."""
    is_square = graph_of(model.graph).square and model.fewer_heads is None
    hint = f"{UNIFORM}, with --attention-share 0" if is_square else UNIFORM
    if len(set(layers)) > 1:
        if model.per_layer is None:
            raise ExportError(
                f"the layers differ in width, and llama.cpp's graph {model.graph} has one width "
                "for all",
                hint=hint,
            )
        return model.per_layer
    if layers[0].heads != layers[0].kv_heads and not graph_of(model.graph).grouped:
        raise ExportError(
            f"the {layers[0].heads} query heads share {layers[0].kv_heads} keys and values, and "
            f"llama.cpp's graph {model.graph} has as many of both",
            hint=NOT_WRITTEN,
        )
    columns = layers[0].heads * head_dim_of(config)
    if graph_of(model.graph).square and columns != config.hidden_size:
        if model.fewer_heads is None:
            raise ExportError(
                f"the heads have {columns} columns together, and llama.cpp's graph {model.graph} "
                f"needs as many as the hidden size, {config.hidden_size}",
                hint=hint,
            )
        return model.fewer_heads
    return model.graph


def _add_scalars(writer: GGUFWriter, model: ModelType, weights: Weights) -> None:
    for key, end in model.scalars.items():
        names = [name for name in weights.shapes if name.endswith(end)]
        writer.add_array(key, [weights.read(name).item() for name in names])


def _write_tensors(writer: GGUFWriter, parts: Parts, qtype: GGMLQuantizationType) -> None:
    """Write the file: first everything about the tensors, then one after the other."""
    full = GGMLQuantizationType.F32
    tensors = [
        (key.name, part, full if len(part.shape) == 1 or key.role == T.FFN_GATE_INP else qtype)
        for key, part in parts.items()
    ]
    for name, part, kind in tensors:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if part.shape[-1] % block:
            raise ExportError(
                f"{part.stored_name} has rows of {part.shape[-1]} values, but {kind.name} has "
                f"blocks of {block}",
                hint="choose --type f16",
            )
        num_bytes = math.prod(part.shape) // block * size
        writer.add_tensor_info(name, part.shape, np.dtype(np.float32), num_bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, part, kind in tensors:
            writer.write_tensor_data(_quantise(name, part, kind))
    finally:
        writer.close()


def _quantise(name: str, part: Part, qtype: GGMLQuantizationType) -> np.ndarray:
    values = part.read().contiguous().numpy()
    largest = np.abs(values).max()
    limit = np.finfo(np.float16).max
    if qtype == GGMLQuantizationType.F16 and largest > limit:
        raise ExportError(
            f"{name} has values up to {largest:g}, but those of F16 end at {limit:g}",
            hint="choose --type bf16 or f32",
        )
    return gguf.quants.quantize(values, qtype)
