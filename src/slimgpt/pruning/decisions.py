"""What was decided for a block, as it is saved and reported."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SublayerPlan:
    """What was decided for one sublayer.

    Attributes
    ----------
    keep : tuple of int
        Units kept: key/value groups or FFN channels, sorted.
    error, relative_error : float
        Mean squared change of the sublayer's output over the calibration tokens, E‖Δy‖², and the
        same over E‖y‖².
    damping : float
        Damping that the Hessian needed; 0 where nothing was removed or solved.
    errors : tuple of float
        In a survey, the error after each of `surveyed_removals`, damping included.
    refit : float or None
        What `slimgpt.pruning.refit.refit` made of the squared error; None where there was none.
        The other errors are those before.
    """

    keep: tuple[int, ...]
    error: float
    relative_error: float
    damping: float
    errors: tuple[float, ...] = ()
    refit: float | None = None


@dataclass(frozen=True)
class BlockPlan:
    """What was decided for one block."""

    block: int
    attention: SublayerPlan
    ffn: SublayerPlan

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BlockPlan":
        """Invert `dataclasses.asdict` and a way through JSON."""
        plans = {}
        for kind in ("attention", "ffn"):
            given = values[kind]
            lists = {name: tuple(given[name]) for name in ("keep", "errors") if name in given}
            plans[kind] = SublayerPlan(**given | lists)
        return cls(block=values["block"], **plans)

    def __str__(self) -> str:
        """What went and what it cost, in a few words."""
        return ", ".join(
            f"{len(plan.keep)} {units} kept, error {plan.relative_error:.4f}"
            for plan, units in ((self.attention, "kv groups"), (self.ffn, "channels"))
        )
