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


def trim_heap() -> None:
    """Return freed memory to the system; glibc would keep it in a fragmented heap."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


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
