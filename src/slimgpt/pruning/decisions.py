"""What was decided for a block, as it is saved and reported."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from slimgpt.models.stored import read_tensor
from slimgpt.models.weights import read_metadata
from slimgpt.runtime.files import reading

_UNITS = {"attention": "kv groups", "ffn": "channels"}


@dataclass(frozen=True)
class SublayerPlan:
    """What was decided for one sublayer.

    Attributes
    ----------
    kind : str
        ``attention`` or ``ffn``.
    keep : tuple of int
        Units kept: key/value groups or FFN channels, sorted.
    error, relative_error : float
        Mean squared change of the sublayer's output over the calibration tokens, E‖Δy‖², and the
        same over E‖y‖².
    damping : float
        Damping that the Hessian needed; 0 where nothing was removed or solved.
    errors : tuple of float
        In a sensitivity pass, the error after each of `measured_removals`, damping included.
    refit : float or None
        Error ratio of the refit: squared error after over before. None where there was none. The
        other errors are those before.
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
    """What was decided for the sublayers of one block."""

    block: int
    sublayers: tuple[SublayerPlan, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BlockPlan":
        """Invert `to_json`."""
        plans = []
        for given in values["sublayers"]:
            lists = {name: tuple(given[name]) for name in ("keep", "errors") if name in given}
            plans.append(SublayerPlan(**given | lists))
        return cls(values["block"], tuple(plans))

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without empty lists of errors."""
        return asdict(self, dict_factory=lambda items: {k: v for k, v in items if v != ()})

    def __str__(self) -> str:
        """What went and what it cost, in a few words."""
        return ", ".join(
            f"{len(plan.keep)} {_UNITS[plan.kind]} kept, error {plan.relative_error:.4f}"
            for plan in self.sublayers
        )


@dataclass(frozen=True)
class SavedBlock:
    """A pruned block in a file of the run.

    Attributes
    ----------
    plan : BlockPlan
        What was decided.
    read : callable
        Gives the tensors of the pruned block by their names in the model.
    """

    plan: BlockPlan
    read: Callable[[str], Tensor]

    @classmethod
    def open(cls, file: Path) -> "SavedBlock":
        """Open a file that the sequential pass has written.

        Raises
        ------
        DamagedRunError
            If it cannot be read.
        """
        with reading(file):
            plan = BlockPlan.from_json(json.loads(read_metadata(file)["plan"]))
        return cls(plan, partial(read_tensor, file))
