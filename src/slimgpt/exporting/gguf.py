"""Write a checkpoint as a GGUF file, for llama.cpp and tools built on it.

Tensors are read and written one at a time. The model is never run.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_TENSOR as T
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.errors import ExportError
from slimgpt.exporting.gguf_graphs import NOT_WRITTEN, UNIFORM, ModelType, graph_of, model_type_of
from slimgpt.exporting.gguf_metadata import add_metadata, check_graph
from slimgpt.exporting.gguf_parts import (
    Key,
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


def write_gguf(source: Source, file: Path, type_name: str) -> tuple[str, dict[str, int]]:
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
    dict of str to int
        How many tensors have each type.

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
    model = model_type_of(config.model_type)
    weights, skeleton = open_weights(source, config, "float32"), build_skeleton(config)
    weights.check(skeleton)
    layout = lay_out(model, skeleton, weights, type_name)
    writer = start_file(source, layout, weights, file)
    try:
        for name, part, kind in layout.tensors:
            writer.write_tensor_data(_quantise(name, part, kind))
    finally:
        writer.close()
    return layout.arch, Counter(kind.name.lower() for _, _, kind in layout.tensors)


@dataclass(frozen=True)
class Layout:
    """What a file holds, before any tensor is read.

    Attributes
    ----------
    model : ModelType
        How models of this type are written.
    config : PreTrainedConfig
        Config of the checkpoint.
    type_name : str
        Type of the matrices.
    arch : str
        The graph.
    layers : list of Widths
        Padded widths of the layers.
    parts : dict of Key to Part
        The padded tensors, before those that the graph has in one are joined.
    joined : dict of Key to Part
        The tensors of the file.
    """

    model: ModelType
    config: Any
    type_name: str
    arch: str
    layers: list[Widths]
    parts: Parts
    joined: Parts

    @property
    def tensors(self) -> list[tuple[str, Part, GGMLQuantizationType]]:
        """Name, values and type of each tensor."""
        return [(key.name, part, self.kind(key, part)) for key, part in self.joined.items()]

    def kind(self, key: Key, part: Part) -> GGMLQuantizationType:
        """Type of a tensor in the file: vectors and the weights of routers are float32."""
        is_full = len(part.shape) == 1 or key.role == T.FFN_GATE_INP
        return GGMLQuantizationType["F32" if is_full else self.type_name.upper()]

    def num_bytes(self, key: Key, part: Part) -> int:
        """Bytes of a tensor in the file, without those that fill up to the next one.

        Raises
        ------
        ExportError
            If its rows do not fill whole blocks of the type.
        """
        kind = self.kind(key, part)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if part.shape[-1] % block:
            raise ExportError(
                f"{part.stored_name} has rows of {part.shape[-1]} values, but {kind.name} has "
                f"blocks of {block}",
                hint="choose --type f16",
            )
        return math.prod(part.shape) // block * size


def lay_out(
    model: ModelType, skeleton: PreTrainedModel, weights: Weights, type_name: str
) -> Layout:
    """Find the graph for a checkpoint, and the tensors that it needs; see `write_gguf`."""
    config, size = skeleton.config, head_dim_of(skeleton.config)
    block = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]][0]
    widths = widths_of(find_parts(model, model.graph, skeleton, weights), size)
    layers = [layer.padded(size, block) for layer in widths]
    arch = _find_arch(config, model, layers)
    parts = find_parts(model, arch, skeleton, weights)
    check_graph(config, model, arch, graph_of(arch))
    parts = padded(converted(parts, config, model, arch), layers, size)
    return Layout(model, config, type_name, arch, layers, parts, joined(parts, arch))


def start_file(source: Source, layout: Layout, weights: Weights, file: Path) -> GGUFWriter:
    """Write everything but the values of the tensors; the writer is to be closed."""
    model, config = layout.model, layout.config
    writer = GGUFWriter(file, layout.arch)
    add_metadata(writer, config, model, graph_of(layout.arch), layout.layers)
    _add_scalars(writer, model, weights)
    writer.add_name(Path(source.name).name)
    writer.add_file_type(_FILE_TYPES[layout.type_name])
    add_tokenizer(writer, source, config)
    for key, part in layout.joined.items():
        kind, num_bytes = layout.kind(key, part), layout.num_bytes(key, part)
        writer.add_tensor_info(key.name, part.shape, np.dtype(np.float32), num_bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except BaseException:
        writer.close()
        raise
    return writer


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
