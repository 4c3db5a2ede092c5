"""The base class of engines: an engine prepares a model, then runs it in its own process.

That process imports only the engine's own packages, so that its peak memory is the model's.
Large packages are therefore imported inside methods.
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
    """Times at which the tokens of a batch were ready.

    Attributes
    ----------
    first : float
        Seconds until every sequence had its first token.
    rest : float
        Further seconds until every sequence had its last token.
    """

    first: float
    rest: float


@dataclass(frozen=True)
class Subject:
    """A model prepared for an engine.

    Attributes
    ----------
    cost : Cost
        Cost of the model, without the peak memory.
    location : str
        File or directory that the engine loads.
    vocab_size, context : int
        Size of the vocabulary, and context length in tokens.
    """

    cost: Cost
    location: str
    vocab_size: int
    context: int


class Engine(ABC):
    """A model loaded in an engine. The class methods prepare the model before it is loaded.

    Attributes
    ----------
    packages : tuple of str
        Packages that the engine needs. The extra that installs them has the engine's name.
    """

    packages: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def resolve(cls, config: BenchConfig) -> BenchConfig:
        """Check the options, and fill in those that depend on the machine."""
        import torch

        return config.model_copy(update={"threads": config.threads or torch.get_num_threads()})

    @classmethod
    def runs_as_it_is(cls, source: "Source") -> bool:
        """Whether the engine runs the user's file directly, in the file's precision."""
        return False

    @classmethod
    def prepare(cls, source: "Source", config: BenchConfig, scratch: Path) -> Subject:
        """Prepare a model; a converted file may be written to `scratch`."""
        import torch

        from slimgpt.models.blocks import blocks_of
        from slimgpt.models.layout import check_language_head
        from slimgpt.models.loading import build_skeleton, load_config
        from slimgpt.models.weights import weight_files

        model_config = load_config(source)
        check_language_head(source.name, model_config)
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
        text = model_config.get_text_config()
        return Subject(cost, source.name, text.vocab_size, text.max_position_embeddings)

    @abstractmethod
    def __init__(self, model: str, config: BenchConfig) -> None:
        """Load a model from its location."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """Generate greedily for all prompts at once, ignoring end-of-text tokens."""

    def peak_memory(self) -> int | None:
        """Peak memory in bytes, by default of the process; None if unknown."""
        return peak_memory()

    def close(self) -> None:  # noqa: B027
        """Stop processes that would outlive this object."""


def total_size(files: Sequence[Path]) -> int:
    """Total size of the files in bytes."""
    return sum(file.stat().st_size for file in files)
