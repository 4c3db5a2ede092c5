"""Compare a device with the CPU; the CPU itself with products that are rounded otherwise."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")

# For tests that start processes, which takes long.
SLOW_ON_CPU = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.cuda)],
)

Found = TypeVar("Found")


class RoundedOtherwise(TorchDispatchMode):
    """Add noise to matrix products, as large as half a rounding error of their mean magnitude.

    The products of two devices differ less: both sum in float32 or better, and round once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.rstrip("_") in PRODUCTS:
            product: Tensor = result[0] if isinstance(result, tuple) else result
            precise = product.to(torch.promote_types(product.dtype, torch.float32))
            noise = torch.randn(precise.shape, generator=self._generator, dtype=precise.dtype)
            size = torch.finfo(product.dtype).eps / 2 * precise.abs().mean()
            product.copy_(precise + size * noise)
        return result


def on_both(device: torch.device, measure: Callable[[torch.device], Found]) -> tuple[Found, Found]:
    """Measure on the CPU and on the device."""
    cpu = torch.device("cpu")
    expected = measure(cpu)
    with RoundedOtherwise() if device == cpu else nullcontext():
        return expected, measure(device)
