"""The machine and the versions that a benchmark ran on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def environment() -> dict[str, object]:
    """Machine, threads and versions, for the JSON that a benchmark writes."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in names if "model name" in line), "")
    return {
        "machine": model or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("slimgpt", "torch", "transformers")},
    }
