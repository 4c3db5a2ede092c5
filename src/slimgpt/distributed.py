"""Several processes that share the calibration samples, started by ``torchrun``.

Without ``torchrun`` every function does what it must for a single process, mostly nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slimgpt.errors import RunStateError


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
    RunStateError
        If a message to the other processes fails while the block runs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except dist.DistError as err:
        raise RunStateError(
            f"process {dist.get_rank()} of {dist.get_world_size()} has lost contact with another "
            f"one, which has ended: {err}",
            hint="see its message; the same command goes on where the job stopped",
        ) from err
    finally:
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process decides, writes and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_part(samples: Tensor) -> Tensor:
    """The samples of this process; every process has an equal number, or one less."""
    if not dist.is_initialized():
        return samples
    return samples.tensor_split(dist.get_world_size())[dist.get_rank()]


def add_up(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_main(value: Any) -> Any:
    """Give every process the main one's value; the others pass anything."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def tensor_from_main(tensor: Tensor) -> Tensor:
    """Replace a tensor by the main process's, which has the same shape and type, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor
