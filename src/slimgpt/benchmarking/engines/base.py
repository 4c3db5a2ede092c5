"""What every engine is: it makes a model ready, then runs it in a process of its own.

That process imports only what the engine itself needs, so that its peak memory is the model's:
methods import what is large.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimgpt.benchmarking.results import Cost
from slimgpt.config import BenchConfig
from slimgpt.runtime.environment import peak_memory

if TYPE_CHECKING:
    from slimgpt.models.source import Source


@dataclass(frozen=True)
class Timing:
    """When the tokens of a batch came.

    Attributes
    ----------
    first : float
        Seconds until every sequence had its first token.
    rest : float
        Seconds from then on until every sequence had its last.
    """

    first: float
    rest: float


@dataclass(frozen=True)
class Subject:
    """A model ready for an engine.

    Attributes
    ----------
    cost : Cost
        What is known before it runs.
    location : str
        What the engine loads.
    vocab_size, context : int
        Numbers of tokens: that it knows, and that it reads at most.
    """

    cost: Cost
    location: str
    vocab_size: int
    context: int


class Engine(ABC):
    """A model in an engine, loaded when it is made; the class methods come before that.

    Attributes
    ----------
    packages : tuple of str
        What it imports; the extra that installs them has the engine's name.
    """

    packages: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def resolve(cls, config: BenchConfig) -> BenchConfig:
        """Check the options, and fill in those that depend on the machine."""
        import torch

        return config.model_copy(update={"threads": config.threads or torch.get_num_threads()})

    @classmethod
    def runs_as_it_is(cls, source: "Source") -> bool:
        """Whether the precision is that of the file that the user has named."""
        return False

    @classmethod
    def prepare(cls, source: "Source", config: BenchConfig, scratch: Path) -> Subject:
        """Make a model ready; what it is converted to may take the name `scratch`."""
        import torch

        from slimgpt.models.family import blocks_of
        from slimgpt.models.loading import build_skeleton, load_config
        from slimgpt.models.weights import weight_files

        model_config = load_config(source)
        skeleton: Any = build_skeleton(model_config)
        size = getattr(torch, config.dtype).itemsize
        head_bytes = skeleton.get_output_embeddings().weight.numel() * size
        block_bytes = sum(p.numel() for p in blocks_of(skeleton).parameters()) * size
        cost = Cost(
            name=source.name,
            dtype=config.dtype,
            disk_bytes=total_size(weight_files(source)),
            step_bytes=block_bytes + head_bytes,
            block_bytes=block_bytes,
            peak_memory_bytes=None,
        )
        context = model_config.max_position_embeddings
        return Subject(cost, source.name, model_config.vocab_size, context)

    @abstractmethod
    def __init__(self, model: str, config: BenchConfig) -> None:
        """Load a model from its location."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """Generate for all prompts at once, greedily and without regard to end-of-text tokens."""

    def peak_memory(self) -> int | None:
        """Bytes of memory that were used at most, here of the process; None where unknown."""
        return peak_memory()

    def close(self) -> None:  # noqa: B027
        """End what would outlive this object."""


def total_size(files: Sequence[Path]) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in files)
