"""The least-squares problem of one output projection: its damped, factorised Hessian."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slimgpt.errors import NumericalError

MIN_DAMPING, MAX_DAMPING = 1e-6, 0.1  # range of the retries after a failed factorisation


class Problem(NamedTuple):
    """The least-squares problem of one layer, ready for elimination.

    Attributes
    ----------
    weight_OI : Tensor
        W after the correction; columns whose input is always zero are zero. In float32, or float64
        if the given weight is; stored by columns.
    inverse_II : Tensor
        (H + D)⁻¹, float64, where H = E[x xᵀ] and D is the damping of each column. Everywhere else
        in this module H stands for the damped matrix.
    added_I : Tensor
        The diagonal of D, float64.
    power : float
        E‖y‖² = tr(W H Wᵀ), from float32 products.
    damping : float
        The damping used, at least the requested one.
    """

    weight_OI: Tensor
    inverse_II: Tensor
    added_I: Tensor
    power: float
    damping: float


def prepare(
    weight_OI: Tensor,
    hessian_II: Tensor,
    damping: float = 0.01,
    mode: Literal["relative", "mean"] = "relative",
    cross_OI: Tensor | None = None,
    correction: float = 0.0,
) -> Problem:
    """Damp and invert the Hessian of a layer, and correct its weight.

    The correction α moves the output toward a target t: W ← (1 − α) W + α W*, where
    W* = (E[t xᵀ] + W D) (H + D)⁻¹ is the least-squares solution for t, and the damping D pulls
    it toward W.

    Parameters
    ----------
    weight_OI : Tensor
        The layer's weight.
    hessian_II : Tensor
        H = E[x xᵀ] over the calibration tokens, symmetric, positive semi-definite.
    damping : float
        λ. While the Cholesky decomposition fails, λ is multiplied by ten, up to 0.1.
    mode : {"relative", "mean"}
        ``relative`` adds λ·H_jj to each diagonal entry, ``mean`` adds λ·mean(diag H).
    cross_OI : Tensor, optional
        E[t xᵀ], float64; without it there is no correction.
    correction : float
        α, from 0 to 1.

    Returns
    -------
    Problem
        The damped problem with the corrected weight.

    Raises
    ------
    NumericalError
        If H is not finite, or no damping up to 0.1 makes it positive definite.
    """
    hessian_II = hessian_II.double()
    if not hessian_II.sum().isfinite():
        num_bad = int((~hessian_II.isfinite()).sum())
        raise NumericalError(
            f"the Hessian has {num_bad} entries that are not finite",
            hint="the model's activations overflow: use --dtype float32 or bfloat16",
        )
    diagonal_I = hessian_II.diagonal().clone()
    dead_I = diagonal_I == 0
    # Stored by columns, because columns are removed.
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_IO = weight_OI.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    weight_OI = weight_IO.masked_fill_(dead_I[:, None], 0).T
    scale_I = diagonal_I if mode == "relative" else diagonal_I.mean().expand_as(diagonal_I)
    used = damping
    while True:
        added_I = used * scale_I + dead_I
        hessian_II.diagonal().add_(added_I)
        # No scaling to unit diagonal: the rounding errors of Cholesky do not depend on it.
        factor_II, failed = torch.linalg.cholesky_ex(hessian_II)
        hessian_II.diagonal().copy_(diagonal_I)
        if not failed:
            # Symmetric and stored by columns, so the rows of its transpose are contiguous.
            inverse_II = torch.cholesky_inverse(factor_II, out=factor_II).mT
            if cross_OI is not None:
                solution_IO = inverse_II @ torch.addcmul(cross_OI, weight_OI, added_I).T
                weight_OI = weight_IO.lerp_(solution_IO.to(dtype), correction).T
            power = output_power(weight_OI, hessian_II)
            return Problem(weight_OI, inverse_II, added_I, power, used)
        if used >= MAX_DAMPING:
            raise NumericalError(
                f"the Hessian is not positive definite, even with a damping of {used:g}",
                hint="use more calibration tokens, or a higher --damping to start from",
            )
        used = min(10 * used or MIN_DAMPING, MAX_DAMPING)


def output_power(weight_OI: Tensor, hessian_II: Tensor, panel_size: int = 512) -> float:
    """E‖y‖² = tr(W H Wᵀ), from float32 products, one panel of rows of H at a time.

    H is symmetric: entries right of a panel's diagonal block count twice, those left of it are
    skipped.
    """
    weight_IO = weight_OI.T.float()
    power = 0.0
    for start in range(0, len(hessian_II), panel_size):
        end = start + panel_size
        hessian_PI = hessian_II[start:end, start:].to(torch.float32, copy=True)
        hessian_PI[:, :panel_size] /= 2
        product_PO = hessian_PI @ weight_IO[start:]
        power += 2 * float(product_PO.mul_(weight_IO[start:end]).sum(dtype=torch.float64))
    return power
