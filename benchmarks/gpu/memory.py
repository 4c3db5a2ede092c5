"""Peak memory of a measurement: of the GPU as torch and as the driver count it, and of the host."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slimgpt.runtime.environment import peak_memory, reset_peak_memory

SECONDS_BETWEEN_SAMPLES = 0.02


@contextmanager
def watched_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Measure the peaks inside the block; the values are there after it.

    Yields
    ------
    dict
        Bytes: ``torch`` (allocated tensors), ``driver`` (more than before the block, sampled), and
        ``host`` (resident memory of the process).
    """
    peaks: dict[str, int | None] = {}
    reset_peak_memory()
    if device.type != "cuda":
        yield peaks
        peaks["host"] = peak_memory()
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free_before = least = torch.cuda.mem_get_info(device)[0]
    is_over = threading.Event()

    def watch() -> None:
        nonlocal least
        while not is_over.wait(SECONDS_BETWEEN_SAMPLES):
            least = min(least, torch.cuda.mem_get_info(device)[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        is_over.set()
        watcher.join()
    peaks["torch"] = torch.cuda.max_memory_allocated(device)
    peaks["driver"] = free_before - least
    peaks["host"] = peak_memory()
