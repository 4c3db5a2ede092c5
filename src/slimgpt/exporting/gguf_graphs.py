"""What is known about llama.cpp's graphs, and which of them computes a model type.

The content of ``gguf_graphs.json``. A new model type needs a line there, and a test against
llama.cpp itself.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimgpt.errors import ExportError
from slimgpt.models.family import PRUNED_PREFIX

# Which layers do not rotate queries and keys: every n-th, or where there are sliding windows those
# that attend to all tokens.
Unrotated = int | Literal["full"] | None

# A config key and an exponent.
Power = tuple[str, float]

UNIFORM = "llama.cpp has a graph for what is pruned with --uniform"

NOT_WRITTEN = "this model cannot be written as GGUF: serve the checkpoint itself"


class Graph(BaseModel):
    """A graph of llama.cpp.

    Attributes
    ----------
    per_layer : bool
        Whether each layer has widths of its own.
    activations : tuple of str
        transformers' names of the activation that it computes in the FFN.
    square : bool
        Whether the query projection must be square.
    grouped : bool
        Whether query heads can share keys and values.
    neighbours : bool
        Whether it rotates neighbouring rows of queries and keys, not the halves of a head.
    partial : bool
        Whether it can rotate a part of each head.
    unrotated : int, "full" or None
        The layers without rotary embeddings.
    rotary : tuple of str
        Rotary embeddings that it has beside default, linear and yarn ones.
    local_base : bool
        Whether layers with a sliding window have a rotary base of their own.
    growth : bool
        Whether attention can grow with the position.
    window : "optional", "always" or None
        Whether it has sliding windows, in all layers but every n-th.
    large : int or None
        With this number of layers, its scale of attention does not depend on the size of a head.
    tied : bool
        Whether the head is always the embedding.
    output : bool
        Whether the file must have a head, even if it is the embedding.
    biases : tuple of str
        Which projections may have biases.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_layer: bool = False
    activations: tuple[str, ...] = ("silu",)
    square: bool = False
    grouped: bool = True
    neighbours: bool = False
    partial: bool = False
    unrotated: Unrotated = None
    rotary: tuple[Literal["llama3", "longrope"], ...] = ()
    local_base: bool = False
    growth: bool = False
    window: Literal["optional", "always"] | None = None
    large: int | None = None
    tied: bool = False
    output: bool = False
    biases: tuple[Literal["qkv", "output", "ffn"], ...] = ()


class ModelType(BaseModel):
    """How models of a type are written.

    Attributes
    ----------
    graph : str
        The graph for layers of one width.
    per_layer : str or None
        The graph for layers of different widths.
    fewer_heads : str or None
        The graph for layers of one width with a query projection that is not square, if `graph`
        needs a square one.
    neighbours, unrotated
        What the model itself does, see `Graph`.
    norm_offset : float
        What the model adds to the stored weights of its norms.
    by_group : bool
        Whether the rows of a fused projection of queries, keys and values are ordered by group.
    scale : tuple of str and float, or None
        Config key whose power with this exponent is the scale of attention; without it, the scale
        is that of the graphs.
    folded : mapping of str to tuple of str and float
        The same for factors of the outputs of tensors, by role. They change the weights where the
        graph is not that of the model type.
    needs : mapping of str to bool
        Config keys that must be true, or must be false, zero or not given.
    keys : mapping of str to str or float
        Further metadata of the model type's own graph: config keys, or values.
    scalars : mapping of str to str
        Metadata with one value for each layer: the ends of the names of the tensors with them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    graph: str
    per_layer: str | None = None
    fewer_heads: str | None = None
    neighbours: bool = False
    unrotated: Unrotated = None
    norm_offset: float = 0
    by_group: bool = False
    scale: Power | None = None
    folded: Mapping[str, Power] = {}
    needs: Mapping[str, bool] = {}
    keys: Mapping[str, str | float] = {}
    scalars: Mapping[str, str] = {}


class _Table(BaseModel):
    """The content of the file; ``refused`` says what is wrong with the graphs of model types."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    graphs: Mapping[str, Graph]
    models: Mapping[str, ModelType]
    refused: Mapping[str, str]


@cache
def _table() -> _Table:
    text = files("slimgpt.exporting").joinpath("gguf_graphs.json").read_text(encoding="utf-8")
    return _Table.model_validate_json(text)


def graphs_by_model_type() -> dict[str, str]:
    """Name the graphs of every model type: for layers of one width, and for layers that differ."""
    return {
        name: model.graph + (f", {model.per_layer} per layer" if model.per_layer else "")
        for name, model in _table().models.items()
    }


def graph_of(arch: str) -> Graph:
    """Describe the graph with this name."""
    return _table().graphs[arch]


def model_type_of(model_type: str) -> ModelType:
    """Say how models of a type are written; raise ExportError if they are not."""
    models, refused = _table().models, _table().refused
    name = model_type.removeprefix(PRUNED_PREFIX)
    if name in refused:
        raise ExportError(
            f"models of type {name!r} cannot be written as GGUF: {refused[name]}", hint=NOT_WRITTEN
        )
    if name not in models:
        raise ExportError(
            f"models of type {name!r} cannot be written as GGUF",
            hint=f"model types that can: {', '.join(sorted(models))}",
        )
    return models[name]


def no_place(arch: str, name: str) -> ExportError:
    """Build the error for a tensor that a graph does not have."""
    if graph_of(arch).per_layer:
        return ExportError(
            f"the layers differ in width, and llama.cpp's graph for that ({arch}) has no place for "
            f"{name}",
            hint=UNIFORM,
        )
    return ExportError(
        f"llama.cpp's graph {arch} has no place for the tensor {name}", hint=NOT_WRITTEN
    )
