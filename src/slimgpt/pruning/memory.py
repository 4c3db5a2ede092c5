"""What a run needs of memory and disk, worked out before it begins."""

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
        The residual stream of all calibration samples of this process, and that of the dense model.
    is_mapped : bool
        Whether the stream is in a memory-mapped file, because it is beyond the budget.
    kept : int
        Sublayer activations that may be kept between their two uses.
    working : int
        The largest block with the solver's matrices for it, or what is in memory at other times.
    product : int
        The pruned model.
    """

    stream: int
    is_mapped: bool
    kept: int
    working: int
    product: int

    @property
    def memory(self) -> int:
        """Bytes of memory, beside what the process has taken already."""
        return self.working + self.kept + (0 if self.is_mapped else self.stream)

    @property
    def disk(self) -> int:
        """Bytes of disk: finished blocks, the product made from them, and a mapped stream."""
        return 2 * self.product + (self.stream if self.is_mapped else 0)

    def __str__(self) -> str:
        """One line for the user."""
        place = "in a memory-mapped file" if self.is_mapped else "in memory"
        return (
            f"needs about {size(self.memory)} of memory and {size(self.disk)} of disk; the "
            f"activations ({size(self.stream)}) are {place}"
        )

    def check(self, output: Path, written: int) -> None:
        """Check that the machine has as much.

        Parameters
        ----------
        output : Path
            Where the product will be.
        written : int
            Bytes that an interrupted run has on disk already.

        Raises
        ------
        ConfigError
            With the numbers, if it has not.
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
        Bytes for both together.

    Returns
    -------
    tuple
        Whether the streams go into a mapped file, and how many bytes of activations are kept.
    """
    is_mapped = stream > budget
    return is_mapped, min(widest, budget if is_mapped else budget - stream)


def solver_bytes(num_out: int, num_in: int, num_removed: int, corrects: bool) -> int:
    """Bytes of the solver's matrices for one output projection.

    First H and its inverse (I × I each) with two of the size of the weight (O × I), or seven where
    it is corrected; then the inverse, what the removed columns took from it (I × R), and six of
    the size of the weight. A weight is in float32 (what is in float64 counts twice), all else in
    float64.
    """
    square, weight = FLOAT64 * num_in**2, FLOAT32 * num_out * num_in
    preparing = square + (7 if corrects else 2) * weight
    eliminating = FLOAT64 * num_in * num_removed + 6 * weight
    return square + max(preparing, eliminating)


def refit_bytes(num_params: int, num_kept: int, size: int) -> int:
    """Bytes for the refit of an FFN with so many parameters before and after, of so many bytes.

    The weights as they were are there, and those kept in float32 five times: before, now, their
    gradients and the two moments of Adam; and once for the products.
    """
    return num_params * size + num_kept * (5 * FLOAT32 + size)


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 2**10:.1f} KiB"


def probe_bytes(skeleton: PreTrainedModel, nsamples: int, seqlen: int) -> int:
    """Bytes for the gradients: what enters the blocks; embedding, head and logits."""
    config, num_tokens = skeleton.config, min(seqlen, PROBE_TOKENS)
    states = (config.num_hidden_layers + 3) * len(probe_samples(nsamples)) * num_tokens
    numbers = (states + 2 * config.vocab_size) * config.hidden_size
    logits = 6 * num_tokens * config.vocab_size
    return numbers * skeleton.dtype.itemsize + logits * FLOAT32
