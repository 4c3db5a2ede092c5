"""Names of the prunable tensors of each model family.

A family is one JSON file in the folder ``families``; a new family needs no code. A block is a list
of sublayers. Each sublayer has a norm, and a module with input projections and one output
projection. Its units (key/value groups or channels) own equal shares of the rows of the input
projections and of the columns of the output projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict
from torch import nn

from slimgpt.allocation.shapes import BlockShape, SublayerShape
from slimgpt.errors import UnsupportedModelError

PRUNED_PREFIX = "slimgpt_"


class SublayerSpec(BaseModel):
    """Names of a sublayer's modules inside its block, and its config keys.

    Attributes
    ----------
    kind : {"attention", "ffn"}
        Kind of sublayer.
    norm, module : str
        The norm before the sublayer, and the sublayer itself.
    inputs, output : tuple of str, str
        Linear layers of the module: pruning removes rows of `inputs` and columns of `output`.
    widths : tuple of str
        Config keys that scale with the units; the first is the number of units.
    bias : str
        Config key that gives these linear layers biases; some model types lack it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["attention", "ffn"]
    norm: str
    module: str
    inputs: tuple[str, ...]
    output: str
    widths: tuple[str, ...]
    bias: str


class Family(BaseModel):
    """The content of a family's JSON file: model types, and the paths of blocks and sublayers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_types: tuple[str, ...]
    decoder: str
    blocks: str
    sublayers: tuple[SublayerSpec, ...]

    @property
    def linears(self) -> list[str]:
        """Names of the linear layers of all sublayers."""
        return [n for spec in self.sublayers for n in (*spec.inputs, spec.output)]

    def sublayer(self, kind: str) -> SublayerSpec:
        """Find the sublayer of a kind."""
        return next(spec for spec in self.sublayers if spec.kind == kind)


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of a live model.

    Attributes
    ----------
    block : int
        Index of the block.
    name : str
        Name of the sublayer's module in the model.
    spec : SublayerSpec
        Names of its modules and config keys.
    norm, module : nn.Module
        The norm before it, and the sublayer itself.
    num_units : int
        Key/value groups or channels.
    """

    block: int
    name: str
    spec: SublayerSpec
    norm: nn.Module
    module: nn.Module
    num_units: int

    @property
    def kind(self) -> str:
        """``attention`` or ``ffn``."""
        return self.spec.kind

    @property
    def output(self) -> nn.Linear:
        """The output projection, which loses columns and is compensated by the solver."""
        return _linear(self.module, self.spec.output)

    @property
    def output_name(self) -> str:
        """Name of the output projection in the model."""
        return f"{self.name}.{self.spec.output}"

    @property
    def inputs(self) -> dict[str, nn.Linear]:
        """The input projections, which lose the matching rows, by name."""
        return {name: _linear(self.module, name) for name in self.spec.inputs}

    @property
    def unit_size(self) -> int:
        """Number of columns of the output projection per unit."""
        return self.output.in_features // self.num_units

    @property
    def shape(self) -> SublayerShape:
        """The prunable units."""
        tensors = [self.output.weight, *(p for m in self.inputs.values() for p in m.parameters())]
        params = sum(tensor.numel() for tensor in tensors)
        return SublayerShape(self.kind, self.num_units, params // self.num_units)


@dataclass(frozen=True)
class Block:
    """A decoder layer of a live model, bound to its family.

    Attributes
    ----------
    index, name : int, str
        Position of the layer, and its name in the model.
    module : nn.Module
        The decoder layer.
    sublayers : tuple of Sublayer
        The sublayers, in the order of computation.
    """

    index: int
    name: str
    module: nn.Module
    sublayers: tuple[Sublayer, ...]

    @property
    def shape(self) -> BlockShape:
        """The prunable units of all sublayers."""
        return BlockShape(tuple(sublayer.shape for sublayer in self.sublayers))


@cache
def load_families() -> dict[str, Family]:
    """Load all families, by model type."""
    texts = (
        path.read_text(encoding="utf-8")
        for path in files("slimgpt.models").joinpath("families").iterdir()
        if path.name.endswith(".json")
    )
    found = [Family.model_validate_json(text) for text in texts]
    return {model_type: family for family in found for model_type in family.model_types}


def family_of(model_type: str) -> Family:
    """Find the family of a model type; pruned types belong to the family of the original type.

    Raises
    ------
    UnsupportedModelError
        If no family has this model type. The hint lists the supported types.
    """
    families = load_families()
    family = families.get(model_type.removeprefix(PRUNED_PREFIX))
    if family is None:
        raise UnsupportedModelError(
            f"models of type {model_type!r} are not supported",
            hint=f"supported model types: {', '.join(sorted(families))}",
        )
    return family


def decoder_of(model: Any) -> nn.Module:
    """Find the decoder of a causal language model, which contains all but the head."""
    return model.get_submodule(family_of(model.config.model_type).decoder)


def blocks_of(model: Any) -> nn.ModuleList:
    """List the blocks of a causal language model."""
    blocks = decoder_of(model).get_submodule(family_of(model.config.model_type).blocks)
    return cast(nn.ModuleList, blocks)


def bind(model: Any) -> Iterator[Block]:
    """Bind each block of a causal language model to its family, first to last.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model with its ``config``, dense or pruned.

    Raises
    ------
    UnsupportedModelError
        If the model's type belongs to no family.
    """
    family = family_of(model.config.model_type)
    layers = zip(blocks_of(model), model.config.per_layer_config, strict=True)
    for index, (module, config) in enumerate(layers):
        name = f"{family.decoder}.{family.blocks}.{index}"
        sublayers = tuple(
            Sublayer(
                block=index,
                name=f"{name}.{spec.module}",
                spec=spec,
                norm=module.get_submodule(spec.norm),
                module=module.get_submodule(spec.module),
                num_units=getattr(config, spec.widths[0]),
            )
            for spec in family.sublayers
        )
        yield Block(index, name, module, sublayers)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    found = module.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(found).__name__}, but only plain linear layers can be pruned",
            hint="prune first, quantise or add adapters afterwards",
        )
    return found
