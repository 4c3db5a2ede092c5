"""Optimal Brain Surgeon for one linear layer y = W x: select columns, remove them and compensate.

Pure functions on tensors. Columns of W are removed in units: a key/value group of attention is a
unit of many columns of ``o_proj``, an FFN channel is a unit of one column of ``down_proj``. The
query heads of a group can also be removed singly, as many in each remaining group.

Shape suffixes: ``O`` out features, ``I`` in features (columns), ``K`` kept columns, ``R`` removed
columns, ``U`` units, ``G`` key/value groups, ``S`` columns of a unit or group, ``P`` pivots
(columns removed together), ``F`` those removed first, ``C`` candidates for removal.

References
----------
Hassibi & Stork 1992, "Second order derivatives for network pruning: Optimal Brain Surgeon".
Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning for LLMs", arXiv 2412.18110.
"""

import copy
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from slimgpt.errors import NumericalError
from slimgpt.solver.hessian import Problem


class Elimination(NamedTuple):
    """Result of an elimination: the removed units and the compensated weight.

    Attributes
    ----------
    order : Tensor
        Removed units, in the order of removal.
    errors : Tensor
        Increase of tr(ΔW (H + D) ΔWᵀ) with each removed unit, then with each further unit if
        requested; float64.
    kept_K : Tensor
        Sorted indices of the remaining columns.
    weight_OK : Tensor
        Compensated weight of the remaining columns: the least-squares solution W H_:K (H_KK)⁻¹, in
        the dtype of the problem's weight.
    error : float
        E‖Δy‖², the mean squared change of the output, summed over the out features.
    """

    order: Tensor
    errors: Tensor
    kept_K: Tensor
    weight_OK: Tensor
    error: float


class HeadCounts(NamedTuple):
    """Number of query heads of an attention layer; each key/value group has equally many.

    Attributes
    ----------
    groups : int
        Key/value groups.
    per_group : int
        Query heads of a group.
    """

    groups: int
    per_group: int

    @property
    def total(self) -> int:
        """Number of query heads."""
        return self.groups * self.per_group


class HeadParams(NamedTuple):
    """Parameters of one head.

    Attributes
    ----------
    query : int
        Of a query head, with its columns of the output projection.
    key_value : int
        Of a group's key and value heads together.
    """

    query: int
    key_value: int

    def count(self, heads: HeadCounts) -> int:
        """Parameters of so many heads."""
        return heads.total * self.query + heads.groups * self.key_value


class HeadState(NamedTuple):
    """A state on the path of `trace_heads`.

    Attributes
    ----------
    heads : HeadCounts
        Query heads left.
    removed_params : int
        Parameters removed so far.
    error : float
        tr(ΔW (H + D) ΔWᵀ) of all removals so far.
    """

    heads: HeadCounts
    removed_params: int
    error: float


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
        the code released with the paper, which ignores the updates inside the unit.

    Returns
    -------
    Tensor
        errors_U, tr(ΔW H ΔWᵀ) for each unit.
    """
    grams_USS = _unit_grams(weight_OI.T, unit_size).to(inverse_II)
    return _unit_errors(grams_USS, _unit_blocks(inverse_II, unit_size), method)


def compensated_bias(problem: Problem, left: Elimination, bias_O: Tensor) -> Tensor:
    """Compute the bias that keeps the mean output: b + (1 − α) W m + α E[t] − W′ m_K.

    Parameters
    ----------
    problem : Problem
        Prepared with the mean of the input; without it, the bias stays as it is.
    left : Elimination
        The remaining columns and their weight W′. If W′ is rounded, the bias can compensate for
        that too: use ``left._replace(weight_OK=rounded)``.
    bias_O : Tensor
        b, the dense layer's bias.

    Returns
    -------
    Tensor
        bias_O, float64 if it has changed.
    """
    if problem.means is None:
        return bias_O
    mean_I, mean_O = problem.means
    return bias_O.to(mean_O) + mean_O - left.weight_OK.to(mean_I) @ mean_I[left.kept_K]


def eliminate_units(
    problem: Problem,
    num_remove: int,
    unit_size: int,
    method: Literal["exact", "diagonal"] = "exact",
    num_further: int = 0,
    first: Tensor | None = None,
) -> Elimination:
    """Remove units of several columns greedily, one at a time, each time the one of least error.

    Parameters
    ----------
    problem : Problem
        The layer.
    num_remove : int
        Number of units to remove.
    unit_size : int
        Consecutive columns that form a unit.
    method : {"exact", "diagonal"}
        See `unit_errors`.
    num_further : int
        Number of further units whose errors are computed; `order` and the weight exclude them.
    first : Tensor, optional
        Units to remove before all others, at most `num_remove`.
    """
    stops = sorted({num_remove, num_remove + num_further})
    units = _UnitElimination(problem, unit_size, stops[-1])
    if first is not None and len(first):
        units.remove(first)
    left = []
    for stop in stops:
        while len(units.order) < stop:
            units.remove(units.unit_errors(method).argmin()[None])
        left = left or [units.elimination()]
    return left[0]._replace(errors=_joined(units.errors, left[0].errors))


def eliminate_heads(
    problem: Problem,
    heads: HeadCounts,
    target: HeadCounts,
    method: Literal["exact", "diagonal"] = "exact",
) -> Elimination:
    """Remove query heads of attention, so that all remaining groups have equally many.

    A step removes a whole key/value group, or one query head of each remaining group; those are
    chosen one at a time, each with the least error given the ones before. All steps of one kind
    come first, then those of the other; of these two orders, the result is the one of lower error.
    For 3 groups of 3 in SmolLM2, its error was 0.3 % above that of the best possible set on
    average, and 5 % at most.

    Parameters
    ----------
    problem : Problem
        The layer. Its columns are sorted by group, query head, and entry of the head's output.
    heads : HeadCounts
        Query heads of the layer.
    target : HeadCounts
        Query heads to keep, at least one.
    method : {"exact", "diagonal"}
        See `unit_errors`.

    Returns
    -------
    Elimination
        Its units are query heads. Heads that were removed together share their joint error, so the
        sum of `errors` is exact.
    """
    steps = [_HeadElimination.remove_group] * (heads.groups - target.groups)
    steps += [_HeadElimination.remove_heads] * (heads.per_group - target.per_group)
    results = []
    for order in {tuple(steps): None, tuple(reversed(steps)): None}:
        state = _HeadElimination(problem, heads, heads.total - target.total, method)
        for step in order:
            step(state)
        results.append(state.elimination())
    return min(results, key=lambda left: float(left.errors.sum()))


def trace_heads(
    problem: Problem,
    heads: HeadCounts,
    params: HeadParams,
    num_params: int,
    method: Literal["exact", "diagonal"] = "exact",
) -> list[HeadState]:
    """Follow the steps of least error per removed parameter, for a sensitivity pass.

    The steps are those of `eliminate_heads`. Where both kinds are possible, one is tried on a copy
    of the state, so the whole path costs up to twice as much as its steps alone, and the memory of
    two eliminations. A step that removes P of K columns after R others takes O(P K (O + R))
    operations. With 8 groups of 4, the path to one query head takes about three times as long as
    `slimgpt.solver.hessian.prepare`, and the first third of it about as long.

    Parameters
    ----------
    problem, heads, method
        As in `eliminate_heads`.
    params : HeadParams
        Parameters of a query head and of a key/value head.
    num_params : int
        Parameters to remove. The path ends at the first state with as many removed, or with one
        query head left.

    Returns
    -------
    list of HeadState
        From the dense layer to the last state.
    """
    state = _HeadElimination(problem, heads, heads.total - 1, method)
    path = [HeadState(heads, 0, 0.0)]
    while path[-1].removed_params < num_params and state.heads.total > 1:
        *others, last = state.steps()
        trials = [step(state.clone()) for step in others] + [last(state)]
        errors = torch.stack([torch.cat(trial.errors).sum() for trial in trials]).tolist()
        ends = [
            HeadState(trial.heads, params.count(heads) - params.count(trial.heads), error)
            for trial, error in zip(trials, errors, strict=True)
        ]
        prices = [
            (end.error - path[-1].error) / (end.removed_params - path[-1].removed_params)
            for end in ends
        ]
        best = prices.index(min(prices))
        state = trials[best]
        path.append(ends[best])
    return path


def eliminate_channels(
    problem: Problem,
    num_remove: int,
    panel_size: int = 192,
    num_further: int = 0,
    first: Tensor | None = None,
) -> Elimination:
    """Remove single columns greedily, each time the one of least ‖w_j‖²/(H⁻¹)_jj.

    The next `panel_size` pivots are chosen among 1.5 times as many candidates: the columns of least
    error at present. This needs only the candidates' blocks of H⁻¹ and WᵀW. A few matrix products
    then update all columns (see `_EliminationState`). If a column outside the candidates would have
    had a smaller error than a pivot, this pivot and the later ones are discarded. The order is
    therefore the same as with one removal at a time.

    Parameters
    ----------
    problem : Problem
        The layer.
    num_remove : int
        Number of columns to remove.
    panel_size : int
        Pivots chosen at once; affects only the speed.
    num_further : int
        Number of further columns whose errors are computed; `order` and the weight exclude them.
    first : Tensor, optional
        Columns to remove before all others, at most `num_remove`.

    Returns
    -------
    Elimination
        Nested: the first n entries of `order` are the columns that an elimination of n removes.
    """
    stops = sorted({num_remove, num_remove + num_further})
    state = _EliminationState(problem, stops[-1])
    norms_K = _squares(state.weight_KO)
    inverse_K = problem.inverse_II.diagonal()
    order, errors, left = [], [], []
    num_removed = 0
    if first is not None and len(first):
        num_removed = len(first)
        root_FK, half_FO = state.factorize(first)
        order, errors = [first], [half_FO.square().sum(dim=1)]
        left_K = state.remove(first, root_FK, half_FO)
        norms_K = _squares(state.weight_KO)
        inverse_K = (inverse_K - root_FK.square().sum(dim=0))[left_K]
    for stop in stops:
        while num_removed < stop:
            size = min(panel_size, stop - num_removed)
            ranked_K = (norms_K.clamp(min=0) / inverse_K).argsort(stable=True)
            candidates_C = ranked_K[: 3 * size // 2].sort().values
            weight_CO = state.weight_KO[candidates_C].double()
            inverse_CC = state.inverse(candidates_C, candidates_C)
            chosen, errors_P = _eliminate_one_by_one(weight_CO @ weight_CO.T, inverse_CC, size)

            pivots_P = candidates_C[chosen]
            root_PK, half_PO = state.factorize(pivots_P)
            cross_PK = state.cross(root_PK, half_PO)
            norms_PK = norms_K - cross_PK.mul_(root_PK).mul_(2).cumsum_(dim=0)
            inverse_PK = inverse_K - root_PK.square().cumsum_(dim=0)
            others_PK = norms_PK[:-1].clamp(min=0) / inverse_PK[:-1]
            others_P = others_PK.index_fill_(1, candidates_C, torch.inf).amin(dim=1)
            valid = 1 + int((errors_P[1:] <= others_P).cumprod(dim=0).sum())

            num_removed += valid
            order.append(state.columns_K[pivots_P[:valid]])
            errors.append(errors_P[:valid])
            left_K = state.remove(pivots_P[:valid], root_PK[:valid], half_PO[:valid])
            norms_K, inverse_K = norms_PK[valid - 1, left_K], inverse_PK[valid - 1, left_K]
        left = left or [state.elimination(order, errors)]
    return left[0]._replace(errors=_joined(errors, left[0].errors))


def eliminate_channel_groups(
    problem: Problem, num_remove: int, min_group: int = 64, max_group: int = 1024
) -> Elimination:
    """Remove single columns in batches of least ‖w_j‖²/(H⁻¹)_jj (Dynamic Group Size).

    As in the code released with the paper: with c columns to remove, the first batch has
    (c − 512)/2 columns, and a batch after one of b columns has (b − 512)/2, clamped to the two
    bounds and to the number still to remove. W and H⁻¹ are updated after each batch.

    Parameters
    ----------
    problem : Problem
        The layer.
    num_remove : int
        Number of columns to remove.
    min_group, max_group : int
        Bounds of the size of a batch.
    """
    state = _EliminationState(problem, num_remove)
    inverse_K = problem.inverse_II.diagonal()
    order, errors = [], []
    group, left = num_remove, num_remove
    while left:
        group = min(max((group - 512) // 2, min_group), max_group)
        errors_K = _squares(state.weight_KO) / inverse_K
        pivots_P = errors_K.argsort(stable=True)[: min(group, left)]
        left -= len(pivots_P)
        order.append(state.columns_K[pivots_P])
        root_PK, half_PO = state.factorize(pivots_P)
        errors.append(half_PO.square().sum(dim=1))
        left_K = state.remove(pivots_P, root_PK, half_PO)
        inverse_K = (inverse_K - root_PK.square().sum(dim=0))[left_K]
    return state.elimination(order, errors)


def _joined(parts: list[Tensor], empty: Tensor) -> Tensor:
    """Join the parts, if there are any."""
    return torch.cat(parts) if parts else empty


def _cholesky(matrix_SS: Tensor) -> Tensor:
    """Factorise matrices; a factor is NaN where it fails, so that no device waits for a check."""
    factor_SS, failed = torch.linalg.cholesky_ex(matrix_SS)
    return factor_SS.masked_fill_((failed != 0)[..., None, None], torch.nan)


def _squares(weight_KO: Tensor) -> Tensor:
    """Squared norm of each row."""
    return torch.linalg.vector_norm(weight_KO, dim=1, dtype=torch.float64).square()


def _unit_grams(weight_IO: Tensor, unit_size: int) -> Tensor:
    """W_uᵀ W_u of each unit."""
    weight_USO = weight_IO.view(-1, unit_size, weight_IO.shape[1])
    return weight_USO @ weight_USO.mT


def _unit_blocks(inverse_II: Tensor, unit_size: int) -> Tensor:
    """The block of each unit on the diagonal of H⁻¹."""
    num_units = len(inverse_II) // unit_size
    inverse_USUS = inverse_II.view(num_units, unit_size, num_units, unit_size)
    return inverse_USUS.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def _unit_errors(grams_USS: Tensor, inverse_USS: Tensor, head_error: str) -> Tensor:
    factors_USS = _cholesky(inverse_USS)
    if head_error == "diagonal":
        pivots_US = factors_USS.diagonal(dim1=1, dim2=2)
        norms_US = grams_USS.diagonal(dim1=1, dim2=2).clamp(min=0)
        return (norms_US / pivots_US.square()).sum(dim=1)
    eye_SS = torch.eye(inverse_USS.shape[1], dtype=inverse_USS.dtype, device=inverse_USS.device)
    solved_USS = torch.linalg.solve_triangular(factors_USS, eye_SS, upper=False)
    return (solved_USS @ grams_USS).mul_(solved_USS).sum(dim=(1, 2)).clamp(min=0)


class _EliminationState:
    """State of an elimination: compensated weight of the remaining columns, and Cholesky rows.

    Let M be the inverse of H restricted to the remaining columns, P the columns removed next (the
    pivots), and L Lᵀ = M_PP. Then

        W ← W − Yᵀ R,  Y = L⁻¹ W_Pᵀ,
        M ← M − Rᵀ R,  R = L⁻¹ M_P:,

    and the error grows by ‖Y‖²_F; row i of Y is the share of pivot i, removed in this order. M
    itself is never updated. The state keeps the rows of R of all removals (together a Cholesky
    factor of H⁻¹) and forms blocks of M from them on demand. All numbers are float64, except W and
    products with W, which have the dtype of W: float32 is twice as fast, and as exact as the
    resulting weight. The last columns move into the places of the pivots, so that the remaining
    columns stay contiguous. Arguments are positions; `columns_K` maps them to indices.
    """

    def __init__(self, problem: Problem, capacity: int) -> None:
        weight_IO, inverse_II = problem.weight_OI.T, problem.inverse_II
        self.columns_K = torch.arange(len(weight_IO), device=weight_IO.device)
        self.weight_KO = weight_IO.clone(memory_format=torch.contiguous_format)
        self._root_KR = inverse_II.new_empty(len(inverse_II), capacity)
        self._num_removed = 0
        self._error = inverse_II.new_zeros(())
        self._problem = problem

    def clone(self) -> Self:
        """Copy the state; a removal from the copy leaves this one as it is."""
        other = copy.copy(self)
        other.columns_K, other.weight_KO = self.columns_K.clone(), self.weight_KO.clone()
        other._root_KR = torch.empty_like(self._root_KR)
        used = len(self.columns_K), self._num_removed
        other._root_KR[: used[0], : used[1]] = self._root_KR[: used[0], : used[1]]
        return other

    def inverse(self, rows: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """M at the rows and columns."""
        inverse_II, root_KR = self._problem.inverse_II, self._root_KR[:, : self._num_removed]
        block = inverse_II[self.columns_K[rows]][:, self.columns_K[columns]]
        return block.addmm_(root_KR[rows], root_KR[: len(self.columns_K)][columns].T, alpha=-1)

    def factorize(self, pivots_P: Tensor) -> tuple[Tensor, Tensor]:
        """R and Y for the removal of the pivots."""
        inverse_PK = self.inverse(pivots_P)
        factor_PP = _cholesky(inverse_PK[:, pivots_P])
        return (
            torch.linalg.solve_triangular(factor_PP, inverse_PK, upper=False),
            torch.linalg.solve_triangular(
                factor_PP, self.weight_KO[pivots_P].double(), upper=False
            ),
        )

    def cross(self, root_PK: Tensor, half_PO: Tensor) -> Tensor:
        """Q for the removal of the pivots, which updates A = WᵀW to A − Qᵀ R − Rᵀ Q.

        Q = Y W − T R, where T + Tᵀ = Y Yᵀ. T is lower triangular, so the first rows of Q are also
        valid for the first pivots alone.
        """
        inner_PP = half_PO @ half_PO.T
        inner_PP.diagonal().mul_(0.5)
        product_PK = half_PO.to(self.weight_KO) @ self.weight_KO.T
        return product_PK.to(root_PK).addmm_(inner_PP.tril_(), root_PK, alpha=-1)

    def remove(self, pivots_P: Tensor, root_PK: Tensor, half_PO: Tensor) -> Tensor:
        """Remove pivots; return the old positions of the remaining columns, in their new order."""
        num_left = len(self.columns_K) - len(pivots_P)
        # The remaining ones of the last columns, then pivots among these. They come into the places
        # of the pivots in order; there are as many pivots, and the last ones are cut off.
        is_gone_K = torch.zeros_like(self.columns_K).index_fill_(0, pivots_P, 1)
        last_P = num_left + is_gone_K[num_left:].argsort(stable=True)
        free_P = pivots_P.sort().values
        left_K = torch.arange(len(self.columns_K), device=pivots_P.device)
        left_K = left_K.index_copy_(0, free_P, last_P)[:num_left]

        dtype = self.weight_KO.dtype
        self.weight_KO.addmm_(root_PK.T.to(dtype), half_PO.to(dtype), alpha=-1)
        end = self._num_removed + len(pivots_P)
        self._root_KR[: len(self.columns_K), self._num_removed : end] = root_PK.T
        self._num_removed = end
        removed_P = self.columns_K[pivots_P]
        damping_error = self._damping_error(removed_P, 0)
        self._error = self._error + (half_PO.square().sum() - damping_error)
        for rows in (self.columns_K, self.weight_KO, self._root_KR[:, :end]):
            rows.index_copy_(0, free_P, rows[last_P])
        self.columns_K, self.weight_KO = self.columns_K[:num_left], self.weight_KO[:num_left]
        return left_K

    def _damping_error(self, columns_K: Tensor, weight_KO: Tensor | float) -> Tensor:
        """Contribution of some columns to the damping term tr(ΔW D ΔWᵀ)."""
        change_KO = self._problem.weight_OI.T[columns_K].sub_(weight_KO)
        return self._problem.added_I[columns_K] @ _squares(change_KO)

    def elimination(self, order: list[Tensor], errors: list[Tensor]) -> Elimination:
        """The result: the removed units and the compensated weight.

        Raises
        ------
        NumericalError
            If a block of M was not positive definite, or a weight is not finite.
        """
        kept_K, positions_K = self.columns_K.sort()
        weight_KO = self.weight_KO[positions_K]
        error = float(self._error - self._damping_error(kept_K, weight_KO))
        if math.isnan(error):
            raise NumericalError(
                f"the error is not a number after {self._num_removed} of "
                f"{len(self._problem.added_I)} columns were removed: the Hessian is nearly "
                "singular, or a weight is not finite",
                hint="use more calibration tokens, or a higher --damping",
            )
        return Elimination(
            _joined(order, self.columns_K[:0]),
            _joined(errors, self._error[None][:0]),
            kept_K,
            weight_KO.T,
            max(error, 0.0),
        )


class _UnitElimination:
    """Elimination of units of several columns.

    Keeps the blocks of M and of A = WᵀW on the diagonal of each remaining unit up to date.
    """

    def __init__(self, problem: Problem, unit_size: int, capacity: int) -> None:
        self.state = _EliminationState(problem, capacity * unit_size)
        self.order: list[Tensor] = []
        self.errors: list[Tensor] = []
        self._unit_size = unit_size
        self._inverse_USS = _unit_blocks(problem.inverse_II, unit_size)
        self._grams_USS = _unit_grams(self.state.weight_KO, unit_size).to(self._inverse_USS)

    def unit_errors(self, method: str) -> Tensor:
        """Error of removing each unit alone, by position."""
        return _unit_errors(self._grams_USS, self._inverse_USS, method)

    def remove(self, units: Tensor) -> None:
        """Remove the units at some positions together; `errors` is exact, each unit's share."""
        size = self._unit_size
        pivots_P = self.columns(units).flatten()
        self.order += (self.state.columns_K[pivots_P[::size]] // size).split(1)
        root_PK, half_PO = self.state.factorize(pivots_P)
        self.errors += [half_SO.square().sum()[None] for half_SO in half_PO.split(size)]
        root_UPS, cross_UPS = (
            rows_PK.view(len(pivots_P), -1, size).transpose(0, 1)
            for rows_PK in (root_PK, self.state.cross(root_PK, half_PO))
        )
        self._inverse_USS.baddbmm_(root_UPS.mT, root_UPS, alpha=-1)
        lost_USS = cross_UPS.mT @ root_UPS
        self._grams_USS -= lost_USS + lost_USS.mT
        left_U = self.state.remove(pivots_P, root_PK, half_PO)[::size] // size
        self._inverse_USS, self._grams_USS = self._inverse_USS[left_U], self._grams_USS[left_U]

    def columns(self, units: Tensor) -> Tensor:
        """Positions of the columns of units; one more dimension."""
        size = self._unit_size
        return units[..., None] * size + torch.arange(size, device=units.device)

    def elimination(self) -> Elimination:
        """The result so far."""
        return self.state.elimination(self.order, self.errors)


class _HeadElimination(_UnitElimination):
    """Elimination of query heads that leaves equally many in each remaining group."""

    def __init__(self, problem: Problem, heads: HeadCounts, capacity: int, method: str) -> None:
        super().__init__(problem, len(problem.added_I) // heads.total, capacity)
        self.heads = heads
        self._dense, self._method = heads, method

    def clone(self) -> Self:
        """Copy; a removal from the copy leaves this one as it is."""
        other = copy.copy(self)
        other.state = self.state.clone()
        other.order, other.errors = self.order.copy(), self.errors.copy()
        # `remove` updates these in place.
        other._inverse_USS, other._grams_USS = self._inverse_USS.clone(), self._grams_USS.clone()
        return other

    def steps(self) -> list[Callable[[Self], Self]]:
        """The kinds of removal that leave a query head."""
        groups = [type(self).remove_group] if self.heads.groups > 1 else []
        return groups + ([type(self).remove_heads] if self.heads.per_group > 1 else [])

    def remove_group(self) -> Self:
        """Remove the group of least error, with all its query heads."""
        units_GU = self._remaining().argsort().view(self.heads)
        columns_GS = self.columns(units_GU).flatten(1)
        inverse_GSS = torch.stack([self.state.inverse(c, c) for c in columns_GS])
        weight_GSO = self.state.weight_KO[columns_GS]
        grams_GSS = (weight_GSO @ weight_GSO.mT).to(inverse_GSS)
        self.remove(units_GU[_unit_errors(grams_GSS, inverse_GSS, self._method).argmin()])
        self.heads = self.heads._replace(groups=self.heads.groups - 1)
        return self

    def remove_heads(self) -> Self:
        """Remove one query head of each group, each time the one of least error."""
        served_G = torch.zeros(self._dense.groups, dtype=torch.bool, device=self._grams_USS.device)
        for _ in range(self.heads.groups):
            groups_U = self._remaining() // self._dense.per_group
            errors_U = self.unit_errors(self._method).masked_fill(served_G[groups_U], torch.inf)
            least = errors_U.argmin()
            served_G[groups_U[least]] = True
            self.remove(least[None])
        self.heads = self.heads._replace(per_group=self.heads.per_group - 1)
        return self

    def _remaining(self) -> Tensor:
        """The query head at each position."""
        return self.state.columns_K[:: self._unit_size] // self._unit_size


def _eliminate_one_by_one(
    gram_CC: Tensor, inverse_CC: Tensor, num_remove: int
) -> tuple[list[int], Tensor]:
    """Choose pivots one at a time by least ‖w_j‖²/M_jj, from small blocks of WᵀW and M.

    With A = WᵀW, the removal of pivot p is M ← M − r rᵀ and A ← A − q rᵀ − r qᵀ, where
    r = M_:p/√M_pp and q = A_:p/√M_pp − ½ (A_pp/M_pp) r. Only the diagonals are updated; full rows
    are formed only for pivots. Runs in numpy on the CPU, where a call has the least overhead.
    """
    gram, inverse = torch.stack((gram_CC, inverse_CC)).numpy(force=True)
    norms, pivots = gram.diagonal().copy(), inverse.diagonal().copy()
    r, q = np.empty((2, num_remove, len(norms)))
    order, errors = [], []
    for k in range(num_remove):
        scores = norms.clip(min=0) / pivots
        p = int(scores.argmin())
        order.append(p)
        errors.append(scores[p])
        r_p, q_p, root = r[:k, p], q[:k, p], np.sqrt(pivots[p])
        r[k] = (inverse[p] - r_p @ r[:k]) / root
        q[k] = (gram[p] - q_p @ r[:k] - r_p @ q[:k]) / root
        q[k] -= (q[k, p] / root / 2) * r[k]
        norms -= 2 * r[k] * q[k]
        pivots -= r[k] ** 2
        norms[p], pivots[p] = np.inf, 1.0
    return order, gram_CC.new_tensor(errors)
