"""The sublayers of a live model, bound to the description of its family."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimgpt.allocation.shapes import SublayerShape, Width
from slimgpt.errors import UnsupportedModelError
from slimgpt.models.family import SublayerSpec
from slimgpt.models.units import Kept, segment_rows, unit_columns


@dataclass(frozen=True)
class Projection:
    """A linear layer of a sublayer: ``nn.Linear``, or ``Conv1D``, whose weight is transposed.

    Attributes
    ----------
    module : nn.Module
        The layer itself.
    """

    module: nn.Module

    @property
    def is_transposed(self) -> bool:
        """Whether the layer stores its weight as (in features, out features)."""
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> Tensor:
        """(out features, in features); changes to it change the layer."""
        return self.oriented(cast(Tensor, self.module.weight))

    @property
    def bias(self) -> Tensor | None:
        """(out features,), if the layer has one."""
        return cast(Tensor | None, self.module.bias)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    def oriented(self, weight: Tensor) -> Tensor:
        """Convert a weight from its form in the layer to (out, in features), or back."""
        return weight.T if self.is_transposed else weight


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
    norm, post_norm : nn.Module or None
        The norms before and after it.
    module : nn.Module
        The sublayer itself.
    counts : mapping of str to int
        Number of units (groups or channels), then of query heads; one unit if it is fixed. With a
        single group, whose keys and values all query heads share, the units are the query heads.
    multiplier : float
        Factor of the output.
    """

    block: int
    name: str
    spec: SublayerSpec
    norm: nn.Module | None
    post_norm: nn.Module | None
    module: nn.Module
    counts: Mapping[str, int]
    multiplier: float

    @property
    def kind(self) -> str:
        """``attention`` or ``ffn``."""
        return self.spec.kind

    @property
    def num_units(self) -> int:
        """Key/value groups or channels; 1 if the sublayer cannot be pruned."""
        return next(iter(self.counts.values()))

    @property
    def num_parts(self) -> int:
        """Query heads of a group, if it can lose some of them; else 1."""
        if self.spec.couples_units:  # the attention of a live module relies on their number
            return 1
        return max(self.counts.get("head", 1) // self.num_units, 1)

    @property
    def weight(self) -> Tensor:
        """The weight of the output projection, as stored: for its device and type."""
        return cast(Tensor, self.output.module.weight)

    @property
    def output(self) -> Projection:
        """The output projection, which loses columns and is compensated by the solver."""
        return projection_of(self.module, self.spec.output)

    @property
    def output_name(self) -> str:
        """Name of the output projection in the model."""
        return f"{self.name}.{self.spec.output}"

    @property
    def inputs(self) -> dict[str, Projection]:
        """The input projections, which lose the matching rows, by name."""
        return {name: projection_of(self.module, name) for name in self.spec.inputs}

    @property
    def unit_size(self) -> int:
        """Number of columns of the output projection per unit."""
        return self.output.in_features // self.num_units

    def num_columns(self, width: Width) -> int:
        """Number of columns of the output projection that so many units keep."""
        if isinstance(width, int):
            return width * self.unit_size
        return math.prod(width) * self.unit_size // self.num_parts

    @property
    def shape(self) -> SublayerShape:
        """The prunable units."""
        params = dict.fromkeys(self.counts, 0)
        for name, (axis, segments) in self._axes().items():
            parameter = self.module.get_parameter(name)
            for kind, rows in segments:
                params[kind] += rows.numel() * parameter.numel() // parameter.shape[axis]
        unit = next(iter(self.counts))
        # A single group keeps its keys and values.
        owned = params[unit] if unit == "head" else sum(params.values())
        parts = self.num_parts
        return SublayerShape(
            self.kind,
            self.num_units,
            owned // self.num_units,
            not self.spec.widths,
            parts,
            params.get("head", 0) // self.counts["head"] if parts > 1 else 0,
        )

    def slices(self, kept: Kept) -> dict[str, tuple[int, Tensor]]:
        """Find what the kept units own of the parameters that shrink.

        Returns
        -------
        dict
            For each of these parameters, by its name in the module: the axis that shrinks, and the
            int64 indices there, sorted.
        """
        units = kept.units.cpu()
        heads = None if kept.parts is None else kept.parts.cpu()

        def owned(kind: str, rows: Tensor) -> Tensor:
            if heads is not None and kind == "head":
                return rows[heads]
            if len(rows) < self.num_units:  # the units share them
                return rows
            return rows.view(self.num_units, -1)[units]

        return {
            name: (axis, torch.cat([owned(*s).flatten() for s in segments]).sort().values)
            for name, (axis, segments) in self._axes().items()
        }

    def kept_output(self, kept: Kept) -> Tensor:
        """The output projection without the columns of removed units."""
        return self.output.weight[:, self.columns(kept)]

    def columns(self, kept: Kept) -> Tensor:
        """Columns of the output projection that belong to the kept units, sorted."""
        if kept.parts is not None:
            return unit_columns(kept.parts, self.unit_size // self.num_parts)
        return unit_columns(kept.units, self.unit_size)

    def rows(self, name: str, number: int) -> list[tuple[str, Tensor]]:
        """What so many rows of an input, or columns of the output, belong to: `segment_rows`."""
        segments = {**self.spec.inputs, **self.spec.vectors}.get(name)
        if not segments:
            segments = ["head" if "head" in self.counts else next(iter(self.counts))]
        is_interleaved = self.spec.interleaved and name in self.spec.inputs
        repeats = self.counts.get("group", 1) if is_interleaved else 1
        return segment_rows(number, segments, self.counts, repeats)

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the norm before the sublayer."""
        return hidden if self.norm is None else self.norm(hidden)

    def forward(self, normed: Tensor, kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """Run the sublayer, without the norms before and after it.

        Parameters
        ----------
        normed : Tensor
            Its input, after the norm.
        kwargs : mapping, optional
            The block's arguments; attention gets those that it takes.
        """
        if self.spec.chain:
            for name in self.spec.chain:
                normed = self.module.get_submodule(name)(normed)
            return normed
        wanted = {}
        if self.kind == "attention" and kwargs:
            names = _parameters_of(type(self.module).forward)
            wanted = {k: v for k, v in kwargs.items() if names is None or k in names}
        result = self.module(normed, **wanted)
        return result[0] if isinstance(result, tuple) else result

    def contribution(self, output: Tensor) -> Tensor:
        """What is added to the residual stream: the output after its norm and multiplier."""
        if self.post_norm is not None:
            output = self.post_norm(output)
        return output if self.multiplier == 1 else output * self.multiplier

    def _axes(self) -> dict[str, tuple[int, list[tuple[str, Tensor]]]]:
        """The parameters on a pruned axis: the axis, and its `segment_rows`."""
        found = {}
        inputs = self._parameters((*self.spec.inputs, *self.spec.vectors))
        output = f"{self.spec.output}.weight"
        for name, parameter in (*inputs, (output, self.module.get_parameter(output))):
            owner = name.rpartition(".")[0]
            is_transposed = isinstance(self.module.get_submodule(owner), Conv1D)
            axis = int(parameter.dim() > 1 and is_transposed != (name == output))
            rows = self.rows(owner, parameter.shape[axis])
            if any(len(owned) >= self.num_units for _, owned in rows):
                found[name] = axis, rows
        return found

    def _parameters(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of the parameters of those modules that exist."""
        for name in modules:
            module = find_module(self.module, [name])
            if module is not None:
                for key, parameter in module.named_parameters(recurse=False):
                    yield f"{name}.{key}", parameter


def find_module(module: nn.Module, names: Iterable[str]) -> nn.Module | None:
    """The first of these submodules that exists."""
    for name in names:
        with suppress(AttributeError):
            return module.get_submodule(name)
    return None


def required_module(module: nn.Module, name: str) -> nn.Module:
    """Find a submodule that the family has; raises `UnsupportedModelError` without it."""
    found = find_module(module, [name])
    if found is None:
        raise UnsupportedModelError(
            f"a block of this model has no {name}, which its family has",
            hint="the config asks for a form of this family that cannot be pruned",
        )
    return found


def projection_of(module: nn.Module, name: str) -> Projection:
    """Find a linear layer; raises `UnsupportedModelError` if it is of another kind."""
    found = required_module(module, name)
    if not isinstance(found, nn.Linear | Conv1D):
        raise UnsupportedModelError(
            f"{name} is a {type(found).__name__}, but only plain linear layers can be pruned",
            hint="prune first, quantise or add adapters afterwards",
        )
    return Projection(found)


@cache
def _parameters_of(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of a function's parameters; None if it takes any name."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)
