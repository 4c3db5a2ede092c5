"""Optimal Brain Surgeon for one linear layer y = W x: what to remove, and how to make up for it.

Pure functions on tensors. Columns of W are removed in units: a key/value group of attention is a
unit of many columns of ``o_proj``, an FFN channel is a unit of one column of ``down_proj``.

Shape suffixes: ``O`` out features, ``I`` in features (columns), ``K`` kept columns, ``R`` removed
columns, ``U`` units, ``S`` columns of a unit, ``P`` pivots (columns removed together), ``C``
candidates for removal.

References
----------
Hassibi & Stork 1992, "Second order derivatives for network pruning: Optimal Brain Surgeon".
Ling, Wang & Liu 2024, "SlimGPT: Layer-wise Structured Pruning for LLMs", arXiv 2412.18110.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slimgpt.errors import NumericalError

MIN_DAMPING, MAX_DAMPING = 1e-6, 0.1  # of what is tried after a failure


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
        multiplied by ten, up to 0.1, for as long as the Cholesky decomposition fails.

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
    if not hessian_II.sum().isfinite():
        num_bad = int((~hessian_II.isfinite()).sum())
        raise NumericalError(
            f"the Hessian has {num_bad} entries that are not finite",
            hint="the model's activations overflow: use --dtype float32 or bfloat16",
        )
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    weight_OI = weight_OI.to(dtype).masked_fill(dead_I, 0)
    added_I = diagonal_I if mode == "relative" else diagonal_I.mean().expand_as(diagonal_I)
    used = damping
    while True:
        damped_II = hessian_II.clone()
        damped_II.diagonal().add_(used * added_I + dead_I)
        # No scaling to unit diagonal: the rounding errors of Cholesky do not depend on it.
        factor_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            # Symmetric, stored by columns: its transpose has the rows in one piece.
            inverse_II = torch.cholesky_inverse(factor_II).mT
            return Problem(weight_OI, damped_II, inverse_II, used)
        if used >= MAX_DAMPING:
            raise NumericalError(
                f"the Hessian is not positive definite, even with a damping of {used:g}",
                hint="use more calibration tokens, or a higher --damping to start from",
            )
        used = min(10 * used or MIN_DAMPING, MAX_DAMPING)


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
        section 3.2), summed as tr((L_u L_uᵀ)⁻¹ W_uᵀ W_u). ``diagonal``: Σ_j ‖w_j‖²/(L_u)²_jj as in
        the code released with the paper, which leaves out the updates inside the unit.

    Returns
    -------
    Tensor
        errors_U, tr(ΔW H ΔWᵀ) for each unit.
    """
    weight_USO = weight_OI.T.reshape(-1, unit_size, weight_OI.shape[0])
    return _unit_errors(weight_USO, _diagonal_blocks(inverse_II, unit_size), method)


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
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    weight_USO = weight_IO.view(-1, unit_size, weight_IO.shape[1])
    blocks_USS = _diagonal_blocks(inverse_II, unit_size).clone()
    root_RI = inverse_II.new_empty(num_remove * unit_size, len(inverse_II))
    columns_S = torch.arange(unit_size, device=inverse_II.device)
    order, errors = [], []
    for start in range(0, len(root_RI), unit_size):
        errors_U = _unit_errors(weight_USO, blocks_USS, method)
        errors_U[order] = torch.inf
        least = int(errors_U.argmin())
        order.append(least)
        errors.append(float(errors_U[least]))
        if len(order) < num_remove:
            pivots_P = least * unit_size + columns_S
            root_PI, left_PO = _pivot_rows(weight_IO, inverse_II, root_RI[:start], pivots_P)
            root_RI[start : start + unit_size] = root_PI
            weight_IO.addmm_(root_PI.T, left_PO, alpha=-1)
            root_UPS = root_PI.view(unit_size, -1, unit_size).transpose(0, 1)
            blocks_USS.baddbmm_(root_UPS.mT, root_UPS, alpha=-1)
            blocks_USS[least] = torch.eye(unit_size).to(blocks_USS)
    return _elimination(order, errors, inverse_II)


def eliminate_channels(
    weight_OI: Tensor, inverse_II: Tensor, num_remove: int, panel_size: int = 64
) -> Elimination:
    """Remove single columns one after the other, always the one of least ‖w_j‖²/(H⁻¹)_jj.

    The next `panel_size` pivots are found among twice as many columns, those of least error now,
    from their blocks of H⁻¹ and WᵀW alone. What the removal of the pivots means for all columns
    then takes matrix products only: with L Lᵀ = (H⁻¹)_PP, R = L⁻¹ (H⁻¹)_P: and V = W_P L⁻ᵀ,

        (H⁻¹)_jj ← (H⁻¹)_jj − Σ_i R_ij²,   ‖w_j‖² ← ‖w_j‖² − 2 Σ_i R_ij Q_ij,   W ← W − V R,
        Q = Vᵀ W − (tril(Vᵀ V) − ½ diag(Vᵀ V)) R,

    where the sums over the first i pivots give the errors after i removals. Pivots from the first
    one on that some column outside of the candidates would have beaten are discarded. So the
    order is that of one removal at a time.

    Parameters
    ----------
    weight_OI, inverse_II : Tensor
        W and H⁻¹.
    num_remove : int
        Number of columns to remove.
    panel_size : int
        Pivots between two updates of W; changes the speed only. Up to 90 the blocks of the
        candidates are too small for torch to split their updates over threads, which would cost
        more than it saves.

    Returns
    -------
    Elimination
        Nested: its first n entries are the elimination of n columns.
    """
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    norms_I, inverse_I = weight_IO.square().sum(dim=1), inverse_II.diagonal().clone()
    root_RI = inverse_II.new_empty(num_remove, len(inverse_II))
    order, errors = [], []
    while len(order) < num_remove:
        done = len(order)
        size = min(panel_size, num_remove - done)
        scores_I = norms_I.clamp(min=0) / inverse_I
        ranked_I = scores_I.argsort(stable=True)
        candidates_C = ranked_I[: min(2 * size, len(ranked_I) - done)].sort().values
        root_RC = root_RI[:done, candidates_C]
        inverse_CC = inverse_II[candidates_C[:, None], candidates_C]
        inverse_CC.addmm_(root_RC.T, root_RC, alpha=-1)
        weight_CO = weight_IO[candidates_C]
        chosen, errors_P = _eliminate_one_by_one(weight_CO @ weight_CO.T, inverse_CC, size)

        pivots_P = candidates_C[chosen]
        root_PI, left_PO = _pivot_rows(weight_IO, inverse_II, root_RI[:done], pivots_P)
        gram_PP = left_PO @ left_PO.T
        gram_PP.diagonal().mul_(0.5)
        loss_PI = (left_PO @ weight_IO.T).addmm_(gram_PP.tril_(), root_PI, alpha=-1)
        loss_PI = loss_PI.mul_(root_PI).mul_(2).cumsum_(dim=0)
        shrinkage_PI = root_PI.square().cumsum_(dim=0)
        others_PI = (norms_I - loss_PI[:-1]).clamp_(min=0) / (inverse_I - shrinkage_PI[:-1])
        others_P = others_PI.index_fill_(1, candidates_C, torch.inf).amin(dim=1)
        valid = 1 + int((errors_P[1:] <= others_P).cumprod(dim=0).sum())

        order.extend(pivots_P[:valid].tolist())
        errors.extend(errors_P[:valid].tolist())
        if len(order) < num_remove:
            root_RI[done : done + valid] = root_PI[:valid]
            weight_IO.addmm_(root_PI[:valid].T, left_PO[:valid], alpha=-1)
            norms_I -= loss_PI[valid - 1]
            inverse_I -= shrinkage_PI[valid - 1]
            norms_I[pivots_P[:valid]], inverse_I[pivots_P[:valid]] = torch.inf, 1.0
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
        order.extend(alive_I[removed_R].tolist())
        errors.extend(errors_I[removed_R].tolist())
        weight_OI, inverse_II = downdate(weight_OI, inverse_II, removed_R, kept_K)
        alive_I = alive_I[kept_K]
    return _elimination(order, errors, inverse_II)


def compensate(weight_OI: Tensor, hessian_II: Tensor, kept_K: Tensor) -> Tensor:
    """Weights of the kept columns that change the layer's output least.

    W_K + W_R H_RK (H_KK)⁻¹ = W H_:K (H_KK)⁻¹, the least-squares solution, equal to the update of
    Optimal Brain Surgeon, W_K − W_R [(H⁻¹)_RR]⁻¹ (H⁻¹)_RK.

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
    removed_I = torch.ones(len(hessian_II), dtype=torch.bool, device=hessian_II.device)
    removed_I[kept_K] = False
    hessian_KI = hessian_II[kept_K]
    factor_KK = torch.linalg.cholesky(hessian_KI[:, kept_K])
    target_OK = weight_OI[:, removed_I] @ hessian_KI[:, removed_I].T
    return weight_OI[:, kept_K] + torch.cholesky_solve(target_OK.T, factor_KK).T


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
    error, power = (float(((w_OI @ hessian_II) * w_OI).sum()) for w_OI in (delta_OI, weight_OI))
    return error, power


def _diagonal_blocks(matrix_II: Tensor, unit_size: int) -> Tensor:
    """View of the blocks on the diagonal, (U, S, S)."""
    num_units = len(matrix_II) // unit_size
    blocks_USUS = matrix_II.view(num_units, unit_size, num_units, unit_size)
    return blocks_USUS.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _unit_errors(weight_USO: Tensor, blocks_USS: Tensor, method: str) -> Tensor:
    gram_USS = weight_USO @ weight_USO.mT
    factors_USS = torch.linalg.cholesky(blocks_USS)
    if method == "diagonal":
        return (_diagonals(gram_USS) / _diagonals(factors_USS).square()).sum(dim=1)
    return _diagonals(torch.cholesky_solve(gram_USS, factors_USS)).sum(dim=1)


def _diagonals(blocks_USS: Tensor) -> Tensor:
    return blocks_USS.diagonal(dim1=1, dim2=2)


def _pivot_rows(
    weight_IO: Tensor, inverse_II: Tensor, root_RI: Tensor, pivots_P: Tensor
) -> tuple[Tensor, Tensor]:
    """What removes the pivots: L⁻¹ M_P: and L⁻¹ W_Pᵀ with L Lᵀ = M_PP.

    M is what earlier removals R left of H⁻¹, inverse_II − rootᵀ root, of which only the rows of
    pivots are ever formed. The result for M_P: is the next rows of root: all of them together are
    the Cholesky factor of H⁻¹, pivoted in the order of removal.
    """
    rows_PI = inverse_II[pivots_P].addmm_(root_RI[:, pivots_P].T, root_RI, alpha=-1)
    factor_PP = torch.linalg.cholesky(rows_PI[:, pivots_P])
    root_PI = torch.linalg.solve_triangular(factor_PP, rows_PI, upper=False)
    left_PO = torch.linalg.solve_triangular(factor_PP, weight_IO[pivots_P], upper=False)
    return root_PI, left_PO


def _eliminate_one_by_one(
    gram_CC: Tensor, inverse_CC: Tensor, num_remove: int
) -> tuple[list[int], Tensor]:
    """Remove single columns, always the one of least ‖w_j‖²/M_jj, updating after each.

    With A = WᵀW, pivot p and m = M_p:/M_pp one removal is M ← M − M_pp m mᵀ and
    A ← A − u mᵀ − m uᵀ, u = A_:p − ½ A_pp m. Overwrites both matrices.
    """
    order, errors = [], []
    for _ in range(num_remove):
        scores_C = gram_CC.diagonal().clamp(min=0) / inverse_CC.diagonal()
        pivot = int(scores_C.argmin())
        order.append(pivot)
        errors.append(scores_C[pivot])
        m_C = inverse_CC[pivot] / inverse_CC[pivot, pivot]
        u_C = gram_CC[pivot] - gram_CC[pivot, pivot] / 2 * m_C
        inverse_CC.addr_(inverse_CC[pivot].clone(), m_C, alpha=-1)
        gram_CC.addr_(u_C, m_C, alpha=-1).addr_(m_C, u_C, alpha=-1)
        gram_CC[pivot, pivot], inverse_CC[pivot, pivot] = torch.inf, 1.0
    return order, torch.stack(errors)


def _elimination(order: list[int], errors: list[float], like: Tensor) -> Elimination:
    return Elimination(
        torch.tensor(order, dtype=torch.long, device=like.device),
        torch.tensor(errors, dtype=like.dtype, device=like.device),
    )
