"""The device of a model, and the precision of its matrix products there."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimgpt.errors import ConfigError

BFLOAT16_PRODUCTS = ("amx_bf16", "avx512_bf16", "bf16")  # CPU capabilities on x86 and ARM


def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Choose the precision of forward passes: bfloat16 for float32 if the CPU supports it.

    Statistics and solver use higher precision. (torch 2.6 cannot report the CPU's capabilities.)
    """
    has = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    is_slow = device.type == "cpu" and dtype == torch.float32
    return torch.bfloat16 if is_slow and any(map(has.get, BFLOAT16_PRODUCTS)) else dtype


def autocast(weight: Tensor) -> torch.autocast:
    """Compute matrix products with a weight in its `fast_dtype` (autocast)."""
    dtype = fast_dtype(weight.device, weight.dtype)
    return torch.autocast(weight.device.type, dtype, enabled=dtype != weight.dtype)


@contextmanager
def exact_products(batch: Tensor) -> Iterator[None]:
    """Use the fastest units that are exact for float32 products of half-precision activations.

    On a CPU, these are bfloat16 units for bfloat16, whose values have 8 significant bits; on a GPU,
    TF32 units (11 bits) for bfloat16 and float16. Both accumulate in float32. (torch before 2.9 has
    no setting for it.)
    """
    is_half = batch.dtype in (torch.bfloat16, torch.float16)
    matmul: Any = None
    precision = "bf16"
    if batch.device.type == "cuda" and is_half:
        matmul, precision = torch.backends.cuda.matmul, "tf32"
    elif batch.device.type == "cpu" and batch.dtype == torch.bfloat16:
        matmul = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(matmul, "fp32_precision", None)
    if before is None:
        yield
        return
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def repeatable_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Compute attention whose gradients are the same each time, to the bit.

    On a GPU, the fused kernels add them in any order; separate products do not.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def sums_device(device: torch.device) -> torch.device:
    """Device of float64 sums: the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def find_device(name: str) -> torch.device:
    """Resolve the option ``device``.

    Raises
    ------
    ConfigError
        If this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ConfigError(
            f"there is no device {name!r}: {err}", hint="use --device auto or --device cpu"
        ) from None
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    number = available.get(device.type, 0)
    if (device.index or 0) >= number:
        found, hint = f"{number} {device.type.upper()} devices were found", ""
        if device.type == "cuda" and not torch.backends.cuda.is_built():
            found += f", and PyTorch {torch.__version__} is built without CUDA"
            hint = ", or install PyTorch with CUDA (https://pytorch.org)"
        elif device.type == "cuda" and number == 0:
            hint = "; `nvidia-smi` and CUDA_VISIBLE_DEVICES show what this machine offers"
        elif device.type == "cuda":
            hint = f", or cuda:0 to cuda:{number - 1}" if number > 1 else ", or cuda:0"
        raise ConfigError(
            f"device {name!r} is not available: {found}",
            hint=f"use --device auto or --device cpu{hint}",
        )
    return device
