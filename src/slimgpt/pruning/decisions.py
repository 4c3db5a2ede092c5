"""The pruning decisions for a block, in the form in which they are saved and reported."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from slimgpt.models.stored import read_tensor
from slimgpt.models.weights import read_metadata
from slimgpt.runtime.files import reading

_UNITS = {"attention": "kv groups", "ffn": "channels"}


@dataclass(frozen=True)
class SublayerPlan:
    """The pruning decision for one sublayer.

    Attributes
    ----------
    kind : str
        ``attention`` or ``ffn``.
    keep : tuple of int
        Units kept: key/value groups or FFN channels, sorted.
    error, relative_error : float
        Mean squared change of the sublayer's output over the calibration tokens, E‖Δy‖², and this
        error divided by E‖y‖². Both are measured before the refit.
    damping : float
        Damping that the Hessian needed; 0 if nothing was removed or no Hessian was factorised.
    errors : tuple of float
        In a sensitivity pass, the error after each of `measured_removals`, damping included.
    refit : float or None
        Error ratio of the refit: squared error after the refit over that before. None without a
        refit.
    """

    kind: str
    keep: tuple[int, ...]
    error: float = 0.0
    relative_error: float = 0.0
    damping: float = 0.0
    errors: tuple[float, ...] = ()
    refit: float | None = None


@dataclass(frozen=True)
class BlockPlan:
    """The pruning decisions for the sublayers of one block."""

    block: int
    sublayers: tuple[SublayerPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, without empty lists of errors."""
        return asdict(self, dict_factory=lambda items: {k: v for k, v in items if v != ()})

    def __str__(self) -> str:
        """Summarise the kept units and the errors for the log."""
        return ", ".join(
            f"{len(plan.keep)} {_UNITS[plan.kind]} kept, error {plan.relative_error:.4f}"
            for plan in self.sublayers
        )


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
