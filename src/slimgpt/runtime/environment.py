"""Versions, machine and peak memory, for reports and the identity of a run."""

import ctypes
import gc
import os
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Stopwatch:
    """Seconds that the phases of a run take, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """Count the time since the last phase for this one."""
        now = time.monotonic()
        self.seconds[phase], self._last = round(now - self._last, 3), now


def computation() -> dict[str, Any]:
    """Collect the settings that affect rounding on the CPU."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    }


def versions(*packages: str) -> dict[str, str]:
    """Collect the versions of Python, the core packages, and the given packages."""
    packages = ("slimgpt", "torch", "transformers", "safetensors", *packages)
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes; None on Windows."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # where ru_maxrss is inherited from the parent process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory() -> int:
    """Return the bytes of memory that are free for this process, also within its cgroup's limit."""
    import psutil

    within = free_within_cgroups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return min(psutil.virtual_memory().available, *within)


def free_within_cgroups(root: Path, membership: Path) -> list[int]:
    """Bytes until the limit of each cgroup that a process is in, where there is a limit.

    The page cache that the kernel would give up first (inactive files) counts as free. In a
    container the named cgroup may not be visible; then its root is the container's.

    Parameters
    ----------
    root : Path
        Where the cgroup file system is mounted.
    membership : Path
        ``/proc/PID/cgroup``, of version 1 or 2.
    """
    found = []
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = top / path.strip("/")
        outer = [directory for directory in inner.parents if directory.is_relative_to(top)]
        limits = [_free_within(directory, *names) for directory in (inner, *outer)]
        found += [free for free in limits if free is not None]
    return found


def _free_within(directory: Path, limit_name: str, used_name: str, cache_name: str) -> int | None:
    try:
        limit, used, stat = (
            (directory / name).read_text(encoding="utf-8")
            for name in (limit_name, used_name, "memory.stat")
        )
    except OSError:  # the root of version 2 has none of these
        return None
    if limit.strip() == "max":
        return None
    cache = dict(line.split() for line in stat.splitlines()).get(cache_name, "0")
    return max(int(limit) - int(used) + int(cache), 0)


def trim_heap() -> None:
    """Return freed memory to the system; glibc would keep it in a fragmented heap."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def free_memory() -> None:
    """Return the memory of objects that are no longer used, of the host and of a GPU."""
    import torch

    gc.collect()
    trim_heap()
    torch.cuda.empty_cache()


def reset_peak_memory() -> bool:
    """Reset `peak_memory`; return False if the system cannot (all but Linux)."""
    gc.collect()
    trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def machine() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())
