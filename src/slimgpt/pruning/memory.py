"""The memory estimate: bytes of memory and disk that a run needs, known before it starts."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from slimgpt.allocation.reallocation import PROBE_TOKENS, probe_samples
from slimgpt.errors import ConfigError
from slimgpt.runtime.environment import available_memory

FLOAT32, FLOAT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Activations:
    """Where the activations are.

    Attributes
    ----------
    kept : int
        Bytes of sublayer activations that may be kept from calibration to propagation. They are on
        the device of the block.
    is_mapped : bool
        Whether the residual streams are in a memory-mapped file.
    on_gpu : bool
        Whether they are in the memory of the GPU.
    """

    kept: int
    is_mapped: bool = False
    on_gpu: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run needs at its peak.

    Attributes
    ----------
    stream : int
        Residual stream of this process's calibration samples, and the dense model's if needed.
    activations : Activations
        Where the stream is, and how much of the activations of a sublayer is kept.
    working : int
        The largest block, on a GPU also the next one, with the solver's matrices; or the peak of
        another phase if higher.
    result : int
        The pruned model.
    device : torch.device
        Device of the block. `working` and the kept activations are in its memory.
    beside : int
        Bytes of host memory that a GPU needs: a block that is read ahead, or the peak of a phase
        on the host.
    mapped_experts : int
        Weights of the experts of the largest layer, if they exceed the budget and therefore live in
        memory-mapped files.
    """

    stream: int
    activations: Activations
    working: int
    result: int
    device: torch.device
    beside: int
    mapped_experts: int = 0

    @property
    def is_mapped(self) -> bool:
        """Whether the stream is in a memory-mapped file."""
        return self.activations.is_mapped

    @property
    def memory(self) -> int:
        """Bytes of host memory, in addition to those already allocated by the process."""
        is_elsewhere = self.activations.is_mapped or self.activations.on_gpu
        stream = 0 if is_elsewhere else self.stream
        if self.device.type == "cuda":
            return self.beside + stream
        return self.working + self.activations.kept + stream

    @property
    def gpu_memory(self) -> int:
        """Bytes of GPU memory."""
        if self.device.type != "cuda":
            return 0
        stream = self.stream if self.activations.on_gpu else 0
        return self.working + self.activations.kept + stream

    @property
    def disk(self) -> int:
        """Bytes of disk: the finished blocks, the result, and what is mapped, old and new."""
        mapped = (self.stream if self.is_mapped else 0) + 2 * self.mapped_experts
        return 2 * self.result + mapped

    def __str__(self) -> str:
        """Summarise the estimate in one line for the log."""
        place = "in a memory-mapped file" if self.is_mapped else "in memory"
        on_gpu = ""
        if self.device.type == "cuda":
            on_gpu = f"{size(self.gpu_memory)} of GPU memory, "
            place = "in GPU memory" if self.activations.on_gpu else place
        return (
            f"needs about {on_gpu}{size(self.memory)} of memory and {size(self.disk)} of disk; the "
            f"activations ({size(self.stream)}) are {place}"
            + (", the experts of a layer too" if self.mapped_experts else "")
        )

    def check(self, output: Path, written: int) -> None:
        """Check that enough memory, on the GPU too, and disk are free.

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
        if self.device.type == "cuda":
            self._check_gpu()
        # The processes of torchrun on this machine share its memory.
        memory = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
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

    def _check_gpu(self) -> None:
        free, total = free_gpu_memory(self.device)
        if self.gpu_memory > free:
            raise ConfigError(
                f"the run needs about {size(self.gpu_memory)} of GPU memory, of which "
                f"{size(self.working)} for the largest block, the next one and the solver's "
                f"matrices, or another phase, and {size(free)} of {size(total)} are free on "
                f"{self.device}",
                hint="use a GPU with more memory or --device cpu; --widths scheduled, "
                "--refit-epochs 0 and --calibration without self need less",
            )


def place_activations(
    stream: int, widest: int, budget: int, gpu_room: int | None = None
) -> Activations:
    """Divide the budget for activations.

    Parameters
    ----------
    stream, widest : int
        Bytes of the residual streams, and of the largest input of an output projection.
    budget : int
        Bytes for streams and activations together. On a GPU they may also take half of the room.
    gpu_room : int, optional
        Bytes of the GPU's memory that nothing else needs; none without a GPU.
    """
    if gpu_room is None:
        is_mapped = stream > budget
        return Activations(min(widest, budget if is_mapped else budget - stream), is_mapped)
    room = max(gpu_room, 0)
    within = min(max(budget, room // 2), room)
    if stream <= within:
        return Activations(min(widest, within - stream), on_gpu=True)
    is_mapped = stream > budget
    left = within if is_mapped else min(within, budget - stream)
    return Activations(min(widest, left), is_mapped)


def free_gpu_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU's memory: free, with what torch has reserved and does not use; all of it.

    Raises
    ------
    ConfigError
        If the GPU cannot be used.
    """
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as err:  # another process has it for itself, or PyTorch does not know it
        raise ConfigError(
            f"the GPU {device} cannot be used: {str(err).partition(chr(10))[0]}",
            hint="see what `nvidia-smi` says about it; use another --device cuda:N or --device cpu",
        ) from err
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused, total


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
