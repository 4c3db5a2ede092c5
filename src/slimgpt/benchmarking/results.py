"""What a benchmark has measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A quantity over the rounds.

    Attributes
    ----------
    median, low, high : float
        The median, the smallest and the largest value.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise the values of the rounds."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """How fast a model is with one batch size and prompt length.

    Attributes
    ----------
    prefill, decode : Spread
        Tokens per second over the whole batch: of the prompts until the first token, and of the
        tokens after the first.
    first_token, token : Spread
        Seconds until the first token, and for each one after it.
    """

    prefill: Spread
    decode: Spread
    first_token: Spread
    token: Spread


@dataclass(frozen=True)
class Setting:
    """The measurements with one batch size and prompt length.

    Attributes
    ----------
    batch_size, prompt_length : int
        Sequences at once, and tokens of each prompt.
    model, base : Speed, Speed or None
        Of the two models.
    prefill_speedup, decode_speedup : Spread or None
        Of the model over the base, from pairs of neighbouring rounds.
    """

    batch_size: int
    prompt_length: int
    model: Speed
    base: Speed | None
    prefill_speedup: Spread | None
    decode_speedup: Spread | None


@dataclass(frozen=True)
class Cost:
    """What a model takes up.

    Attributes
    ----------
    name : str
        As the user named it.
    dtype : str
        Type of the weights: PyTorch's name, or those of the matrices in a GGUF file.
    disk_bytes : int
        Files with weights.
    step_bytes : int
        Weights that each step reads: the blocks and the head. Decoding is bound by these.
    block_bytes : int
        Weights that each prompt token is multiplied with: the blocks.
    peak_memory_bytes : int or None
        Largest memory of the process that ran it.
    """

    name: str
    dtype: str
    disk_bytes: int
    step_bytes: int
    block_bytes: int
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class BenchResult:
    """Speeds and costs of a model, and of its base if one was given.

    Attributes
    ----------
    engine : str
        What ran them.
    device : str
        Where they ran; ``auto`` where the engine chooses.
    versions : dict
        Versions of the packages that took part.
    threads : int or None
        CPU threads; None where the engine chooses.
    new_tokens, repeats : int
        Tokens generated for each sequence, rounds that count.
    costs : tuple of Cost
        Of the model, then of the base.
    settings : tuple of Setting
        One for each batch size and prompt length.
    ideal_prefill, ideal_decode : float or None
        Speed-ups if time were proportional to the bytes of the weights that take part.
    """

    engine: str
    device: str
    versions: dict[str, str]
    threads: int | None
    new_tokens: int
    repeats: int
    costs: tuple[Cost, ...]
    settings: tuple[Setting, ...]
    ideal_prefill: float | None
    ideal_decode: float | None
