"""The blocks of a live model, bound to the description of its family."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from slimgpt.allocation.shapes import BlockShape
from slimgpt.models.experts import Experts
from slimgpt.models.family import SublayerSpec
from slimgpt.models.layout import decoder_name, family_in
from slimgpt.models.sublayers import Sublayer, find_module, projection_of, required_module


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
    is_parallel : bool
        Whether all sublayers read the input of the block.
    """

    index: int
    name: str
    module: nn.Module
    sublayers: tuple[Sublayer, ...]
    is_parallel: bool

    @property
    def shape(self) -> BlockShape:
        """The prunable units of all sublayers."""
        return BlockShape(tuple(sublayer.shape for sublayer in self.sublayers))


def decoder_of(model: Any) -> nn.Module:
    """Find the text decoder of a model, which contains the embedding and the blocks."""
    return model.get_submodule(decoder_name(model))


def blocks_of(model: Any) -> nn.ModuleList:
    """List the blocks of a model's text decoder."""
    blocks = decoder_of(model).get_submodule(family_in(model.config).blocks)
    return cast(nn.ModuleList, blocks)


def linears_of(model: Any) -> list[str]:
    """List the linear layers of all sublayers, by their names in the model.

    In a model with experts, those of attention: adapters do not fit experts, whose weights are not
    in linear layers.
    """
    blocks = list(bind(model))
    has_experts = any(isinstance(s, Experts) for block in blocks for s in block.sublayers)
    return [
        f"{sublayer.name}.{name}"
        for block in blocks
        for sublayer in block.sublayers
        if sublayer.kind == "attention" or not has_experts
        for name in (*sublayer.spec.inputs, sublayer.spec.output)
    ]


def bind(model: Any, directory: Path | None = None) -> Iterator[Block]:
    """Bind each block of a model's text decoder to its family, first to last.

    Parameters
    ----------
    model : PreTrainedModel
        A model with its ``config``, dense or pruned.
    directory : Path, optional
        Of a model whose experts are in memory-mapped files: where new ones are made.

    Raises
    ------
    UnsupportedModelError
        If the model's type belongs to no family, or a block lacks a module that it should have.
    """
    config = model.config.get_text_config()
    family, decoder = family_in(config), decoder_name(model)
    multiplier = float(getattr(config, family.multiplier)) if family.multiplier else 1.0
    layers = zip(blocks_of(model), config.per_layer_config, strict=True)
    for index, (module, layer) in enumerate(layers):
        name = f"{decoder}.{family.blocks}.{index}"
        sublayers = tuple(
            (partial(Experts, directory=directory) if spec.kind == "experts" else Sublayer)(
                block=index,
                name=f"{name}.{spec.module}".removesuffix("."),
                spec=spec,
                norm=find_module(module, spec.norm),
                post_norm=find_module(module, spec.post_norm),
                module=required_module(module, spec.module),
                counts=_counts(spec, layer, module),
                multiplier=multiplier,
            )
            for spec in family.layer(config, index)
        )
        yield Block(index, name, module, sublayers, family.is_parallel(config))


def settings_of(module: nn.Module) -> Hashable:
    """What sets a block apart beside its widths and its index: modules, switches and settings."""
    return tuple(
        (name, type(child), key, value)
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if _is_setting(key, value)
    )


def _is_setting(name: str, value: object) -> bool:
    """Whether an attribute switches something, rather than being a width or an index."""
    is_switch = isinstance(value, int) and value in (0, 1) and name != "layer_idx"
    return value is None or is_switch or isinstance(value, str)


def _counts(spec: SublayerSpec, config: Any, module: nn.Module) -> dict[str, int]:
    """Number of units of a sublayer, and of what scales with them."""
    if spec.kind == "experts":
        experts: Any = required_module(module, f"{spec.module}.experts")
        num_experts, _, num_channels = experts.down_proj.shape
        return {"expert": num_experts, "channel": num_channels}
    if "channel" in spec.widths:  # some configs leave the width to the class
        return {
            "channel": projection_of(required_module(module, spec.module), spec.output).in_features
        }
    counts = spec.counts(config) or {"sublayer": 1}
    if counts.get("group") == 1:
        return {"head": counts["head"], "group": 1}
    return counts
