"""The least-squares problem of one output projection: its damped, factorised Hessian."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slimgpt.errors import NumericalError

MIN_DAMPING, MAX_DAMPING = 1e-6, 0.1  # range of the retries after a failed factorisation

# Smallest variance of an input, relative to its mean square. Rounding of the sums is far below.
MIN_VARIANCE = 1e-3


class Damping(NamedTuple):
    """Damping of a Hessian.

    Attributes
    ----------
    factor : float
        λ. While the Cholesky decomposition fails, λ is multiplied by ten, up to 0.1.
    mode : {"relative", "mean"}
        ``relative`` adds λ·H_jj to each diagonal entry, ``mean`` adds λ·mean(diag H).
    """

    factor: float = 0.01
    mode: Literal["relative", "mean"] = "relative"


DEFAULT_DAMPING = Damping()


class Target(NamedTuple):
    """A target t of the output, without the bias of the layer.

    Attributes
    ----------
    cross_OI : Tensor
        E[t xᵀ], float64.
    correction : float
        α, from 0 to 1: how far the output moves toward t.
    mean_O : Tensor or None
        E[t], float64; needed only by a layer with a bias.
    """

    cross_OI: Tensor
    correction: float
    mean_O: Tensor | None = None


class Means(NamedTuple):
    """Means over the calibration tokens, float64.

    Attributes
    ----------
    input_I : Tensor
        m = E[x].
    output_O : Tensor
        (1 − α) W m + α E[t]: the mean output after the correction, without the dense layer's bias.
    """

    input_I: Tensor
    output_O: Tensor


class Problem(NamedTuple):
    """The least-squares problem of one layer, ready for elimination.

    Attributes
    ----------
    weight_OI : Tensor
        W after the correction; columns whose input is always zero are zero. In float32, or float64
        if the given weight is; stored by columns.
    inverse_II : Tensor
        (H + D)⁻¹, float64, where D is the damping of each column, and H is E[x xᵀ], or the
        covariance of x if the layer has a bias. Everywhere else in this module H stands for the
        damped matrix.
    added_I : Tensor
        The diagonal of D, float64.
    power : float
        E‖W x‖² = tr(W E[x xᵀ] Wᵀ), from float32 products; also with a bias, but without it.
    damping : float
        The damping used, at least the requested one.
    means : Means or None
        If the layer has a bias.
    """

    weight_OI: Tensor
    inverse_II: Tensor
    added_I: Tensor
    power: float
    damping: float
    means: Means | None = None


def prepare(
    weight_OI: Tensor,
    hessian_II: Tensor,
    damping: Damping = DEFAULT_DAMPING,
    target: Target | None = None,
    mean_I: Tensor | None = None,
) -> Problem:
    """Damp and invert the Hessian of a layer, and correct its weight.

    The correction α moves the output toward a target t: W ← (1 − α) W + α W*, where
    W* = (E[t xᵀ] + W D) (H + D)⁻¹ is the least-squares solution for t, and the damping D pulls
    it toward W.

    The bias b of a layer takes what a change of the weight does to the mean output. Given
    m = E[x], the best bias of a weight V is b + (1 − α) W m + α E[t] − V m. What then remains of
    the error is that of the centred input x − m and target t − E[t]. So H becomes the covariance
    C = E[x xᵀ] − m mᵀ, and E[t xᵀ] becomes E[t xᵀ] − E[t] mᵀ. The damping is relative to C_jj, but
    at least to E[x_j²] / 1000, so that the rounding of C cannot make it indefinite. See
    `slimgpt.solver.elimination.compensated_bias` for the new bias.

    Parameters
    ----------
    weight_OI : Tensor
        The layer's weight W.
    hessian_II : Tensor
        H = E[x xᵀ] over the calibration tokens, symmetric, positive semi-definite; not centred.
    damping : Damping
        λ and how it is added.
    target : Target, optional
        Without it there is no correction.
    mean_I : Tensor, optional
        m, float64, if the layer has a bias to adjust.

    Returns
    -------
    Problem
        The damped problem with the corrected weight.

    Raises
    ------
    NumericalError
        If H is not finite, or no damping up to 0.1 makes it positive definite.
    ValueError
        If there are a target and the mean of the input, but not the mean of the target.
    """
    hessian_II = hessian_II.double()
    if not hessian_II.sum().isfinite():
        num_bad = int((~hessian_II.isfinite()).sum())
        raise NumericalError(
            f"the Hessian has {num_bad} entries that are not finite",
            hint="the model's activations overflow: use --dtype float32 or bfloat16",
        )
    squares_I = scale_I = hessian_II.diagonal().clone()
    dead_I = squares_I == 0
    # Stored by columns, because columns are removed.
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_IO = weight_OI.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    weight_OI = weight_IO.masked_fill_(dead_I[:, None], 0).T
    means = None
    if mean_I is not None:
        means = Means(mean_I, weight_OI.to(mean_I) @ mean_I)
        hessian_II = torch.addr(hessian_II, mean_I, mean_I, alpha=-1)
        scale_I = hessian_II.diagonal().maximum(MIN_VARIANCE * squares_I)
    if damping.mode == "mean":
        scale_I = scale_I.mean().expand_as(scale_I)
    inverse_II, added_I, used = _invert(hessian_II, scale_I, dead_I, damping.factor)
    if target is not None:
        cross_OI = target.cross_OI
        if means is not None:
            if target.mean_O is None:
                raise ValueError("the target of a layer with a bias needs its mean")
            cross_OI = torch.addr(cross_OI, target.mean_O, means.input_I, alpha=-1)
            means = means._replace(output_O=means.output_O.lerp(target.mean_O, target.correction))
        solution_IO = inverse_II @ torch.addcmul(cross_OI, weight_OI, added_I).T
        weight_OI = weight_IO.lerp_(solution_IO.to(dtype), target.correction).T
    power = output_power(weight_OI, hessian_II)
    if means is not None:
        power += float((weight_OI.to(means.input_I) @ means.input_I).square().sum())
    return Problem(weight_OI, inverse_II, added_I, power, used, means)


def _invert(
    hessian_II: Tensor, scale_I: Tensor, dead_I: Tensor, factor: float
) -> tuple[Tensor, Tensor, float]:
    """(H + D)⁻¹, the diagonal of D, and the λ that was needed."""
    diagonal_I = hessian_II.diagonal().clone()
    while True:
        added_I = factor * scale_I + dead_I
        hessian_II.diagonal().add_(added_I)
        # No scaling to unit diagonal: the rounding errors of Cholesky do not depend on it.
        factor_II, failed = torch.linalg.cholesky_ex(hessian_II)
        hessian_II.diagonal().copy_(diagonal_I)
        if not failed:
            # Symmetric and stored by columns, so the rows of its transpose are contiguous.
            return torch.cholesky_inverse(factor_II, out=factor_II).mT, added_I, factor
        if factor >= MAX_DAMPING:
            raise NumericalError(
                f"the Hessian is not positive definite, even with a damping of {factor:g}",
                hint="use more calibration tokens, or a higher --damping to start from",
            )
        factor = min(10 * factor or MIN_DAMPING, MAX_DAMPING)


def output_power(weight_OI: Tensor, hessian_II: Tensor, panel_size: int = 512) -> float:
    """E‖y‖² = tr(W H Wᵀ), from float32 products, one panel of rows of H at a time.

    H is symmetric: entries right of a panel's diagonal block count twice, those left of it are
    skipped.
    """
    weight_IO = weight_OI.T.float()
    power = torch.zeros((), dtype=torch.float64, device=hessian_II.device)
    for start in range(0, len(hessian_II), panel_size):
        end = start + panel_size
        hessian_PI = hessian_II[start:end, start:].to(torch.float32, copy=True)
        hessian_PI[:, :panel_size] /= 2
        product_PO = hessian_PI @ weight_IO[start:]
        power += 2 * product_PO.mul_(weight_IO[start:end]).sum(dtype=torch.float64)
    return float(power)
