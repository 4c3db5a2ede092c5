"""Optimal Brain Surgeon for one linear layer y = W x: what to remove, and how to make up for it.

Pure functions on tensors. Columns of W are removed in units: a key/value group of attention is a
unit of many columns of ``o_proj``, an FFN channel is a unit of one column of ``down_proj``.

Shape suffixes: ``O`` out features, ``I`` in features (columns), ``K`` kept columns, ``R`` removed
columns, ``U`` units, ``S`` columns of a unit.

References
----------
Hassibi & Stork 1992, "Second order derivatives for network pruning: Optimal Brain Surgeon".
Ling, Wang & Liu 2024, "SlimGPT: Layer-wise Structured Pruning for LLMs", arXiv 2412.18110.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slimgpt.errors import NumericalError

MAX_DAMPING = 0.1


class Problem(NamedTuple):
    """One layer, ready to be solved.

    Attributes
    ----------
    weight_OI : Tensor
        W; columns that never see an input are zero.
    hessian_II : Tensor
        H = E[x xᵀ] with damping added.
    inverse_II : Tensor
        Its inverse.
    damping : float
        The damping that was needed, at least what was asked for.
    """

    weight_OI: Tensor
    hessian_II: Tensor
    inverse_II: Tensor
    damping: float


class Elimination(NamedTuple):
    """The removed units in the order of removal, and the error that each step added."""

    order_R: Tensor
    errors_R: Tensor


def prepare(
    weight_OI: Tensor,
    hessian_II: Tensor,
    damping: float = 0.01,
    mode: Literal["relative", "mean"] = "relative",
) -> Problem:
    """Damp and invert the Hessian of a layer.

    Parameters
    ----------
    weight_OI : Tensor
        The layer's weight.
    hessian_II : Tensor
        H = E[x xᵀ] over the calibration tokens, symmetric, positive semi-definite.
    damping : float
        λ. ``relative`` adds λ·H_jj to each diagonal entry, ``mean`` adds λ·mean(diag H). It is
        multiplied by ten for as long as the Cholesky decomposition fails.

    Returns
    -------
    Problem
        In float64, or in float32 on devices that know no other.

    Raises
    ------
    NumericalError
        If H is not finite, or no damping up to 0.1 makes it positive definite.
    """
    dtype = torch.float32 if hessian_II.device.type == "mps" else torch.float64
    hessian_II = hessian_II.to(dtype)
    if not hessian_II.isfinite().all():
        raise NumericalError(
            "the Hessian has entries that are not finite",
            hint="the model's activations overflow: use --dtype float32 or bfloat16",
        )
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I <= 0
    weight_OI = weight_OI.to(dtype).masked_fill(dead_I, 0)
    added_I = diagonal_I if mode == "relative" else diagonal_I.mean().expand_as(diagonal_I)
    used = damping
    while True:
        damped_II = hessian_II + torch.diag(used * added_I + dead_I.to(dtype))
        # Scaled to unit diagonal: the same solution, a far better condition.
        scale_I = damped_II.diagonal().rsqrt()
        factor_II, failed = torch.linalg.cholesky_ex(scale_I[:, None] * damped_II * scale_I)
        if not failed:
            inverse_II = scale_I[:, None] * torch.cholesky_inverse(factor_II) * scale_I
            return Problem(weight_OI, damped_II, inverse_II, used)
        if used * 10 > MAX_DAMPING * (1 + 1e-9):
            raise NumericalError(
                f"the Hessian is not positive definite, even with a damping of {used:g}",
                hint="use more calibration tokens, or a higher --damping to start from",
            )
        used *= 10


def unit_errors(
    weight_OI: Tensor,
    inverse_II: Tensor,
    unit_size: int,
    method: Literal["exact", "diagonal"] = "exact",
) -> Tensor:
    """Error of removing each unit alone, with optimal compensation by all other columns.

    Parameters
    ----------
    weight_OI : Tensor
        The layer's weight.
    inverse_II : Tensor
        H⁻¹.
    unit_size : int
        Consecutive columns that form a unit; divides I.
    method : {"exact", "diagonal"}
        ``exact``: with L_u L_uᵀ = (H⁻¹)_uu, ε_u = ‖L_u⁻¹ W_uᵀ‖²_F (grouped Cholesky, SlimGPT
        section 3.2). ``diagonal``: Σ_j ‖w_j‖²/(L_u)²_jj as in the code released with the paper,
        which leaves out the updates inside the unit.

    Returns
    -------
    Tensor
        errors_U, tr(ΔW H ΔWᵀ) for each unit.
    """
    num_units = inverse_II.shape[0] // unit_size
    blocks_USUS = inverse_II.view(num_units, unit_size, num_units, unit_size)
    factors_USS = torch.linalg.cholesky(blocks_USUS.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    weight_USO = weight_OI.T.reshape(num_units, unit_size, -1)
    if method == "diagonal":
        pivots_US = factors_USS.diagonal(dim1=1, dim2=2)
        return (weight_USO.square().sum(dim=2) / pivots_US.square()).sum(dim=1)
    solved_USO = torch.linalg.solve_triangular(factors_USS, weight_USO, upper=False)
    return solved_USO.square().sum(dim=(1, 2))


def downdate(
    weight_OI: Tensor, inverse_II: Tensor, removed_R: Tensor, kept_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Remove columns: compensate W, and turn H⁻¹ into the inverse of what is left of H.

    Both are Schur complements, W_K − W_R [(H⁻¹)_RR]⁻¹ (H⁻¹)_RK and
    (H⁻¹)_KK − (H⁻¹)_KR [(H⁻¹)_RR]⁻¹ (H⁻¹)_RK.

    Returns
    -------
    tuple of Tensor
        weight_OK and inverse_KK.
    """
    factor_RR = torch.linalg.cholesky(inverse_II[removed_R][:, removed_R])
    cross_RK = inverse_II[removed_R][:, kept_K]
    half_RK = torch.linalg.solve_triangular(factor_RR, cross_RK, upper=False)
    half_RO = torch.linalg.solve_triangular(factor_RR, weight_OI[:, removed_R].T, upper=False)
    weight_OK = torch.addmm(weight_OI[:, kept_K], half_RO.T, half_RK, alpha=-1)
    inverse_KK = torch.addmm(inverse_II[kept_K][:, kept_K], half_RK.T, half_RK, alpha=-1)
    return weight_OK, inverse_KK


def eliminate_units(
    weight_OI: Tensor,
    inverse_II: Tensor,
    num_remove: int,
    unit_size: int,
    method: Literal["exact", "diagonal"] = "exact",
) -> Elimination:
    """Remove units of several columns one after the other, always the one of least error.

    Parameters
    ----------
    weight_OI, inverse_II : Tensor
        W and H⁻¹.
    num_remove : int
        Number of units to remove.
    unit_size : int
        Consecutive columns that form a unit.
    method : {"exact", "diagonal"}
        See `unit_errors`.
    """
    alive_U = torch.arange(inverse_II.shape[0] // unit_size, device=inverse_II.device)
    columns_S = torch.arange(unit_size, device=inverse_II.device)
    order, errors = [], []
    for _ in range(num_remove):
        errors_U = unit_errors(weight_OI, inverse_II, unit_size, method)
        least = int(errors_U.argmin())
        order.append(alive_U[least])
        errors.append(errors_U[least])
        others_U = torch.cat([torch.arange(least), torch.arange(least + 1, len(alive_U))])
        others_U = others_U.to(alive_U.device)
        kept_K = (others_U[:, None] * unit_size + columns_S).flatten()
        weight_OI, inverse_II = downdate(
            weight_OI, inverse_II, least * unit_size + columns_S, kept_K
        )
        alive_U = alive_U[others_U]
    return _elimination(order, errors, inverse_II)


def eliminate_channels(
    weight_OI: Tensor, inverse_II: Tensor, num_remove: int, panel_size: int = 64
) -> Elimination:
    """Remove single columns one after the other, always the one of least ‖w_j‖²/(H⁻¹)_jj.

    The choice needs only the Gram matrix A = WᵀW and M = H⁻¹. With pivot p and m = M_p:/M_pp one
    removal is M ← M − M_pp m mᵀ and A ← A − u mᵀ − m uᵀ, u = A_:p − (A_pp/2) m. The vectors of
    `panel_size` pivots are collected, rows of the current M and A are formed from them when they
    are asked for, and both matrices are updated once per panel by matrix products, which also
    drop the removed columns. The order is that of updating after every removal.

    Parameters
    ----------
    weight_OI, inverse_II : Tensor
        W and H⁻¹.
    num_remove : int
        Number of columns to remove.
    panel_size : int
        Pivots between two updates of the matrices; changes the speed only.

    Returns
    -------
    Elimination
        Nested: its first n entries are the elimination of n columns.
    """
    gram_II = weight_OI.T @ weight_OI
    alive_I = torch.arange(inverse_II.shape[0], device=inverse_II.device)
    order, errors = [], []
    while len(order) < num_remove:
        size = min(panel_size, num_remove - len(order))
        num_alive = len(alive_I)
        gram_I, inverse_I = gram_II.diagonal().clone(), inverse_II.diagonal().clone()
        root_PI = gram_II.new_zeros(size, num_alive)  # M = inverse_II − rootᵀ root
        left_PI = gram_II.new_zeros(2 * size, num_alive)  # A = gram_II − leftᵀ right,
        right_PI = gram_II.new_zeros(2 * size, num_alive)  # left = (u, m, …), right = (m, u, …)
        removed_I = torch.zeros(num_alive, dtype=torch.bool, device=alive_I.device)
        for i in range(size):
            scores_I = gram_I.clamp(min=0) / inverse_I
            pivot = int(scores_I.argmin())
            order.append(alive_I[pivot])
            errors.append(scores_I[pivot])
            inverse_row_I = inverse_II[pivot] - root_PI[:i, pivot] @ root_PI[:i]
            gram_row_I = gram_II[pivot] - left_PI[: 2 * i, pivot] @ right_PI[: 2 * i]
            scale = inverse_row_I[pivot]
            root_PI[i] = inverse_row_I / scale.sqrt()
            m_I = inverse_row_I / scale
            u_I = gram_row_I - (gram_row_I[pivot] / 2) * m_I
            left_PI[2 * i], left_PI[2 * i + 1] = u_I, m_I
            right_PI[2 * i], right_PI[2 * i + 1] = m_I, u_I
            inverse_I -= root_PI[i].square()
            gram_I -= 2 * u_I * m_I
            removed_I[pivot] = True
            gram_I[removed_I], inverse_I[removed_I] = torch.inf, 1.0
        if len(order) < num_remove:
            keep_I = (~removed_I).nonzero().squeeze(1)
            root_PI, left_PI, right_PI = root_PI[:, keep_I], left_PI[:, keep_I], right_PI[:, keep_I]
            inverse_II = torch.addmm(inverse_II[keep_I][:, keep_I], root_PI.T, root_PI, alpha=-1)
            gram_II = torch.addmm(gram_II[keep_I][:, keep_I], left_PI.T, right_PI, alpha=-1)
            alive_I = alive_I[keep_I]
    return _elimination(order, errors, inverse_II)


def eliminate_channel_groups(
    weight_OI: Tensor,
    inverse_II: Tensor,
    num_remove: int,
    min_group: int = 64,
    max_group: int = 1024,
) -> Elimination:
    """Remove single columns in batches of least ‖w_j‖²/(H⁻¹)_jj (Dynamic Group Size).

    As in the code released with the paper: with c columns to remove the first batch has
    (c − 512)/2, each next one (b − 512)/2 columns, clamped to the two bounds and to what is left;
    W and H⁻¹ are updated after each batch.

    Parameters
    ----------
    weight_OI, inverse_II : Tensor
        W and H⁻¹.
    num_remove : int
        Number of columns to remove.
    min_group, max_group : int
        Bounds of the size of a batch.
    """
    alive_I = torch.arange(inverse_II.shape[0], device=inverse_II.device)
    order, errors = [], []
    group = num_remove
    while len(order) < num_remove:
        group = min(max((group - 512) // 2, min_group), max_group)
        errors_I = weight_OI.square().sum(dim=0) / inverse_II.diagonal()
        ranked_I = errors_I.argsort(stable=True)
        size = min(group, num_remove - len(order))
        removed_R, kept_K = ranked_I[:size], ranked_I[size:].sort().values
        order.extend(alive_I[removed_R])
        errors.extend(errors_I[removed_R])
        weight_OI, inverse_II = downdate(weight_OI, inverse_II, removed_R, kept_K)
        alive_I = alive_I[kept_K]
    return _elimination(order, errors, inverse_II)


def compensate(weight_OI: Tensor, hessian_II: Tensor, kept_K: Tensor) -> Tensor:
    """Weights of the kept columns that change the layer's output least.

    W H_:K (H_KK)⁻¹, the least-squares solution, equal to the update of Optimal Brain Surgeon,
    W_K − W_R [(H⁻¹)_RR]⁻¹ (H⁻¹)_RK.

    Parameters
    ----------
    weight_OI : Tensor
        The layer's weight.
    hessian_II : Tensor
        H, damped.
    kept_K : Tensor
        Indices of the kept columns, sorted.

    Returns
    -------
    Tensor
        weight_OK.
    """
    hessian_KK = hessian_II[kept_K][:, kept_K]
    scale_K = hessian_KK.diagonal().rsqrt()
    factor_KK = torch.linalg.cholesky(scale_K[:, None] * hessian_KK * scale_K)
    target_KO = scale_K[:, None] * (hessian_II[kept_K] @ weight_OI.T)
    return (scale_K[:, None] * torch.cholesky_solve(target_KO, factor_KK)).T


def output_error(
    weight_OI: Tensor, hessian_II: Tensor, kept_K: Tensor, new_weight_OK: Tensor
) -> tuple[float, float]:
    """Mean squared change of the layer's output, and the mean square of the output itself.

    Returns
    -------
    tuple of float
        tr(ΔW H ΔWᵀ) and tr(W H Wᵀ), summed over the out features, per calibration token if H is
        the undamped E[x xᵀ].
    """
    delta_OI = weight_OI.clone()
    delta_OI[:, kept_K] -= new_weight_OK
    return tuple(float(((w_OI @ hessian_II) * w_OI).sum()) for w_OI in (delta_OI, weight_OI))


def _elimination(order: list[Tensor], errors: list[Tensor], like: Tensor) -> Elimination:
    if not order:
        empty = torch.empty(0, dtype=torch.long, device=like.device)
        return Elimination(empty, empty.to(like.dtype))
    return Elimination(torch.stack(order), torch.stack(errors))
