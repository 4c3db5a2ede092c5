"""Distribute the calibration samples over processes started by ``torchrun``.

Without ``torchrun``, every function handles the single process, mostly by doing nothing. Failed
communication raises a `RunStateError`.
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

# How long processes wait while the main process solves a block or generates text.
TIME_LIMIT = timedelta(hours=6)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the process group of the job, if there is one, unless a caller has done so.

    Parameters
    ----------
    device : torch.device
        Requested by the user.

    Yields
    ------
    torch.device
        Device of this process; each process has its own GPU.

    Raises
    ------
    ConfigError
        If this machine has more processes than GPUs, or a GPU index is requested.
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
    if dist.is_initialized():
        yield device
        return
    dist.init_process_group(backend, timeout=TIME_LIMIT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this is the process that decides, writes and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def num_processes() -> int:
    """Count the processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(samples: Tensor, batch_size: int) -> Tensor:
    """Select this process's samples: whole batches, as with a single process.

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
            hint="use more --nsamples or fewer processes; a sensitivity pass has a quarter of the "
            "samples, and --widths scheduled leaves it out",
        )
    own = shard_batches(len(batches))
    return torch.cat(batches[own.start : own.stop])


def shard_batches(num_batches: int) -> range:
    """Range of this process's batches among all batches."""
    if not dist.is_initialized():
        return range(num_batches)
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    return range(*(num_batches * r // num_processes for r in (rank, rank + 1)))


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place (all-reduce)."""
    if dist.is_initialized():
        with _talking():
            dist.all_reduce(tensor)
    return tensor


def broadcast(value: Any) -> Any:
    """Broadcast the main process's value; the argument of the others is ignored."""
    values = [value]
    if dist.is_initialized():
        with _talking():
            dist.broadcast_object_list(values)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Collect the values of all processes, in each of them, in the order of their ranks."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        with _talking():
            dist.all_gather_object(values, value)
    return values


def broadcast_tensor(tensor: Tensor) -> Tensor:
    """Broadcast the main process's tensor, of the same shape and type, in place."""
    if dist.is_initialized():
        with _talking():
            dist.broadcast(tensor, src=0)
    return tensor


@contextmanager
def training_together() -> Iterator[None]:
    """Report a process that ended while a library exchanged gradients.

    Raises
    ------
    RunStateError
        Instead of the backend's error.
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
    except RuntimeError as err:  # gloo has no exception type of its own
        raise _peer_has_ended(err) from err


def _peer_has_ended(err: Exception) -> RunStateError:
    hours = TIME_LIMIT.total_seconds() / 3600
    return RunStateError(
        f"another process of this job has ended, or has not answered for {hours:g} hours: {err}",
        hint="see its message; the same command resumes where the job stopped",
    )
