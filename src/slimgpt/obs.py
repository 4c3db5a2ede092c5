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

from dataclasses import dataclass
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
    inverse_II : Tensor
        (H + D)⁻¹, where H = E[x xᵀ] and D is the damping of each column. Everywhere else in this
        module H stands for the damped matrix.
    added_I : Tensor
        The diagonal of D.
    power : float
        E‖y‖² = tr(W H Wᵀ), from float32 products.
    damping : float
        The damping that was needed, at least what was asked for.
    remainder_OI : Tensor or None
        E[(t − y) xᵀ], where the layer's output should be t instead of y.
    """

    weight_OI: Tensor
    inverse_II: Tensor
    added_I: Tensor
    power: float
    damping: float
    remainder_OI: Tensor | None = None


class Elimination(NamedTuple):
    """The removed units in the order of removal, and the error that each step added."""

    order_R: Tensor
    errors_R: Tensor


def prepare(
    weight_OI: Tensor,
    hessian_II: Tensor,
    damping: float = 0.01,
    mode: Literal["relative", "mean"] = "relative",
    cross_OI: Tensor | None = None,
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
    cross_OI : Tensor, optional
        E[t xᵀ] of a target t of the output; float64, becomes the remainder.

    Returns
    -------
    Problem
        In float64.

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
    # Stored by columns, which are what is removed.
    weight_IO = weight_OI.T.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    weight_OI = weight_IO.masked_fill_(dead_I[:, None], 0).T
    if cross_OI is None:
        power = output_power(weight_OI, hessian_II)
    else:
        power = _subtract_output(cross_OI, weight_OI, hessian_II)
    scale_I = diagonal_I if mode == "relative" else diagonal_I.mean().expand_as(diagonal_I)
    used = damping
    while True:
        added_I = used * scale_I + dead_I
        hessian_II.diagonal().add_(added_I)
        # No scaling to unit diagonal: the rounding errors of Cholesky do not depend on it.
        factor_II, failed = torch.linalg.cholesky_ex(hessian_II)
        hessian_II.diagonal().copy_(diagonal_I)
        if not failed:
            # Symmetric, stored by columns: its transpose has the rows in one piece.
            inverse_II = torch.cholesky_inverse(factor_II, out=factor_II).mT
            return Problem(weight_OI, inverse_II, added_I, power, used, cross_OI)
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
        section 3.2), summed as tr(L_u⁻¹ W_uᵀ W_u L_u⁻ᵀ). ``diagonal``: Σ_j ‖w_j‖²/(L_u)²_jj as in
        the code released with the paper, which leaves out the updates inside the unit.

    Returns
    -------
    Tensor
        errors_U, tr(ΔW H ΔWᵀ) for each unit.
    """
    return _unit_errors(*_unit_blocks(weight_OI, inverse_II, unit_size), method)


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
    weight_OK, _, half_RK = _remove(weight_OI, inverse_II, removed_R, kept_K)
    inverse_KK = inverse_II.index_select(0, kept_K).index_select(1, kept_K)
    return weight_OK, inverse_KK.addmm_(half_RK.T, half_RK, alpha=-1)


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
    grams_USS, blocks_USS = _unit_blocks(weight_OI, inverse_II, unit_size)
    state = _Remaining.create(weight_OI, inverse_II, num_remove * unit_size)
    columns_S = torch.arange(unit_size, device=inverse_II.device)
    order, errors = [], []
    for _ in range(num_remove):
        errors_U = _unit_errors(grams_USS, blocks_USS, method)
        errors_U[order] = torch.inf
        least = int(errors_U.argmin())
        order.append(least)
        errors.append(float(errors_U[least]))
        if len(order) < num_remove:
            root_IS, cross_IS = state.eliminate(least * unit_size + columns_S)
            state.append(root_IS, cross_IS)
            root_USS = root_IS.view(-1, unit_size, unit_size)
            cross_USS = cross_IS.view(-1, unit_size, unit_size)
            blocks_USS.baddbmm_(root_USS, root_USS.mT, alpha=-1)
            grams_USS.baddbmm_(root_USS, cross_USS.mT, alpha=-1)
            grams_USS.baddbmm_(cross_USS, root_USS.mT, alpha=-1)
            blocks_USS[least] = torch.eye(unit_size).to(blocks_USS)
    return _elimination(order, errors, inverse_II)


def eliminate_channels(
    weight_OI: Tensor, inverse_II: Tensor, num_remove: int, panel_size: int = 120
) -> Elimination:
    """Remove single columns one after the other, always the one of least ‖w_j‖²/(H⁻¹)_jj.

    The next `panel_size` pivots are found among half as many more columns, those of least error
    now, from their blocks of H⁻¹ and WᵀW alone. What the removal of these pivots means for all
    columns then takes a few matrix products (see `_Remaining`). Pivots from the first one on
    that a column outside of the candidates would have beaten are discarded, so the order is that
    of one removal at a time.

    Parameters
    ----------
    weight_OI, inverse_II : Tensor
        W and H⁻¹.
    num_remove : int
        Number of columns to remove.
    panel_size : int
        Pivots chosen at once; changes the speed only. Up to 120 the blocks of the candidates are
        too small for torch to split work on them over threads, which would slow it down.

    Returns
    -------
    Elimination
        Nested: its first n entries are the elimination of n columns.
    """
    state = _Remaining.create(weight_OI, inverse_II, num_remove)
    norms_I = torch.linalg.vector_norm(state.weight_IO, dim=1).square()
    inverse_I = inverse_II.diagonal()
    order, errors = [], []
    while len(order) < num_remove:
        size = min(panel_size, num_remove - len(order))
        ranked_I = (norms_I.clamp(min=0) / inverse_I).argsort(stable=True)
        num_candidates = min(3 * size // 2, len(ranked_I) - len(order))
        candidates_C = ranked_I[:num_candidates].sort().values
        blocks = state.blocks(candidates_C, candidates_C)
        chosen, errors_P = _eliminate_one_by_one(*blocks, size)

        pivots_P = candidates_C[chosen]
        root_IP, cross_IP = state.eliminate(pivots_P)
        norms_IP = norms_I[:, None] - (root_IP * cross_IP).mul_(2).cumsum_(dim=1)
        inverse_IP = inverse_I[:, None] - root_IP.square().cumsum_(dim=1)
        others_IP = norms_IP[:, :-1].clamp(min=0) / inverse_IP[:, :-1]
        others_P = others_IP.index_fill_(0, candidates_C, torch.inf).amin(dim=0)
        valid = 1 + int((errors_P[1:] <= others_P).cumprod(dim=0).sum())

        order += pivots_P[:valid].tolist()
        errors += errors_P[:valid].tolist()
        state.append(root_IP[:, :valid], cross_IP[:, :valid])
        norms_I, inverse_I = norms_IP[:, valid - 1].clone(), inverse_IP[:, valid - 1].clone()
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


def compensate(problem: Problem, kept_K: Tensor, correction: float = 0.0) -> tuple[Tensor, float]:
    """Weights of the kept columns that change the layer's output least, and by how much.

    W_K − W_R [(H⁻¹)_RR]⁻¹ (H⁻¹)_RK, the update of Optimal Brain Surgeon, is the least-squares
    solution W H_:K (H_KK)⁻¹. With L Lᵀ = (H⁻¹)_RR it costs tr(ΔW H ΔWᵀ) = ‖L⁻¹ W_Rᵀ‖²_F, of which
    tr(ΔW D ΔWᵀ) is due to the damping D and not to the output.

    To bring the output nearer to the target t, the correction α adds α E[(t − y) xᵀ]_K (H_KK)⁻¹;
    at 1, W_K is the least-squares solution for t in place of y.

    Parameters
    ----------
    problem : Problem
        The layer; with a remainder if there is a correction.
    kept_K : Tensor
        Indices of the kept columns, sorted.
    correction : float
        α, from 0 to 1.

    Returns
    -------
    tuple of Tensor and float
        weight_OK, and the mean squared change of the output E‖Δy‖², summed over the out features,
        before the correction.
    """
    weight_OI = problem.weight_OI
    is_removed_I = torch.ones(weight_OI.shape[1], dtype=torch.bool, device=weight_OI.device)
    is_removed_I[kept_K] = False
    removed_R = is_removed_I.nonzero().squeeze(1)
    weight_OK, half_RO, half_RK = _remove(weight_OI, problem.inverse_II, removed_R, kept_K)
    change_I = weight_OI.square().sum(dim=0)
    change_I[kept_K] = (weight_OK - weight_OI[:, kept_K]).square().sum(dim=0)
    error = half_RO.square().sum() - problem.added_I @ change_I
    if correction and problem.remainder_OI is not None:
        wanted_OK = correction * problem.remainder_OI[:, kept_K]
        # (H_KK)⁻¹ is the Schur complement (H⁻¹)_KK − (H⁻¹)_KR [(H⁻¹)_RR]⁻¹ (H⁻¹)_RK.
        inverse_KK = problem.inverse_II.index_select(0, kept_K).index_select(1, kept_K)
        weight_OK.addmm_(wanted_OK, inverse_KK)
        weight_OK.addmm_(wanted_OK @ half_RK.T, half_RK, alpha=-1)
    return weight_OK, max(float(error), 0.0)


def output_power(weight_OI: Tensor, hessian_II: Tensor, panel_size: int = 512) -> float:
    """E‖y‖² = tr(W H Wᵀ), from float32 products, a panel of columns of H at a time.

    H is symmetric, so the rows below a panel's block on the diagonal count twice, those above not.
    """
    weight32_OI = weight_OI.float()
    power = 0.0
    for start in range(0, len(hessian_II), panel_size):
        end = start + panel_size
        hessian_IP = hessian_II[start:, start:end].float()
        hessian_IP[:panel_size] /= 2
        product_OP = weight32_OI[:, start:] @ hessian_IP
        power += 2 * float(product_OP.double().mul_(weight_OI[:, start:end]).sum())
    return power


def _subtract_output(
    cross_OI: Tensor, weight_OI: Tensor, hessian_II: Tensor, panel_size: int = 512
) -> float:
    """Subtract E[y xᵀ] = W H in place, and give E‖y‖²; from float32 products."""
    weight32_OI = weight_OI.float()
    power = 0.0
    for start in range(0, len(hessian_II), panel_size):
        panel = slice(start, start + panel_size)
        product_OP = (weight32_OI @ hessian_II[:, panel].float()).double()
        cross_OI[:, panel] -= product_OP
        power += float(product_OP.mul_(weight_OI[:, panel]).sum())
    return power


def _remove(
    weight_OI: Tensor, inverse_II: Tensor, removed_R: Tensor, kept_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The compensated weight, L⁻¹ W_Rᵀ and L⁻¹ (H⁻¹)_RK, where L Lᵀ = (H⁻¹)_RR."""
    inverse_RI = inverse_II.index_select(0, removed_R)
    factor_RR = torch.linalg.cholesky(inverse_RI[:, removed_R])
    half_RK = torch.linalg.solve_triangular(factor_RR, inverse_RI[:, kept_K], upper=False)
    half_RO = torch.linalg.solve_triangular(factor_RR, weight_OI[:, removed_R].T, upper=False)
    weight_OK = weight_OI.index_select(1, kept_K).addmm_(half_RO.T, half_RK, alpha=-1)
    return weight_OK, half_RO, half_RK


def _unit_blocks(weight_OI: Tensor, inverse_II: Tensor, unit_size: int) -> tuple[Tensor, Tensor]:
    """Blocks on the diagonals of WᵀW and H⁻¹, one for each unit."""
    weight_UOS = weight_OI.view(len(weight_OI), -1, unit_size).transpose(0, 1)
    num_units = len(weight_UOS)
    inverse_USUS = inverse_II.view(num_units, unit_size, num_units, unit_size)
    blocks_USS = inverse_USUS.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
    return weight_UOS.mT @ weight_UOS, blocks_USS


def _unit_errors(grams_USS: Tensor, blocks_USS: Tensor, method: str) -> Tensor:
    factors_USS = torch.linalg.cholesky(blocks_USS)
    if method == "diagonal":
        pivots_US = factors_USS.diagonal(dim1=1, dim2=2)
        return (grams_USS.diagonal(dim1=1, dim2=2) / pivots_US.square()).sum(dim=1)
    eye_SS = torch.eye(blocks_USS.shape[1]).to(blocks_USS)
    inverse_USS = torch.linalg.solve_triangular(factors_USS, eye_SS, upper=False)
    return (inverse_USS @ grams_USS).mul_(inverse_USS).sum(dim=(1, 2)).clamp(min=0)


@dataclass
class _Remaining:
    """A = WᵀW and M = H⁻¹ of the columns that are left, without updating either matrix.

    With L Lᵀ = M_PP, removing the pivots P in their order is

        M ← M − R Rᵀ,         R = M_:P L⁻ᵀ,
        A ← A − R Qᵀ − Q Rᵀ,  Q = B − R (tril(G) − ½ diag(G))ᵀ,  B = A_:P L⁻ᵀ,  G = L⁻¹ B_P:,

    where each column of R and Q is one pivot. R and Q of all removals are kept side by side (R is
    then the Cholesky factor of H⁻¹, pivoted in the order of removal), and blocks of the current A
    and M are formed from them when they are asked for.
    """

    weight_IO: Tensor
    inverse_II: Tensor
    root_IR: Tensor
    cross_IR: Tensor
    done: int = 0

    @classmethod
    def create(cls, weight_OI: Tensor, inverse_II: Tensor, capacity: int) -> "_Remaining":
        """All columns, with room for the removal of `capacity`."""
        root_IR = inverse_II.new_empty(len(inverse_II), capacity)
        return cls(weight_OI.T.contiguous(), inverse_II, root_IR, torch.empty_like(root_IR))

    def blocks(self, rows: Tensor | slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """A and M at the rows and columns."""
        root, cross = self.root_IR[:, : self.done], self.cross_IR[:, : self.done]
        root_columns, cross_columns = root[columns].T, cross[columns].T
        gram = self.weight_IO[rows] @ self.weight_IO[columns].T
        gram.addmm_(root[rows], cross_columns, alpha=-1)
        gram.addmm_(cross[rows], root_columns, alpha=-1)
        inverse = self.inverse_II[columns][:, rows].T
        return gram, torch.addmm(inverse, root[rows], root_columns, alpha=-1)

    def eliminate(self, pivots_P: Tensor) -> tuple[Tensor, Tensor]:
        """R and Q of removing the pivots next."""
        gram_IP, inverse_IP = self.blocks(slice(None), pivots_P)
        factor_PP = torch.linalg.cholesky(inverse_IP[pivots_P])
        root_PI = torch.linalg.solve_triangular(factor_PP, inverse_IP.T, upper=False)
        cross_PI = torch.linalg.solve_triangular(factor_PP, gram_IP.T, upper=False)
        inner_PP = torch.linalg.solve_triangular(factor_PP, cross_PI[:, pivots_P].T, upper=False)
        inner_PP.diagonal().mul_(0.5)
        cross_PI.addmm_(inner_PP.tril(), root_PI, alpha=-1)
        return root_PI.T, cross_PI.T

    def append(self, root_IP: Tensor, cross_IP: Tensor) -> None:
        """Count pivots as removed."""
        new = slice(self.done, self.done + root_IP.shape[1])
        self.root_IR[:, new], self.cross_IR[:, new] = root_IP, cross_IP
        self.done = new.stop


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
