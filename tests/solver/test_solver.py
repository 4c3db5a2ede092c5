"""The solver against brute force: explicit inverses and least squares in float64."""

import copy
from collections.abc import Iterable
from functools import reduce
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimgpt.errors import NumericalError
from slimgpt.solver import elimination
from slimgpt.solver.elimination import HeadCounts, HeadParams, HeadState
from slimgpt.solver.hessian import MAX_DAMPING, Damping, Problem, Target, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

fixed = settings(derandomize=True, deadline=None, database=None, max_examples=20)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 14)


def layer(seed: int, num_in: int, num_out: int = 5, num_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """W and the tokens X of a layer: correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.eye(num_in) + 0.5 * normal(num_in, num_in) / num_in**0.5
    tokens = normal(num_tokens or 3 * num_in, num_in) @ mixing * normal(num_in).exp()
    return normal(num_out, num_in), tokens


def second_moment(tokens: Tensor) -> Tensor:
    return tokens.T @ tokens / len(tokens)


def damped(hessian: Tensor, solved: Problem) -> Tensor:
    return hessian.double() + torch.diag(solved.added_I)


def problem(seed: int, num_in: int, num_out: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """W, H with damping, and its inverse."""
    weight, tokens = layer(seed, num_in, num_out)
    hessian = second_moment(tokens)
    solved = prepare(weight, hessian)
    return solved.weight_OI, damped(hessian, solved), solved.inverse_II


def undamped(weight: Tensor, hessian: Tensor) -> Problem:
    """The problem of a matrix that needs no damping."""
    power = float(torch.trace(weight @ hessian @ weight.T))
    return Problem(weight, torch.linalg.inv(hessian), hessian.new_zeros(len(hessian)), power, 0.0)


def output_error(weight: Tensor, hessian: Tensor, kept: Tensor, new_weight: Tensor) -> float:
    """tr(ΔW H ΔWᵀ)."""
    change = weight.to(torch.float64, copy=True)
    change[:, kept] -= new_weight
    return float(torch.trace(change @ hessian @ change.T))


def split(seed: int, num_in: int, num_kept: int) -> tuple[Tensor, Tensor]:
    """Kept and removed columns, both sorted."""
    columns = torch.randperm(num_in, generator=torch.Generator().manual_seed(seed))
    return columns[:num_kept].sort().values, columns[num_kept:].sort().values


def others(columns: Tensor, num_in: int) -> Tensor:
    """All columns but these, sorted."""
    return torch.tensor([i for i in range(num_in) if i not in columns], dtype=torch.long)


def least_squares(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    return weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])


def obs_error(weight: Tensor, inverse: Tensor, removed: Tensor) -> Tensor:
    block = torch.linalg.inv(inverse[removed][:, removed])
    return torch.trace(weight[:, removed] @ block @ weight[:, removed].T)


def diagonal_error(weight: Tensor, inverse: Tensor, unit: Tensor) -> Tensor:
    """Σ_j ‖w_j‖²/(L_jj)², where (L_jj)² is the last pivot of the leading j × j block."""
    block = inverse[unit][:, unit]
    pivots = [1 / torch.linalg.inv(block[: j + 1, : j + 1])[j, j] for j in range(len(unit))]
    return sum(weight[:, c].square().sum() / p for c, p in zip(unit, pivots, strict=True))


def unit_columns(order: Tensor, unit_size: int) -> Tensor:
    """Columns of units."""
    return (order[:, None] * unit_size + torch.arange(unit_size)).flatten()


def total_errors(weight: Tensor, inverse: Tensor, order: list[int], unit_size: int = 1) -> Tensor:
    """Error of removing the first unit, the first two, and so on."""
    columns = unit_columns(torch.tensor(order), unit_size)
    ends = range(unit_size, len(columns) + 1, unit_size)
    return torch.stack([obs_error(weight, inverse, columns[:end]) for end in ends])


REFERENCE_ERRORS = {"exact": obs_error, "diagonal": diagonal_error}


def greedy(
    weight: Tensor, hessian: Tensor, batches: list[int], unit_size: int = 1, method: str = "exact"
) -> tuple[list[int], Tensor]:
    """Removes batches of units; all that is left is solved anew before each batch."""
    alive = list(range(len(hessian) // unit_size))
    order, errors = [], []
    for size in batches:
        kept = torch.tensor([u * unit_size + s for u in alive for s in range(unit_size)])
        solved = least_squares(weight, hessian, kept)
        inverse = torch.linalg.inv(hessian[kept][:, kept])
        if unit_size == 1:
            scores = solved.square().sum(dim=0) / inverse.diagonal()
        else:
            units = torch.arange(len(kept)).view(-1, unit_size)
            scores = torch.stack([REFERENCE_ERRORS[method](solved, inverse, u) for u in units])
        for position in scores.argsort()[:size].tolist():
            order.append(alive[position])
            errors.append(scores[position])
        alive = [u for u in alive if u not in order]
    return order, torch.stack(errors)


def documented_batches(num_remove: int, smallest: int, largest: int) -> list[int]:
    batches, group = [], num_remove
    while sum(batches) < num_remove:
        group = min(max((group - 512) // 2, smallest), largest)
        batches.append(min(group, num_remove - sum(batches)))
    return batches


def close(actual: Tensor | float, expected: Tensor | float, rtol: float = 1e-7) -> None:
    """Equal up to rounding, relative to the largest entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    actual = torch.as_tensor(actual, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * scale)


def rounding(hessian: Tensor) -> float:
    """Bound of the relative error of solutions in float64, in columns of E x² = 1.

    The error of Cholesky factors grows with the condition of H after such a scaling.
    """
    scale = hessian.diagonal().rsqrt()
    condition = float(torch.linalg.cond(hessian * scale * scale[:, None]))
    return torch.finfo(torch.float64).eps * len(hessian) * condition


# Compensation and error


@st.composite
def reductions(draw: st.DrawFn, num_heads: int) -> tuple[HeadCounts, HeadCounts]:
    """Query heads before and after a removal of at least one."""
    groups = draw(st.sampled_from([g for g in range(1, num_heads + 1) if num_heads % g == 0]))
    heads = HeadCounts(groups, num_heads // groups)
    targets = [HeadCounts(g + 1, h + 1) for g, h in product(*map(range, heads))][:-1]
    return heads, draw(st.sampled_from(targets))


def eliminations(solved: Problem, data: st.DataObject) -> list[elimination.Elimination]:
    """Every way to remove some columns, by units of which there are at least two."""
    num_in = len(solved.added_I)
    unit_size = data.draw(st.sampled_from([s for s in range(1, num_in) if num_in % s == 0]))
    num_units = data.draw(st.integers(1, num_in // unit_size - 1))
    num_channels = data.draw(st.integers(1, num_in - 1))
    return [
        elimination.eliminate_units(solved, num_units, unit_size),
        elimination.eliminate_units(solved, num_units, unit_size, "diagonal"),
        elimination.eliminate_channels(solved, num_channels, data.draw(st.integers(1, 20))),
        elimination.eliminate_channel_groups(solved, num_channels, 2, 5),
        elimination.eliminate_heads(solved, *data.draw(reductions(num_in // unit_size))),
    ]


@fixed
@given(seeds, sizes, st.data(), st.sampled_from([1e-4, 0.01, 0.1]))
def test_compensation_is_least_squares_on_data(seed, num_in, data, damping):
    weight, tokens = layer(seed, num_in)
    hessian = second_moment(tokens)
    damping_rows = torch.diag((damping * hessian.diagonal()).sqrt())
    rows = torch.cat([tokens / len(tokens) ** 0.5, damping_rows])
    for left in eliminations(prepare(weight, hessian, Damping(damping)), data):
        expected = torch.linalg.lstsq(rows[:, left.kept_K], rows @ weight.T).solution.T
        close(left.weight_OK, expected)


@fixed
@given(seeds, sizes, st.data())
def test_compensation_is_the_obs_update(seed, num_in, data):
    weight, hessian, inverse = problem(seed, num_in)
    for left in eliminations(undamped(weight, hessian), data):
        removed = others(left.kept_K, num_in)
        block = torch.linalg.inv(inverse[removed][:, removed])
        update = weight[:, removed] @ block @ inverse[removed][:, left.kept_K]
        close(left.weight_OK, weight[:, left.kept_K] - update)
        close(left.weight_OK, least_squares(weight, hessian, left.kept_K))


@fixed
@given(seeds, sizes, st.data())
def test_kept_columns_are_those_not_removed(seed, num_in, data):
    weight, hessian, _ = problem(seed, num_in)
    for left in eliminations(undamped(weight, hessian), data):
        unit_size = (num_in - len(left.kept_K)) // len(left.order)
        removed = unit_columns(left.order, unit_size)
        assert left.kept_K.tolist() == others(removed, num_in).tolist()


@fixed
@given(seeds, sizes, st.data(), st.sampled_from([1e-4, 0.01, 0.1]), st.floats(0, 1))
def test_correction_goes_toward_least_squares_for_the_target(
    seed, num_in, data, damping, correction
):
    weight, tokens = layer(seed, num_in)
    hessian = second_moment(tokens)
    output = tokens @ weight.T
    target = output + torch.randn(output.shape, dtype=torch.float64) + tokens[:, :1]
    # What the damping adds keeps its own output as the target.
    damping_rows = torch.diag((damping * hessian.diagonal()).sqrt())
    rows = torch.cat([tokens / len(tokens) ** 0.5, damping_rows])
    corrected = torch.lerp(output, target, correction)
    goal = torch.cat([corrected / len(tokens) ** 0.5, damping_rows @ weight.T])
    expected = torch.linalg.lstsq(rows, goal).solution.T

    cross = target.T @ tokens / len(tokens)
    solved = prepare(weight, hessian, Damping(damping), Target(cross, correction))
    close(solved.weight_OI, expected)
    power = (tokens @ expected.T).square().sum(dim=1).mean()
    assert solved.power == pytest.approx(float(power), rel=1e-5)
    for left in eliminations(solved, data):
        expected = torch.linalg.lstsq(rows[:, left.kept_K], goal).solution.T
        close(left.weight_OK, expected)


@fixed
@given(seeds, sizes, st.data())
def test_error_after_compensation_is_the_obs_error(seed, num_in, data):
    weight, hessian, inverse = problem(seed, num_in)
    for left in eliminations(undamped(weight, hessian), data):
        close(left.error, obs_error(weight, inverse, others(left.kept_K, num_in)))
        close(left.error, output_error(weight, hessian, left.kept_K, left.weight_OK))


@fixed
@given(seeds, sizes, st.data(), st.sampled_from([1e-4, 0.01, 0.1]))
def test_error_is_measured_on_tokens(seed, num_in, data, damping):
    """Without what the damping adds, and next to the mean square of the output."""
    weight, tokens = layer(seed, num_in)
    solved = prepare(weight, second_moment(tokens), Damping(damping))
    dense = tokens @ weight.T
    power = dense.square().sum(dim=1).mean()
    assert solved.power == pytest.approx(float(power), rel=1e-5)
    for left in eliminations(solved, data):
        change = (tokens[:, left.kept_K] @ left.weight_OK.T - dense).square().sum(dim=1).mean()
        assert left.error == pytest.approx(float(change), rel=1e-7, abs=1e-10 * float(power))


# Bias


def layer_with_bias(seed: int, num_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, b, and tokens X whose means are as large as their deviations."""
    weight, tokens = layer(seed, num_in)
    offset, _ = layer(seed + 1, num_in, 1)
    return weight, weight.sum(dim=1), tokens + offset * tokens.std(dim=0)


@fixed
@given(seeds, sizes, st.data(), st.sampled_from([1e-4, 0.01, 0.1]), st.floats(0, 1))
def test_bias_and_weight_are_least_squares_with_an_intercept(
    seed, num_in, data, damping, correction
):
    weight, bias, tokens = layer_with_bias(seed, num_in)
    output = tokens @ weight.T
    other, _ = layer(seed + 2, num_in)
    target = 1 + output + torch.tanh(tokens @ other.T)
    cross = target.T @ tokens / len(tokens)
    solved = prepare(
        weight,
        second_moment(tokens),
        Damping(damping),
        Target(cross, correction, target.mean(dim=0)),
        tokens.mean(dim=0),
    )

    # The last column is the intercept, which is not damped.
    damping_rows = torch.diag(solved.added_I.sqrt())
    ones = torch.ones(len(tokens), 1, dtype=torch.float64)
    rows = torch.cat(
        [
            torch.cat([tokens, ones], dim=1) / len(tokens) ** 0.5,
            torch.cat([damping_rows, torch.zeros(num_in, 1)], dim=1),
        ]
    )
    goal = torch.cat(
        [
            (torch.lerp(output, target, correction) + bias) / len(tokens) ** 0.5,
            damping_rows @ weight.T,
        ]
    )
    expected = torch.linalg.lstsq(rows, goal).solution.T
    close(solved.weight_OI, expected[:, :-1])
    power = (tokens @ expected[:, :-1].T).square().sum(dim=1).mean()
    assert solved.power == pytest.approx(float(power), rel=1e-5)
    for left in eliminations(solved, data):
        columns = torch.cat([left.kept_K, torch.tensor([num_in])])
        expected = torch.linalg.lstsq(rows[:, columns], goal).solution.T
        close(left.weight_OK, expected[:, :-1])
        close(elimination.compensated_bias(solved, left, bias), expected[:, -1])


@fixed
@given(seeds, sizes, st.data(), st.sampled_from([1e-4, 0.01, 0.1]))
def test_error_with_a_bias_is_measured_on_tokens(seed, num_in, data, damping):
    weight, bias, tokens = layer_with_bias(seed, num_in)
    mean = tokens.mean(dim=0)
    solved = prepare(weight, second_moment(tokens), Damping(damping), mean_I=mean)
    assert torch.equal(solved.weight_OI, weight)
    dense = tokens @ weight.T + bias
    for left in eliminations(solved, data):
        new_bias = elimination.compensated_bias(solved, left, bias)
        change = tokens[:, left.kept_K] @ left.weight_OK.T + new_bias - dense
        assert change.mean(dim=0).abs().max() <= 1e-9 * dense.abs().max()
        error = float(change.square().sum(dim=1).mean())
        assert left.error == pytest.approx(error, rel=1e-7, abs=1e-10 * solved.power)


@fixed
@given(seeds, sizes)
def test_a_bias_makes_the_mean_of_the_input_irrelevant(seed, num_in):
    weight, _, tokens = layer_with_bias(seed, num_in)
    centred = tokens - tokens.mean(dim=0)
    left, expected = (
        elimination.eliminate_channels(
            prepare(weight, second_moment(x), mean_I=x.mean(dim=0)), num_in - 1
        )
        for x in (tokens, centred)
    )
    assert left.order.tolist() == expected.order.tolist()
    close(left.errors, expected.errors)
    close(left.weight_OK, expected.weight_OK)


@pytest.mark.parametrize("mode", ["relative", "mean"])
def test_damping_with_a_bias_is_relative_to_the_variance(mode):
    weight, tokens = layer(0, 8)
    tokens[:, 3] = 2.0  # almost no variance, so that there is a least damping
    tokens[:, 4] += 1.0
    mean = tokens.mean(dim=0)
    scale = tokens.var(dim=0, correction=0)
    scale[3] = 4e-3
    expected = scale if mode == "relative" else scale.mean().expand(8)
    solved = prepare(weight, second_moment(tokens), Damping(0.02, mode), mean_I=mean)
    close(solved.added_I, 0.02 * expected, 1e-12)
    covariance = torch.cov(tokens.T, correction=0) + torch.diag(solved.added_I)
    close(solved.inverse_II, torch.linalg.inv(covariance))


def test_the_bias_stands_in_for_a_constant_input():
    weight, tokens = layer(0, 8)
    tokens[:, 3] = 2.0
    solved = prepare(weight, second_moment(tokens), mean_I=tokens.mean(dim=0))
    bias = torch.ones(5, dtype=torch.float64)
    left = elimination.eliminate_channels(solved, 1)
    assert left.order.tolist() == [3]
    assert left.error <= 1e-12 * solved.power
    close(left.weight_OK, weight[:, left.kept_K])
    close(elimination.compensated_bias(solved, left, bias), bias + 2 * weight[:, 3])


@fixed
@given(seeds, st.integers(4, 14))
def test_large_means_in_float32_need_no_more_damping(seed, num_in):
    """The variance of an input is far below the rounding of its mean square."""
    weight, tokens = layer(seed, num_in, num_tokens=100)
    tokens = (1e4 + tokens).float()
    hessian, mean = second_moment(tokens), tokens.mean(dim=0, dtype=torch.float64)
    solved = prepare(weight, hessian, mean_I=mean)
    assert solved.damping == 0.01
    left = elimination.eliminate_channels(solved, num_in // 2)
    assert left.weight_OK.isfinite().all()
    assert 0 <= left.error < torch.inf


def test_without_a_mean_the_bias_stays():
    weight, bias, tokens = layer_with_bias(0, 8)
    solved = prepare(weight, second_moment(tokens))
    left = elimination.eliminate_channels(solved, 3)
    assert elimination.compensated_bias(solved, left, bias) is bias


def test_target_of_a_layer_with_a_bias_needs_its_mean():
    weight, _, tokens = layer_with_bias(0, 8)
    hessian = second_moment(tokens)
    with pytest.raises(ValueError, match="mean"):
        prepare(weight, hessian, target=Target(weight @ hessian, 1.0), mean_I=tokens.mean(dim=0))


# Errors of units


@pytest.mark.parametrize("method", ["exact", "diagonal"])
@pytest.mark.parametrize("unit_size", [1, 2, 3, 5])
@fixed
@given(seed=seeds, num_units=st.integers(1, 4))
def test_unit_errors(method, unit_size, seed, num_units):
    weight, _, inverse = problem(seed, num_units * unit_size)
    units = torch.arange(num_units * unit_size).view(num_units, unit_size)
    expected = torch.stack([REFERENCE_ERRORS[method](weight, inverse, u) for u in units])
    close(elimination.unit_errors(weight, inverse, unit_size, method), expected)


@fixed
@given(seeds, sizes)
def test_unit_errors_of_single_columns(seed, num_in):
    weight, _, inverse = problem(seed, num_in)
    expected = weight.square().sum(dim=0) / inverse.diagonal()
    close(elimination.unit_errors(weight, inverse, 1, "exact"), expected, 1e-12)
    close(elimination.unit_errors(weight, inverse, 1, "diagonal"), expected, 1e-12)


# Elimination


@pytest.mark.parametrize("panel_size", [1, 2, 5, 64, 1000])
@fixed
@given(seed=seeds, num_in=sizes, num_out=st.integers(1, 8), data=st.data())
def test_channels_are_eliminated_greedily(panel_size, seed, num_in, num_out, data):
    weight, hessian, _ = problem(seed, num_in, num_out)
    num_remove = data.draw(st.integers(1, num_in))
    order, errors = greedy(weight, hessian, [1] * num_remove)
    actual = elimination.eliminate_channels(undamped(weight, hessian), num_remove, panel_size)
    assert actual.order.tolist() == order
    close(actual.errors, errors)


def test_many_channels_are_eliminated_greedily_in_default_panels():
    weight, hessian, _ = problem(0, 320, 20)
    order, errors = greedy(weight, hessian, [1] * 320)
    actual = elimination.eliminate_channels(undamped(weight, hessian), 320)
    assert actual.order.tolist() == order
    close(actual.errors, errors)


@fixed
@given(seeds, sizes, st.sampled_from([1, 3, 64]))
def test_errors_of_channels_add_up(seed, num_in, panel_size):
    weight, hessian, inverse = problem(seed, num_in)
    order, errors, *_ = elimination.eliminate_channels(
        undamped(weight, hessian), num_in, panel_size
    )
    close(errors.cumsum(dim=0), total_errors(weight, inverse, order.tolist()))


@pytest.mark.parametrize("method", ["exact", "diagonal"])
@fixed
@given(seed=seeds, num_units=st.integers(2, 5), unit_size=st.integers(1, 4))
def test_errors_of_units_add_up(method, seed, num_units, unit_size):
    weight, hessian, inverse = problem(seed, num_units * unit_size)
    solved = undamped(weight, hessian)
    order, errors, *_ = elimination.eliminate_units(solved, num_units, unit_size, method)
    close(errors.cumsum(dim=0), total_errors(weight, inverse, order.tolist(), unit_size))


@fixed
@given(seeds, sizes, st.integers(1, 20), st.data())
def test_elimination_is_nested(seed, num_in, panel_size, data):
    weight, hessian, _ = problem(seed, num_in)
    fewer = data.draw(st.integers(0, num_in))
    scale, rtol = hessian.diagonal().sqrt(), rounding(hessian)
    for eliminate, option in (
        (elimination.eliminate_channels, panel_size),
        (elimination.eliminate_units, 1),
    ):
        full = eliminate(undamped(weight, hessian), num_in, option)
        part = eliminate(undamped(weight, hessian), fewer, option)
        assert part.order.tolist() == full.order[:fewer].tolist()
        close(part.errors, full.errors[:fewer])
        further = eliminate(undamped(weight, hessian), fewer, option, num_further=num_in - fewer)
        close(further.errors, full.errors)
        assert further.order.tolist() == part.order.tolist()
        assert further.kept_K.tolist() == part.kept_K.tolist()
        # The same products of other places in memory, so kernels may round otherwise.
        scale_K = scale[part.kept_K]
        close(further.weight_OK * scale_K, part.weight_OK * scale_K, rtol)
        close(further.error, part.error, rtol)


@pytest.mark.parametrize("method", ["exact", "diagonal"])
@fixed
@given(seed=seeds, num_units=st.integers(1, 5), unit_size=st.integers(1, 4), data=st.data())
def test_units_are_eliminated_greedily(method, seed, num_units, unit_size, data):
    weight, hessian, _ = problem(seed, num_units * unit_size)
    num_remove = data.draw(st.integers(1, num_units))
    order, scores = greedy(weight, hessian, [1] * num_remove, unit_size, method)
    actual = elimination.eliminate_units(undamped(weight, hessian), num_remove, unit_size, method)
    assert actual.order.tolist() == order
    if method == "exact":
        close(actual.errors, scores)


@fixed
@given(seeds, sizes, st.integers(1, 5), st.integers(0, 5), st.data())
def test_channel_groups(seed, num_in, smallest, more, data):
    weight, hessian, inverse = problem(seed, num_in)
    num_remove = data.draw(st.integers(1, num_in))
    batches = documented_batches(num_remove, smallest, smallest + more)
    order, _ = greedy(weight, hessian, batches)
    actual = elimination.eliminate_channel_groups(
        undamped(weight, hessian), num_remove, smallest, smallest + more
    )
    assert actual.order.tolist() == order
    close(actual.errors.cumsum(dim=0), total_errors(weight, inverse, order))


@pytest.mark.parametrize(
    ("num_remove", "smallest", "largest", "first_batches"),
    [
        (601, 32, 1024, [44, 32]),
        (600, 32, 40, [40, 32]),
        (1560, 250, 1024, [524, 250]),
    ],
)
def test_channel_groups_shrink(num_remove, smallest, largest, first_batches):
    weight, hessian, inverse = problem(0, num_remove + 10, 3)
    batches = documented_batches(num_remove, smallest, largest)
    assert batches[: len(first_batches)] == first_batches
    order, _ = greedy(weight, hessian, batches)
    actual = elimination.eliminate_channel_groups(
        undamped(weight, hessian), num_remove, smallest, largest
    )
    assert actual.order.tolist() == order
    close(actual.errors.sum(), obs_error(weight, inverse, torch.tensor(order)), 1e-6)


@fixed
@given(seeds, sizes)
def test_channel_groups_of_one_are_greedy(seed, num_in):
    weight, hessian, _ = problem(seed, num_in)
    singles = elimination.eliminate_channels(undamped(weight, hessian), num_in)
    groups = elimination.eliminate_channel_groups(undamped(weight, hessian), num_in, 1, 1)
    assert groups.order.tolist() == singles.order.tolist()
    close(groups.errors, singles.errors)


# Query heads

head_counts = st.builds(HeadCounts, st.integers(1, 3), st.integers(1, 3))
head_dims = st.integers(1, 3)


def head_problem(seed: int, heads: HeadCounts, head_dim: int) -> tuple[Problem, Tensor]:
    weight, hessian, _ = problem(seed, heads.total * head_dim)
    return undamped(weight, hessian), hessian


class Reference:
    """Removal of query heads; each error is a new closed-form solution for the removed set."""

    def __init__(self, solved: Problem, heads: HeadCounts) -> None:
        self.solved, self.dense, self.heads = solved, heads, heads
        self.head_dim = len(solved.added_I) // heads.total
        self.removed: list[int] = []

    def error(self, removed: Iterable[int]) -> float:
        columns = unit_columns(torch.tensor(sorted(removed), dtype=torch.long), self.head_dim)
        return float(obs_error(self.solved.weight_OI, self.solved.inverse_II, columns))

    def groups(self) -> list[list[int]]:
        """The remaining query heads of each remaining group."""
        units = range(self.dense.total)
        rows = [units[i : i + self.dense.per_group] for i in units[:: self.dense.per_group]]
        left = [[head for head in row if head not in self.removed] for row in rows]
        return [row for row in left if row]

    def without_group(self) -> "Reference":
        other = copy.copy(self)
        least = min(self.groups(), key=lambda group: self.error(self.removed + group))
        other.removed = self.removed + least
        other.heads = self.heads._replace(groups=self.heads.groups - 1)
        return other

    def without_heads(self) -> "Reference":
        other, groups = copy.copy(self), self.groups()
        while groups:
            heads = [head for group in groups for head in group]
            least = min(heads, key=lambda head: self.error([*other.removed, head]))
            other.removed = [*other.removed, least]
            groups = [group for group in groups if least not in group]
        other.heads = self.heads._replace(per_group=self.heads.per_group - 1)
        return other

    def reduced(self, target: HeadCounts) -> "Reference":
        """The better of the two orders."""
        kinds = [Reference.without_group] * (self.heads.groups - target.groups)
        kinds += [Reference.without_heads] * (self.heads.per_group - target.per_group)
        orders = kinds, kinds[::-1]
        ends = [reduce(lambda state, kind: kind(state), order, self) for order in orders]
        return min(ends, key=lambda end: self.error(end.removed))

    def best_of_all(self, target: HeadCounts) -> float:
        """Least error of all sets that leave so many query heads."""
        errors = []
        units = range(self.dense.per_group)
        for groups in combinations(range(self.dense.groups), target.groups):
            for kept in product(combinations(units, target.per_group), repeat=target.groups):
                left = {
                    group * self.dense.per_group + head
                    for group, chosen in zip(groups, kept, strict=True)
                    for head in chosen
                }
                errors.append(self.error(set(range(self.dense.total)) - left))
        return min(errors)


@fixed
@given(seeds, head_counts.filter(lambda heads: heads.total > 1), head_dims, st.data())
def test_heads_are_eliminated_as_by_brute_force(seed, heads, head_dim, data):
    solved, hessian = head_problem(seed, heads, head_dim)
    targets = [HeadCounts(g + 1, h + 1) for g, h in product(*map(range, heads))]
    target = data.draw(st.sampled_from(targets))
    reference = Reference(solved, heads).reduced(target)
    left = elimination.eliminate_heads(solved, heads, target)

    assert sorted(left.order.tolist()) == sorted(reference.removed)
    kept_heads = left.kept_K.view(-1, head_dim)[:, 0] // head_dim
    groups = (kept_heads // heads.per_group).bincount()
    assert groups[groups > 0].tolist() == [target.per_group] * target.groups
    assert left.kept_K.tolist() == others(unit_columns(left.order, head_dim), len(hessian)).tolist()
    close(left.weight_OK, least_squares(solved.weight_OI, hessian, left.kept_K))
    close(left.errors.sum(), reference.error(reference.removed))
    close(left.error, reference.error(reference.removed))


@fixed
@given(seeds, head_counts.filter(lambda heads: heads.total > 1), head_dims, st.data())
def test_errors_of_heads_add_up(seed, heads, head_dim, data):
    solved, _ = head_problem(seed, heads, head_dim)
    method = data.draw(st.sampled_from(["exact", "diagonal"]))
    left = elimination.eliminate_heads(solved, heads, HeadCounts(1, 1), method)
    order = left.order.tolist()
    expected = total_errors(solved.weight_OI, solved.inverse_II, order, head_dim)
    close(left.errors.cumsum(dim=0), expected)


@pytest.mark.parametrize("method", ["exact", "diagonal"])
@fixed
@given(seed=seeds, heads=head_counts, head_dim=head_dims, data=st.data())
def test_whole_groups_are_eliminated_as_units(method, seed, heads, head_dim, data):
    solved, _ = head_problem(seed, heads, head_dim)
    groups = data.draw(st.integers(1, heads.groups))
    left = elimination.eliminate_heads(solved, heads, HeadCounts(groups, heads.per_group), method)
    size = heads.per_group * head_dim
    expected = elimination.eliminate_units(solved, heads.groups - groups, size, method)
    removed = unit_columns(left.order, head_dim)
    assert removed.tolist() == unit_columns(expected.order, size).tolist()
    assert torch.equal(left.kept_K, expected.kept_K)
    assert torch.equal(left.weight_OK, expected.weight_OK)
    assert left.error == expected.error


@fixed
@given(seeds, st.integers(2, 3), st.integers(2, 3), head_dims)
def test_greedy_heads_against_all_combinations(seed, groups, per_group, head_dim):
    """One head of each group: never better than the best combination, and equal to it if nothing
    connects the groups."""
    heads = HeadCounts(groups, per_group)
    target = HeadCounts(groups, per_group - 1)
    solved, hessian = head_problem(seed, heads, head_dim)
    best = Reference(solved, heads).best_of_all(target)
    assert elimination.eliminate_heads(solved, heads, target).errors.sum() >= best * (1 - 1e-9)

    size = per_group * head_dim
    blocks = [hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)]
    apart = undamped(solved.weight_OI, torch.block_diag(*blocks))
    best = Reference(apart, heads).best_of_all(target)
    close(elimination.eliminate_heads(apart, heads, target).errors.sum(), best)


def test_greedy_heads_are_near_the_best_combination():
    heads, excess = HeadCounts(3, 3), []
    for seed in range(20):
        solved, _ = head_problem(seed, heads, 3)
        for target in (HeadCounts(3, 2), HeadCounts(2, 2), HeadCounts(2, 1)):
            left = elimination.eliminate_heads(solved, heads, target)
            best = Reference(solved, heads).best_of_all(target)
            excess.append(float(left.errors.sum()) / best - 1)
    assert sum(excess) / len(excess) < 0.01
    assert max(excess) < 0.2


@fixed
@given(seeds, st.integers(1, 4), st.integers(1, 4), head_dims, st.integers(0, 4))
def test_trace_takes_the_cheapest_steps(seed, groups, per_group, head_dim, key_value):
    heads, params = HeadCounts(groups, per_group), HeadParams(1, key_value)
    solved, _ = head_problem(seed, heads, head_dim)
    actual = elimination.trace_heads(solved, heads, params, params.count(heads))

    state = Reference(solved, heads)
    expected = [HeadState(heads, 0, 0.0)]
    while state.heads.total > 1:
        trials = [state.without_group()] if state.heads.groups > 1 else []
        trials += [state.without_heads()] if state.heads.per_group > 1 else []
        last = expected[-1]
        ends = [
            HeadState(
                trial.heads,
                params.count(heads) - params.count(trial.heads),
                trial.error(trial.removed),
            )
            for trial in trials
        ]
        best = min(
            range(len(ends)),
            key=lambda i: (
                (ends[i].error - last.error) / (ends[i].removed_params - last.removed_params)
            ),
        )
        state = trials[best]
        expected.append(ends[best])
    assert [step[:2] for step in actual] == [step[:2] for step in expected]
    errors = torch.tensor([step.error for step in expected], dtype=torch.float64)
    close(torch.tensor([step.error for step in actual], dtype=torch.float64), errors)


@pytest.mark.parametrize("num_params", [0, 1, 2, 5, 9, 12, 100])
def test_trace_ends_where_enough_is_removed(num_params):
    heads, params = HeadCounts(3, 3), HeadParams(1, 1)
    solved, _ = head_problem(0, heads, 2)
    whole = elimination.trace_heads(solved, heads, params, 100)
    assert whole[-1].heads == HeadCounts(1, 1)
    part = elimination.trace_heads(solved, heads, params, num_params)
    assert part == whole[: len(part)]
    assert part == whole or part[-1].removed_params >= num_params
    assert all(step.removed_params < num_params for step in part[:-1])


def test_removing_nothing():
    weight, hessian, _ = problem(0, 6)
    for removed in (
        elimination.eliminate_channels(undamped(weight, hessian), 0),
        elimination.eliminate_units(undamped(weight, hessian), 0, 2),
        elimination.eliminate_channel_groups(undamped(weight, hessian), 0),
        elimination.eliminate_heads(undamped(weight, hessian), HeadCounts(3, 2), HeadCounts(3, 2)),
    ):
        assert removed.order.shape == removed.errors.shape == (0,)
        assert removed.order.dtype == torch.long
        assert removed.errors.dtype == torch.float64
        assert torch.equal(removed.weight_OK, weight)
        assert removed.error == 0


def test_arguments_are_left_alone():
    weight, tokens = layer(0, 12)
    hessian = second_moment(tokens)
    inverse = torch.linalg.inv(hessian)
    copies = weight.clone(), hessian.clone(), inverse.clone()

    prepare(weight, hessian)
    mean = tokens.mean(dim=0)
    prepare(weight, hessian, target=Target(weight @ hessian, 0.5, weight @ mean), mean_I=mean)
    elimination.unit_errors(weight, inverse, 3)
    elimination.eliminate_units(undamped(weight, hessian), 2, 3)
    elimination.eliminate_channels(undamped(weight, hessian), 9, 4)
    elimination.eliminate_channel_groups(undamped(weight, hessian), 9, 2, 4)
    elimination.eliminate_heads(undamped(weight, hessian), HeadCounts(2, 3), HeadCounts(1, 2))
    elimination.trace_heads(undamped(weight, hessian), HeadCounts(2, 3), HeadParams(1, 1), 6)
    for tensor, before in zip((weight, hessian, inverse), copies, strict=True):
        assert torch.equal(tensor, before)


# Damping


@pytest.mark.parametrize("mode", ["relative", "mean"])
@fixed
@given(seed=seeds, num_in=sizes, damping=st.floats(1e-6, 0.1))
def test_damping(mode, seed, num_in, damping):
    weight, tokens = layer(seed, num_in)
    hessian = second_moment(tokens)
    diagonal = hessian.diagonal()
    added = diagonal if mode == "relative" else diagonal.mean().expand(num_in)
    expected = hessian + damping * torch.diag(added)

    solved = prepare(weight, hessian, Damping(damping, mode))
    assert solved.damping == damping
    assert torch.equal(solved.weight_OI, weight)
    close(damped(hessian, solved), expected, 1e-14)
    close(solved.inverse_II, torch.linalg.inv(expected))


def test_no_damping():
    weight, tokens = layer(0, 8)
    hessian = second_moment(tokens)
    solved = prepare(weight, hessian, Damping(0))
    assert solved.damping == 0
    assert (solved.added_I == 0).all()
    close(solved.inverse_II, torch.linalg.inv(hessian))


@pytest.mark.parametrize("mode", ["relative", "mean"])
@fixed
@given(seed=seeds, num_in=st.integers(3, 14), data=st.data())
def test_dead_channels_go_first_and_cost_nothing(mode, seed, num_in, data):
    weight, tokens = layer(seed, num_in)
    dead = split(seed, num_in, data.draw(st.integers(1, num_in - 1)))[0]
    tokens[:, dead] = 0
    hessian = second_moment(tokens)
    solved = prepare(weight, hessian, Damping(mode=mode))
    for removed in (
        elimination.eliminate_channels(solved, num_in),
        elimination.eliminate_channels(solved, num_in, panel_size=2),
        elimination.eliminate_units(solved, num_in, 1),
        elimination.eliminate_channel_groups(solved, num_in, 1, 3),
    ):
        assert sorted(removed.order[: len(dead)].tolist()) == dead.tolist()
        assert (removed.errors[: len(dead)] == 0).all()
        assert removed.errors.isfinite().all()
        assert sorted(removed.order.tolist()) == list(range(num_in))

    left = elimination.eliminate_channels(solved, len(dead))
    close(left.weight_OK, weight[:, left.kept_K])
    assert left.error <= 1e-12 * solved.power


def test_dead_channels_do_not_disturb_the_others():
    weight, tokens = layer(0, 12)
    dead, alive = split(0, 12, 4)
    tokens[:, dead] = 0
    solved = prepare(weight, second_moment(tokens))
    alone = prepare(weight[:, alive], second_moment(tokens[:, alive]))
    left = elimination.eliminate_channels(solved, 8)
    expected = elimination.eliminate_channels(alone, 4)
    assert left.order[4:].tolist() == alive[expected.order].tolist()
    assert left.kept_K.tolist() == alive[expected.kept_K].tolist()
    close(left.weight_OK, expected.weight_OK)
    close(left.error, expected.error)


def test_nothing_but_dead_channels():
    weight, _ = layer(0, 6)
    solved = prepare(weight, torch.zeros(6, 6))
    removed = elimination.eliminate_channels(solved, 4)
    assert removed.errors.tolist() == [0] * 4
    assert (removed.weight_OK == 0).all()
    assert removed.error == solved.power == 0


@fixed
@given(seeds, st.integers(6, 20), st.integers(1, 5), st.sampled_from([1e-4, 0.01]))
def test_fewer_tokens_than_channels(seed, num_in, num_tokens, damping):
    weight, tokens = layer(seed, num_in, num_tokens=num_tokens)
    hessian = second_moment(tokens)
    solved = prepare(weight, hessian, Damping(damping))
    assert solved.damping == damping
    order, errors, *_ = elimination.eliminate_channels(solved, num_in, 3)
    exact = torch.linalg.inv(damped(hessian, solved))
    expected = [obs_error(weight, exact, order[: n + 1]) for n in range(num_in)]
    close(errors.cumsum(dim=0), torch.stack(expected), 1e-6)


@fixed
@given(seeds, sizes, st.sampled_from([1e-6, 1e-3, 0.1]))
def test_duplicated_channels_stand_in_for_each_other(seed, num_pairs, damping):
    weight, tokens = layer(seed, num_pairs, num_tokens=40)
    copies, _ = layer(seed + 1, num_pairs)
    weight, tokens = torch.cat([weight, copies], dim=1), tokens.repeat(1, 2)
    hessian = second_moment(tokens)
    solved = prepare(weight, hessian, Damping(damping))
    assert solved.damping == damping

    order, errors, *_ = elimination.eliminate_channels(solved, 2 * num_pairs)
    # Adding a column's weight to its twin's costs this much in H + D, and nothing in H.
    merged = 2 * damping * hessian.diagonal() * weight.square().sum(dim=0)
    assert errors[0] <= merged.min() * (1 + 1e-9)
    assert errors.isfinite().all()
    assert sorted(order.tolist()) == list(range(2 * num_pairs))


@pytest.mark.parametrize(
    ("shift", "expected"), [(5e-5, 1e-4), (5e-4, 1e-3), (5e-3, 0.01), (0.05, 0.1)]
)
def test_damping_grows_until_the_hessian_is_positive_definite(shift, expected):
    weight, tokens = layer(0, 12, num_tokens=6)
    tokens /= tokens.square().mean(dim=0).sqrt()
    hessian = second_moment(tokens) - shift * torch.eye(12)
    asked = 1e-5

    def smallest_eigenvalue(damping: float) -> float:
        return float(torch.linalg.eigvalsh(hessian + damping * torch.diag(hessian.diagonal()))[0])

    ladder = [asked * 10**step for step in range(5)]
    needed = next(d for d in ladder if smallest_eigenvalue(d) > 0)
    assert needed == pytest.approx(expected)

    solved = prepare(weight, hessian, Damping(asked))
    assert solved.damping == pytest.approx(needed)
    expected_hessian = hessian + solved.damping * torch.diag(hessian.diagonal())
    close(damped(hessian, solved), expected_hessian, 1e-14)
    close(solved.inverse_II, torch.linalg.inv(expected_hessian))


def test_every_damping_up_to_the_largest_is_tried():
    weight, tokens = layer(0, 12, num_tokens=6)
    tokens /= tokens.square().mean(dim=0).sqrt()
    hessian = second_moment(tokens) - 0.05 * torch.eye(12)
    assert torch.linalg.eigvalsh(hessian + 0.03 * torch.diag(hessian.diagonal()))[0] < 0
    assert torch.linalg.eigvalsh(hessian + 0.1 * torch.diag(hessian.diagonal()))[0] > 0
    assert 0.03 < prepare(weight, hessian, Damping(0.03)).damping <= MAX_DAMPING


@pytest.mark.parametrize("mode", ["relative", "mean"])
@pytest.mark.parametrize(
    "hessian",
    [
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.9], [0.0, 0.9, 1.0]]),
        -torch.eye(2),
        torch.diag(torch.tensor([1.0, 1.0, -0.5])),
    ],
    ids=["pair", "chain", "negative", "negative entry"],
)
def test_strongly_indefinite_hessian(hessian, mode):
    weight, _ = layer(0, len(hessian))
    with pytest.raises(NumericalError, match=r"positive definite.*\d") as caught:
        prepare(weight, hessian, Damping(0.001, mode))
    assert caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [(2, 2), (1, 3)])
def test_hessian_that_is_not_finite(value, position):
    weight, tokens = layer(0, 6)
    hessian = second_moment(tokens)
    hessian[position] = value
    with pytest.raises(NumericalError, match="finite") as caught:
        prepare(weight, hessian)
    assert any(c.isdigit() for c in str(caught.value))
    assert caught.value.hint


def test_no_damping_of_an_indefinite_hessian_ends():
    weight, _ = layer(0, 2)
    with pytest.raises(NumericalError):
        prepare(weight, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), Damping(0))


# Stress


@pytest.mark.parametrize("mode", ["relative", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("massive", [1.0, 1e4])
@fixed
@given(seed=seeds, num_in=st.integers(4, 16), num_tokens=st.integers(2, 40), data=st.data())
def test_compensation_never_loses_to_slicing(mode, dtype, massive, seed, num_in, num_tokens, data):
    weight, tokens = layer(seed, num_in, num_tokens=num_tokens)
    tokens /= tokens.abs().max()
    tokens[:, data.draw(st.integers(0, num_in - 1))] *= massive
    weight, tokens = weight.to(dtype), tokens.to(dtype)
    hessian = second_moment(tokens.double())
    num_remove = data.draw(st.integers(1, num_in - 1))

    solved = prepare(weight, hessian, Damping(0.01, mode))
    _, each, kept, new_weight, error = elimination.eliminate_channels(solved, num_remove, 4)
    assert 0 <= error < torch.inf
    assert each.isfinite().all()
    assert new_weight.isfinite().all()
    assert new_weight.to(dtype).isfinite().all()

    dense = tokens.double() @ weight.double().T
    errors = [
        float((tokens.double()[:, kept] @ w.double().T - dense).square().sum(dim=1).mean())
        for w in (new_weight, weight[:, kept])
    ]
    # The solution is optimal in H + D: its error in H is at most that of slicing in H + D.
    dropped = weight.double().square().sum(dim=0).index_fill(0, kept, 0)
    power = float(dense.square().sum(dim=1).mean())
    assert errors[0] <= errors[1] + float(solved.added_I @ dropped) + 1e-12 * power

    in_damped = [
        output_error(solved.weight_OI, damped(hessian, solved), kept, w)
        for w in (new_weight, solved.weight_OI[:, kept])
    ]
    assert in_damped[0] <= in_damped[1] + 1e-12 * power


@pytest.mark.parametrize("massive", [1.0, 1e4])
@fixed
@given(seed=seeds, num_in=st.integers(4, 16), data=st.data())
def test_undamped_compensation_never_loses_to_slicing(massive, seed, num_in, data):
    weight, tokens = layer(seed, num_in, num_tokens=64)
    tokens[:, 0] *= massive
    hessian = second_moment(tokens)
    solved = prepare(weight, hessian, Damping(0))
    for left in eliminations(solved, data):
        compensated = output_error(weight, hessian, left.kept_K, left.weight_OK)
        sliced = output_error(weight, hessian, left.kept_K, weight[:, left.kept_K])
        assert compensated <= sliced + 1e-12 * solved.power


@pytest.mark.parametrize("massive", [1.0, 1e4])
def test_float32_sums_are_inverted_in_float64(massive):
    weight, tokens = layer(0, 24)
    tokens[:, 3] *= massive
    hessian = second_moment(tokens.float())
    assert hessian.dtype == torch.float32
    solved = prepare(weight.bfloat16(), hessian)
    assert solved.inverse_II.dtype == solved.added_I.dtype == torch.float64
    order, errors = greedy(solved.weight_OI.double(), damped(hessian, solved), [1] * 24)
    actual = elimination.eliminate_channels(solved, 24, 5)
    assert actual.order.tolist() == order
    close(actual.errors, errors, 1e-6)


@pytest.mark.parametrize("massive", [1.0, 1e4])
@fixed
@given(seed=seeds, data=st.data())
def test_weights_in_float32_are_solved_as_in_float64(massive, seed, data):
    weight, tokens = layer(seed, 24)
    tokens[:, 3] *= massive
    weight, hessian = weight.bfloat16(), second_moment(tokens.float())
    other, _ = layer(seed + 1, 24)
    cross = other @ hessian.double()
    solved, exact = (
        prepare(w, hessian, target=Target(cross, 0.5)) for w in (weight, weight.double())
    )
    assert solved.weight_OI.dtype == hessian.dtype == torch.float32
    assert solved.inverse_II.dtype == exact.weight_OI.dtype == torch.float64
    num_units, panel_size = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 20))
    for eliminate, option in (
        (elimination.eliminate_channels, panel_size),
        (elimination.eliminate_units, 3),
        (elimination.eliminate_channel_groups, 2),
    ):
        actual, expected = (eliminate(p, num_units, option) for p in (solved, exact))
        assert actual.order.tolist() == expected.order.tolist()
        close(actual.weight_OK, expected.weight_OK, 1e-5)
        close(actual.errors, expected.errors, 1e-5)
        assert actual.error == pytest.approx(expected.error, rel=1e-5)
