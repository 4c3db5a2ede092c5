"""The memory estimate: bytes of memory and disk that a run needs, known before it starts."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
from transformers import PreTrainedModel

from slimgpt.allocation.reallocation import PROBE_TOKENS, probe_samples
from slimgpt.errors import ConfigError

FLOAT32, FLOAT64 = 4, 8  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run needs at its peak.

    Attributes
    ----------
    stream : int
        Residual stream of this process's calibration samples, and the dense model's if needed.
    is_mapped : bool
        Whether the stream exceeds the budget and therefore lives in a memory-mapped file.
    kept : int
        Sublayer activations that may be kept from calibration to propagation.
    working : int
        The largest block with the solver's matrices, or the peak of another phase if higher.
    result : int
        The pruned model.
    mapped_experts : int
        Weights of the experts of the largest layer, if they exceed the budget and therefore live in
        memory-mapped files.
    """

    stream: int
    is_mapped: bool
    kept: int
    working: int
    result: int
    mapped_experts: int = 0

    @property
    def memory(self) -> int:
        """Bytes of memory, in addition to those already allocated by the process."""
        return self.working + self.kept + (0 if self.is_mapped else self.stream)

    @property
    def disk(self) -> int:
        """Bytes of disk: the finished blocks, the result, and what is mapped, old and new."""
        mapped = (self.stream if self.is_mapped else 0) + 2 * self.mapped_experts
        return 2 * self.result + mapped

    def __str__(self) -> str:
        """Summarise the estimate in one line for the log."""
        place = "in a memory-mapped file" if self.is_mapped else "in memory"
        return (
            f"needs about {size(self.memory)} of memory and {size(self.disk)} of disk; the "
            f"activations ({size(self.stream)}) are {place}"
            + (", the experts of a layer too" if self.mapped_experts else "")
        )

    def check(self, output: Path, written: int) -> None:
        """Check that enough memory and disk are free.

        Parameters
        ----------
        output : Path
            Directory of the result.
        written : int
            Bytes that an interrupted run has already written.

        Raises
        ------
        ConfigError
            If too little is free. The message has both numbers.
        """
        # The processes of torchrun on this machine share its memory.
        memory = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.memory > memory:
            raise ConfigError(
                f"the run needs about {size(self.memory)} of memory, and {size(memory)} are free",
                hint="use a smaller --activation-memory, fewer --nsamples, --widths scheduled "
                "and --calibration without self, or a larger machine",
            )
        disk, needed = shutil.disk_usage(output).free, self.disk - written
        if needed > disk:
            raise ConfigError(
                f"the run needs about {size(needed)} of disk, and {size(disk)} are free "
                f"at {output}",
                hint="free some space, or choose another --output",
            )


def divide_memory(stream: int, widest: int, budget: int) -> tuple[bool, int]:
    """Divide the budget for activations.

    Parameters
    ----------
    stream, widest : int
        Bytes of the residual streams, and of the largest input of an output projection.
    budget : int
        Bytes for streams and activations together.

    Returns
    -------
    tuple
        Whether the streams go into a mapped file, and the bytes of activations to keep.
    """
    is_mapped = stream > budget
    return is_mapped, min(widest, budget if is_mapped else budget - stream)


def solver_bytes(
    num_out: int, num_in: int, num_removed: int, corrects: bool, has_bias: bool
) -> int:
    """Bytes of the solver's matrices for one output projection.

    `prepare` holds H and its inverse (I × I each) and two matrices of the weight's size (O × I),
    seven with correction. If the projection has a bias, it also holds the centred form of H, and
    that of E[t xᵀ] with correction. The elimination holds the inverse, the Cholesky rows of the
    removed columns (I × R) and six matrices of the weight's size. Weights are counted in float32 (a
    float64 copy counts twice), all other matrices in float64.
    """
    square, weight = FLOAT64 * num_in**2, FLOAT32 * num_out * num_in
    preparing = square + (7 if corrects else 2) * weight
    if has_bias:
        preparing += square + (2 * weight if corrects else 0)
    eliminating = FLOAT64 * num_in * num_removed + 6 * weight
    return square + max(preparing, eliminating)


def refit_bytes(num_params: int, num_kept: int, size: int) -> int:
    """Bytes for the refit of one FFN.

    The dense weights stay in memory. The kept weights are there in float32 five times (start value,
    current value, gradient, the two moments of Adam) and once in the dtype of the matrix products.

    Parameters
    ----------
    num_params, num_kept : int
        Parameters of the dense and of the pruned FFN.
    size : int
        Bytes of a parameter.
    """
    return num_params * size + num_kept * (5 * FLOAT32 + size)


def size(num_bytes: float) -> str:
    """Format a number of bytes in KiB, MiB or GiB."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 2**10:.1f} KiB"


def probe_bytes(skeleton: PreTrainedModel, nsamples: int, seqlen: int) -> int:
    """Bytes for the gradient pass: inputs of all blocks, embedding, head and logits."""
    config, num_tokens = skeleton.config.get_text_config(), min(seqlen, PROBE_TOKENS)
    states = (config.num_hidden_layers + 3) * len(probe_samples(nsamples)) * num_tokens
    numbers = (states + 2 * config.vocab_size) * config.hidden_size
    logits = 6 * num_tokens * config.vocab_size
    return numbers * skeleton.dtype.itemsize + logits * FLOAT32
