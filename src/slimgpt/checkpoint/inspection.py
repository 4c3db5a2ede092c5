"""Summarise a model: widths and parameters of every block, without loading weights."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from slimgpt.checkpoint.results import REPORT_FILE, PruningReport, read_report
from slimgpt.models.blocks import bind, decoder_of
from slimgpt.models.experts import Experts
from slimgpt.models.layout import is_wrapped
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import find_file, find_model
from slimgpt.models.sublayers import Projection, Sublayer
from slimgpt.presentation import html
from slimgpt.presentation.tables import blocks_table


@dataclass(frozen=True)
class BlockSummary:
    """Widths and parameters of one block; with experts, the channels are those of each expert."""

    num_heads: int
    num_kv_heads: int
    num_channels: int
    num_experts: int
    attention_params: int
    ffn_params: int


@dataclass(frozen=True)
class PruningCost:
    """Time and memory of a pruning run, from ``pruning_report.json``.

    Attributes
    ----------
    seconds : dict
        Seconds by phase.
    peak_memory_bytes : int or None
        Peak memory of the process; None if unknown.
    """

    seconds: dict[str, float]
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class ModelSummary:
    """Widths and parameters of a model.

    Attributes
    ----------
    model, model_type : str
        Name of the model as the user gave it, and its model type.
    head_dim : int
        Columns of ``o_proj`` for each query head.
    blocks : tuple of BlockSummary
        The blocks, first to last.
    params : dict
        Parameters by kind: attention, ffn, norm, embedding, head, and their total. A head that
        shares its weight with the embedding counts as zero. Where the text model is inside another
        one, what surrounds it is ``other``.
    pruning : PruningCost or None
        Cost of the pruning run, for a local pruned model.
    dropped : tuple of int
        Layers of its base that a local pruned model lacks.
    """

    model: str
    model_type: str
    head_dim: int
    blocks: tuple[BlockSummary, ...]
    params: dict[str, int]
    pruning: PruningCost | None
    dropped: tuple[int, ...] = ()

    def _repr_html_(self) -> str:
        counts = ((kind, f"{count:,}") for kind, count in self.params.items())
        header = f"{self.model_type}, {len(self.blocks)} blocks, head_dim {self.head_dim}"
        return html.page(
            html.rows([(self.model, header), *counts]),
            html.table("Widths and parameters of each block", blocks_table(self)),
        )


def inspect(model: str | Path) -> ModelSummary:
    """Summarise a dense or pruned model.

    Parameters
    ----------
    model : str or Path
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.

    Raises
    ------
    SlimGPTError
        If there is no such model, or its family is not supported.
    """
    source = find_model(model)
    config = load_config(source)
    skeleton = build_skeleton(config)
    blocks, head_dim = [], 0
    layers = config.get_text_config().per_layer_config
    for block, layer in zip(bind(skeleton), layers, strict=True):
        attention, ffn = block.sublayers
        is_sparse = isinstance(ffn, Experts)
        num_heads = layer.num_attention_heads
        num_kv_heads = attention.counts.get("group", num_heads)
        head_dim = attention.output.in_features // num_heads
        blocks.append(
            BlockSummary(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                num_channels=ffn.num_parts if is_sparse else ffn.num_units,
                num_experts=ffn.num_units if is_sparse else 0,
                attention_params=_count(attention.module),
                ffn_params=_count(ffn.module)
                if is_sparse
                else sum(_count(layer.module) for layer in _linears(ffn)),
            )
        )
    total = skeleton.num_parameters()
    params = {
        "attention": sum(block.attention_params for block in blocks),
        "ffn": sum(block.ffn_params for block in blocks),
        "embedding": _count(skeleton.get_input_embeddings()),
        "head": total - _count(skeleton.base_model),
    }
    if is_wrapped(config):
        params["other"] = _count(skeleton.base_model) - _count(decoder_of(skeleton))
    params["norm"] = total - sum(params.values())
    params["total"] = total
    cost, dropped = None, ()
    if report := find_file(source, REPORT_FILE):
        values = read_report(report, PruningReport)
        cost = PruningCost(values["seconds"], values["peak_memory_bytes"])
        dropped = tuple(values.get("dropped", ()))
    return ModelSummary(
        source.name, config.model_type, head_dim, tuple(blocks), params, cost, dropped
    )


def _linears(sublayer: Sublayer) -> list[Projection]:
    return [*sublayer.inputs.values(), sublayer.output]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
