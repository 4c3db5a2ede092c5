"""Tables of measured latencies: their file, and its checks."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
)

from slimgpt.allocation.shapes import BlockShape
from slimgpt.config import LENGTH, Phase
from slimgpt.errors import ConfigError
from slimgpt.runtime.files import read_json

HINT = "make it with `slimgpt latency MODEL --output FILE`, of the model that is to be pruned"

Width = Annotated[int, Field(ge=1, le=2**31)]
Seconds = Annotated[float, Field(gt=0, lt=10**6)]


def _is_increasing(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if any(before >= after for (before, _), (after, _) in pairwise(points)):
        raise ValueError("the widths do not increase")
    return points


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SublayerLatency(_Strict):
    """Latency of a sublayer at some widths.

    Attributes
    ----------
    kind : str
        ``attention`` or ``ffn``.
    num_units, unit_params : int
        Units of the dense sublayer, and the parameters of one.
    seconds : tuple of tuple
        Widths, each larger than the one before, and the time of one call at each. The last is
        `num_units`. The share of the block's own overhead is in it.
    """

    kind: Literal["attention", "ffn"]
    num_units: PositiveInt
    unit_params: Annotated[int, Field(ge=0)]
    seconds: Annotated[
        tuple[tuple[Width, Seconds], ...], Field(min_length=1), AfterValidator(_is_increasing)
    ]


class LatencySetting(_Strict):
    """What a latency depends on, beside the model; the batch size is 1.

    Attributes
    ----------
    phase : {"decode", "prefill"}
        Whether it is that of a token after a text, or of the first token.
    context : int
        Tokens before the one that is decoded, or of the prompt.
    dtype, device : str
        Type of the weights, and of the device.
    machine : str
        Name of the processor or GPU.
    threads : int
        CPU threads.
    versions : dict
        Versions of the packages.
    """

    phase: Phase
    context: Annotated[int, Field(ge=1, le=LENGTH)]
    dtype: str
    device: str
    machine: str
    threads: PositiveInt
    versions: dict[str, str]

    @property
    def described(self) -> str:
        """Name of the latency."""
        where = "after" if self.phase == "decode" else "of"
        return f"{self.phase} latency {where} {self.context:,} tokens"


class LatencyTable(_Strict):
    """Latencies of the parts of a model: the content of a table's file.

    Attributes
    ----------
    version : int
        Of this format.
    setting : LatencySetting
        How and where they were measured.
    rest_seconds : float
        Time of everything but the blocks: embedding, head, and the generation loop.
    kinds : tuple of tuple of SublayerLatency
        The sublayers of each kind of block.
    blocks : tuple of int
        Index of each block's kind.
    """

    version: Literal[1] = 1
    setting: LatencySetting
    rest_seconds: Seconds
    kinds: tuple[tuple[SublayerLatency, ...], ...]
    blocks: tuple[Annotated[int, Field(ge=0)], ...]

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a file.

        Raises
        ------
        ConfigError
            If it cannot be read, or does not hold a table. The message names the key.
        """
        try:
            return cls.model_validate(read_json(file))
        except ValidationError as err:
            problem = err.errors(include_url=False)[0]
            key = ".".join(map(str, problem["loc"]))
            raise ConfigError(
                f"{file} is no latency table of this version: {key}: {problem['msg']}",
                hint=HINT,
            ) from None

    def check(self, file: Path, shapes: Sequence[BlockShape]) -> None:
        """Check that the table in a file is of a model with these units.

        Raises
        ------
        ConfigError
            If it is not. The message says what differs.
        """
        if problem := self._difference(shapes):
            raise ConfigError(f"{file} is not of this model: {problem}", hint=HINT)

    def _difference(self, shapes: Sequence[BlockShape]) -> str:
        """What sets the table apart from a model with these units; empty if nothing does."""
        if len(self.blocks) != len(shapes):
            return f"it has {len(self.blocks)} blocks, the model {len(shapes)}"
        for index, (kind, shape) in enumerate(zip(self.blocks, shapes, strict=True)):
            if kind >= len(self.kinds):
                return f"block {index} is of kind {kind}, and there are {len(self.kinds)} kinds"
            found = [(s.kind, s.num_units, s.unit_params) for s in self.kinds[kind]]
            wanted = [(s.kind, s.num_units, s.unit_params) for s in shape.sublayers]
            if found != wanted:
                return f"block {index} has {_described(found)}, in the model {_described(wanted)}"
            for sublayer in self.kinds[kind]:
                if sublayer.seconds[-1][0] != sublayer.num_units:
                    return (
                        f"the last width of {sublayer.kind} in block {index} is "
                        f"{sublayer.seconds[-1][0]:,}, not the {sublayer.num_units:,} of the model"
                    )
        return ""


def _described(sublayers: Sequence[tuple[str, int, int]]) -> str:
    return " and ".join(f"{kind} of {n:,} × {size:,} parameters" for kind, n, size in sublayers)


def cache_directory() -> Path:
    """Where the tables of this machine are kept."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "slimgpt", "latency")
