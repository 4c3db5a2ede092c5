"""Results of a benchmark."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Spread of a quantity over the rounds.

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
        """Compute the spread of the rounds' values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """Speed of a model with one batch size and prompt length.

    Attributes
    ----------
    prefill, decode : Spread
        Tokens per second of the whole batch: prompt tokens until the first generated token, and
        generated tokens after the first.
    first_token, token : Spread
        Seconds until the first token, and per token after it.
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
        Sequences in a batch, and tokens of each prompt.
    model, base : Speed, Speed or None
        Speeds of the model and of the base.
    prefill_speedup, decode_speedup : Spread or None
        Speed-ups of the model over the base, from pairs of neighbouring measurements.
    """

    batch_size: int
    prompt_length: int
    model: Speed
    base: Speed | None
    prefill_speedup: Spread | None
    decode_speedup: Spread | None


@dataclass(frozen=True)
class Cost:
    """Size and memory of a model.

    Attributes
    ----------
    name : str
        The model, as the user named it.
    dtype : str
        Type of the weights: PyTorch's name, or the types of the matrices in a GGUF file.
    disk_bytes : int
        Size of the files with weights.
    step_bytes : int
        Size of the weights that each decoding step reads: the blocks and the head. They bound the
        decoding speed.
    block_bytes : int
        Size of the weights that each prompt token is multiplied with: the blocks.
    peak_memory_bytes : int or None
        Peak memory of the model's process; None if unknown.
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
        Name of the engine.
    device : str
        Device of the models; ``auto`` if the engine chooses.
    versions : dict
        Versions of the packages used.
    threads : int or None
        CPU threads; None if the engine chooses.
    new_tokens, repeats : int
        Tokens generated for each sequence, and measured rounds.
    costs : tuple of Cost
        Costs of the model, then of the base.
    settings : tuple of Setting
        One for each batch size and prompt length.
    ideal_prefill, ideal_decode : float or None
        Speed-ups if time were proportional to `block_bytes` and `step_bytes` of `Cost`.
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
