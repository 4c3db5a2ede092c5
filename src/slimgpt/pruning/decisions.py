"""The pruning decisions for a block, in the form in which they are saved and reported."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from slimgpt.allocation.shapes import BlockShape, Width
from slimgpt.models.stored import read_tensor
from slimgpt.models.units import Kept
from slimgpt.models.weights import read_metadata
from slimgpt.runtime.files import reading

_UNITS = {"attention": "kv groups", "ffn": "channels", "experts": "experts"}

_PARTS = {"attention": "query heads", "experts": "channels"}


@dataclass(frozen=True)
class RoutingChange:
    """How the tokens of a sublayer with experts are routed after pruning.

    Attributes
    ----------
    rerouted : float
        Fraction of the choices of an expert for a token that fell on experts that are gone.
    load_shift : float
        Total variation distance, 0 to 1, between the loads of the kept experts before and after.
    few_tokens : tuple of int
        Experts with fewer calibration tokens than twice their channels. Their statistics lean on
        those of other tokens.
    samples_factor : float
        With so many times the samples, each of them that had tokens would have had enough.
    """

    rerouted: float
    load_shift: float
    samples_factor: float = 1.0
    few_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class SublayerPlan:
    """The pruning decision for one sublayer.

    Attributes
    ----------
    kind : str
        ``attention``, ``ffn`` or ``experts``.
    keep : tuple of int
        Units kept: key/value groups, FFN channels or experts, sorted. None if the sublayer is
        gone; unless its block is dropped, its first unit is then written, with zeros.
    error, relative_error : float
        Mean squared change of the sublayer's output over the calibration tokens, E‖Δy‖², and this
        error divided by E‖y‖². Both are measured before the refit.
    damping : float
        Damping that the Hessian needed; 0 if nothing was removed or no Hessian was factorised.
    parts : tuple of int
        Query heads kept, sorted, if the groups lose query heads too; channels kept, counted through
        all experts, if the experts lose channels. Else empty.
    curve : tuple
        In a sensitivity pass, smaller and smaller widths with the error at each, damping included.
    refit : float or None
        Error ratio of the refit: squared error after the refit over that before. None without a
        refit.
    routing : RoutingChange or None
        Of a sublayer with experts.
    replaces : tuple of int
        The dropped blocks whose output this sublayer was fitted to add.
    """

    kind: str
    keep: tuple[int, ...]
    error: float = 0.0
    relative_error: float = 0.0
    damping: float = 0.0
    parts: tuple[int, ...] = ()
    curve: tuple[tuple[Width, float], ...] = ()
    refit: float | None = None
    routing: RoutingChange | None = None
    replaces: tuple[int, ...] = ()

    def kept(self, device: torch.device) -> Kept:
        """The units that are written, as tensors."""
        parts = torch.tensor(self.parts, device=device) if self.parts else None
        return Kept(torch.tensor(self.keep or (0,), device=device), parts)

    def __str__(self) -> str:
        """Summarise the kept units and the error."""
        parts = f" with {len(self.parts)} {_PARTS[self.kind]}" if self.parts else ""
        patch = f", in place of layers {', '.join(map(str, self.replaces))}" * bool(self.replaces)
        return (
            f"{len(self.keep)} {_UNITS[self.kind]}{parts} kept, error "
            f"{self.relative_error:.4f}{patch}"
        )


@dataclass(frozen=True)
class BlockPlan:
    """The pruning decisions for the sublayers of one block."""

    block: int
    sublayers: tuple[SublayerPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, without empty lists other than those of kept units."""

        def shown(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {key: value for key, value in items if value != () or key == "keep"}

        return asdict(self, dict_factory=shown)

    def __str__(self) -> str:
        """Summarise the kept units and the errors for the log."""
        return ", ".join(map(str, self.sublayers))


def dropped_block(index: int, shape: BlockShape) -> BlockPlan:
    """The decisions for a block that is dropped."""
    gone = (SublayerPlan(sublayer.kind, (), relative_error=1.0) for sublayer in shape.sublayers)
    return BlockPlan(index, tuple(gone))


@dataclass(frozen=True)
class SavedBlock:
    """A pruned block saved in the run directory.

    Attributes
    ----------
    plan : BlockPlan
        The pruning decisions.
    read : callable
        Returns a tensor of the pruned block by its name in the model.
    """

    plan: BlockPlan
    read: Callable[[str], Tensor]

    @classmethod
    def open(cls, file: Path) -> "SavedBlock":
        """Open a file written by the sequential pass.

        Raises
        ------
        DamagedRunError
            If the file cannot be read.
        """
        with reading(file):
            plan = TypeAdapter(BlockPlan).validate_json(read_metadata(file)["plan"])
        return cls(plan, partial(read_tensor, file))
