"""Several processes that share the calibration samples, started by ``torchrun``.

Without ``torchrun`` every function does what it must for a single process, mostly nothing. A
message that fails raises a `RunStateError`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slimgpt.errors import ConfigError, RunStateError

# The others wait for the main process to solve a block, or to have the model write its text.
TIME_LIMIT = timedelta(hours=6)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes of the job, if there are any.

    Parameters
    ----------
    device : torch.device
        Asked for by the user.

    Yields
    ------
    torch.device
        That of this process: each one has its own GPU.

    Raises
    ------
    ConfigError
        If there are more processes than GPUs on this machine, or one GPU is asked for.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None or rank >= num_devices:
            raise ConfigError(
                f"process {rank} of this machine cannot have a GPU of its own: --device {device}, "
                f"{num_devices} GPUs",
                hint="use --device cuda and not more processes than GPUs, or --device cpu",
            )
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIME_LIMIT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process decides, writes and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_part(samples: Tensor, batch_size: int) -> Tensor:
    """The samples of this process: whole batches, so that the sums do not depend on the number.

    Raises
    ------
    ConfigError
        If there are fewer batches than processes.
    """
    if not dist.is_initialized():
        return samples
    batches, num_processes = samples.split(batch_size), dist.get_world_size()
    if len(batches) < num_processes:
        raise ConfigError(
            f"{len(samples)} samples make {len(batches)} batches for {num_processes} processes",
            hint="use more --nsamples or fewer processes; a survey has a quarter of the samples, "
            "and with --widths scheduled there is none",
        )
    own = own_batches(len(batches))
    return torch.cat(batches[own.start : own.stop])


def own_batches(num_batches: int) -> range:
    """Which of the batches of all processes this one has."""
    if not dist.is_initialized():
        return range(num_batches)
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    return range(*(num_batches * r // num_processes for r in (rank, rank + 1)))


def add_up(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all processes, in place."""
    if dist.is_initialized():
        with _talking():
            dist.all_reduce(tensor)
    return tensor


def from_main(value: Any) -> Any:
    """Give every process the main one's value; the others pass anything."""
    values = [value]
    if dist.is_initialized():
        with _talking():
            dist.broadcast_object_list(values)
    return values[0]


def tensor_from_main(tensor: Tensor) -> Tensor:
    """Replace a tensor by the main process's, which has the same shape and type, in place."""
    if dist.is_initialized():
        with _talking():
            dist.broadcast(tensor, src=0)
    return tensor


@contextmanager
def training_together() -> Iterator[None]:
    """Name a peer that has ended while a library exchanged gradients.

    Raises
    ------
    RunStateError
        In place of the error of the backend.
    """
    try:
        yield
    except RuntimeError as err:
        is_of_peer = isinstance(err, dist.DistError) or re.search("gloo|nccl", str(err), re.I)
        if not (dist.is_initialized() and is_of_peer):
            raise
        raise _peer_has_ended(err) from err


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:  # gloo has no type of its own
        raise _peer_has_ended(err) from err


def _peer_has_ended(err: Exception) -> RunStateError:
    hours = TIME_LIMIT.total_seconds() / 3600
    return RunStateError(
        f"another process of this job has ended, or has not answered for {hours:g} hours: {err}",
        hint="see its message; the same command goes on where the job stopped",
    )
