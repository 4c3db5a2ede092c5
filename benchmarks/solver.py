"""Time the solver for one sublayer with a known Hessian, and compare it with other algorithms.

Contestants, each from a damped Hessian to the new weight, in float64 (SlimGPT: W in float32):

floor
    One Cholesky decomposition and one inverse of H, which any method based on H⁻¹ needs.
slimgpt
    `prepare`, then `eliminate_channels` or `eliminate_units`.
paper
    Literal SlimGPT (arXiv 2412.18110, algorithm 1). It repeats: invert H of the remaining columns,
    compute the errors, remove a head or a batch of channels of dynamic group size, compensate.
one by one
    Repeats: remove the unit of least error, with a rank-one (or rank-S) update of H⁻¹ and W.

The error is tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) with the damped H, which all contestants minimise. It is
computed for the chosen columns after least squares in float64. Usage:

    python benchmarks/solver.py [--quick] [--shapes llama-down …] [--repeats 3] [--json FILE]

Shape suffixes as in `slimgpt.solver.elimination`: ``O`` out features, ``I`` in features (columns),
``K`` kept, ``R`` removed columns, ``U`` units; also ``T`` tokens, ``F`` latent features.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from environment import write_json
from phases import now
from rich.console import Console
from rich.table import Table
from torch import Tensor

from slimgpt.solver import elimination, hessian

DAMPING = 0.01
BATCHES_TIMED = 2
STEPS_TIMED = 10


class Shape(NamedTuple):
    """Shape of an output projection W (O×I), and the number of columns of a unit."""

    num_out: int
    num_in: int
    unit_size: int


SHAPES = {
    "smollm2-o-groups": Shape(576, 576, 192),
    "smollm2-o-heads": Shape(576, 576, 64),
    "smollm2-down": Shape(576, 1536, 1),
    "llama-o-heads": Shape(4096, 4096, 128),
    "square-channels": Shape(4096, 4096, 1),
    "llama-down": Shape(4096, 11008, 1),
}
QUICK = [name for name, shape in SHAPES.items() if shape.num_in <= 2048]


class Run(NamedTuple):
    """One run of a contestant: seconds of its parts, removed columns, a note on extrapolation."""

    parts: dict[str, float]
    removed_R: Tensor
    note: str = ""


@dataclass
class Measurement:
    """Result of one contestant with one shape and ratio; lists have one entry per round."""

    shape: str
    ratio: float
    contestant: str
    note: str = ""
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)


class Stopwatch:
    """Seconds since the last reading."""

    def __init__(self) -> None:
        self._start = now()

    def __call__(self) -> float:
        """Return the seconds and restart."""
        before, self._start = self._start, now()
        return self._start - before


def synthetic_layer(shape: Shape, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Make a weight and a Hessian that resemble those of a language model.

    The inputs are gated like those of down_proj, x = silu(g)·h, with g and h correlated through
    I/8 latent features of decaying scale; the scales of the channels are log-normal, and one
    channel in 200 is an outlier, 30 times larger. H = E[x xᵀ] over 2·I tokens.
    """
    generator = torch.Generator(device).manual_seed(seed)
    num_out, num_in, _ = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    scale_I = normal(num_in).exp()
    scale_I[torch.randperm(num_in, generator=generator, device=device)[: -(-num_in // 200)]] *= 30
    num_latent = num_in // 8
    decay_F = torch.logspace(0, -1, num_latent, device=device)
    decay_F /= decay_F.square().sum().sqrt()
    gate_FI, value_FI = normal(num_latent, num_in), normal(num_latent, num_in)
    hessian_II = torch.zeros(num_in, num_in, dtype=torch.float64, device=device)
    tokens = 2 * num_in
    for start in range(0, tokens, 4096):
        size = min(4096, tokens - start)
        latent_TF = normal(size, num_latent) * decay_F
        gate_TI = latent_TF @ gate_FI + 0.5 * normal(size, num_in)
        value_TI = latent_TF @ value_FI + 0.5 * normal(size, num_in)
        input_TI = torch.nn.functional.silu(gate_TI) * value_TI * scale_I
        hessian_II += input_TI.T @ input_TI
    weight_OI = normal(num_out, num_in) * (0.3 * normal(num_in)).exp() / scale_I.sqrt()
    return weight_OI, hessian_II / tokens


def invert(hessian_II: Tensor) -> Tensor:
    """Run the floor: invert H by its Cholesky decomposition."""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))


def kept(num_in: int, removed_R: Tensor) -> Tensor:
    """Sorted indices of all other columns."""
    keep_I = torch.ones(num_in, dtype=torch.bool, device=removed_R.device)
    keep_I[removed_R] = False
    return keep_I.nonzero().squeeze(1)


def columns(units_U: Tensor, unit_size: int) -> Tensor:
    """Columns of the units, in the order of the units."""
    return (units_U[:, None] * unit_size + torch.arange(unit_size, device=units_U.device)).flatten()


def solve_slimgpt(weight_OI: Tensor, hessian_II: Tensor, num_remove: int, unit_size: int) -> Run:
    """Run SlimGPT's solver, as a pruning run does for each sublayer."""
    lap = Stopwatch()
    problem = hessian.prepare(weight_OI, hessian_II, hessian.Damping(DAMPING))
    parts = {"prepare": lap()}
    if unit_size == 1:
        removed_U = elimination.eliminate_channels(problem, num_remove).order
    else:
        removed_U = elimination.eliminate_units(problem, num_remove, unit_size).order
    parts["eliminate"] = lap()
    return Run(parts, columns(removed_U, unit_size))


def group_sizes(num_remove: int, unit_size: int) -> list[int]:
    """Sizes of the paper's batches in units: one head, or channels by dynamic group size."""
    if unit_size > 1:
        return [1] * num_remove
    sizes, group = [], num_remove
    while num_remove:
        group = min(max((group - 512) // 2, 64), 1024)
        sizes.append(min(group, num_remove))
        num_remove -= sizes[-1]
    return sizes


def paper_step(
    weight_OI: Tensor, hessian_II: Tensor, group: int, unit_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove one head or batch of channels; return the new W, the removed and the kept columns."""
    inverse_II = invert(hessian_II)
    errors_U = (
        weight_OI.square().sum(dim=0) / inverse_II.diagonal()
        if unit_size == 1
        else elimination.unit_errors(weight_OI, inverse_II, unit_size)
    )
    removed_R = columns(errors_U.argsort()[:group], unit_size)
    kept_K = kept(len(hessian_II), removed_R)
    inverse_RI = inverse_II[removed_R]
    factor_RR = torch.linalg.cholesky(inverse_RI[:, removed_R])
    solved_RO = torch.cholesky_solve(weight_OI[:, removed_R].T, factor_RR)
    return weight_OI[:, kept_K] - solved_RO.T @ inverse_RI[:, kept_K], removed_R, kept_K


def solve_paper(weight_OI: Tensor, hessian_II: Tensor, num_remove: int, unit_size: int) -> Run:
    """Run all batches; for large layers time a few and interpolate the time of the others."""
    sizes = group_sizes(num_remove, unit_size)
    lap = Stopwatch()
    weight_OI = weight_OI.double()
    hessian_II = hessian_II + torch.diag(DAMPING * hessian_II.diagonal())
    if len(hessian_II) <= 8192:
        alive_I, removed = torch.arange(len(hessian_II), device=hessian_II.device), []
        for size in sizes:
            weight_OI, removed_R, kept_K = paper_step(weight_OI, hessian_II, size, unit_size)
            removed.append(alive_I[removed_R])
            alive_I, hessian_II = alive_I[kept_K], hessian_II[kept_K][:, kept_K]
        return Run({"all": lap()}, torch.cat(removed))
    widths = [len(hessian_II) - sum(sizes[:i]) for i in range(len(sizes))]
    times = []
    timed = [round(i * (len(sizes) - 1) / (BATCHES_TIMED - 1)) for i in range(BATCHES_TIMED)]
    for i in timed:
        width = widths[i]
        part = weight_OI[:, :width].clone(), hessian_II[:width, :width].clone()
        lap()
        _, _, kept_K = paper_step(*part, sizes[i], unit_size)
        part[1][kept_K][:, kept_K]
        times.append(lap())
    total = 0.0
    for i in range(len(sizes)):  # linear in the width³ between timed batches
        j = next(j for j in range(1, BATCHES_TIMED) if i <= timed[j])
        low, high, cube = widths[timed[j]] ** 3, widths[timed[j - 1]] ** 3, widths[i] ** 3
        total += times[j] + (times[j - 1] - times[j]) * (cube - low) / (high - low)
    problem = hessian.prepare(weight_OI, hessian_II, hessian.Damping(0))
    removed_R = elimination.eliminate_channel_groups(problem, num_remove).order
    note = f"time from {BATCHES_TIMED} of {len(sizes)} batches"
    return Run({"all": total}, removed_R, note)


def solve_one_by_one(weight_OI: Tensor, hessian_II: Tensor, num_remove: int, unit_size: int) -> Run:
    """Run all removals; for large layers only the first few, because all cost the same."""
    lap = Stopwatch()
    inverse_II = invert(hessian_II + torch.diag(DAMPING * hessian_II.diagonal()))
    parts = {"invert": lap()}
    weight_OI = weight_OI.double()
    gone_U = torch.zeros(len(hessian_II) // unit_size, dtype=torch.bool)
    order = []
    steps = num_remove if len(hessian_II) <= 2048 else min(num_remove, STEPS_TIMED)
    for _ in range(steps):
        errors_U = (
            weight_OI.square().sum(dim=0) / inverse_II.diagonal()
            if unit_size == 1
            else elimination.unit_errors(weight_OI, inverse_II, unit_size)
        )
        least = errors_U.masked_fill(gone_U, torch.inf).argmin()
        order.append(least)
        gone_U[least] = True
        removed_R = columns(least[None], unit_size)
        inverse_RI = inverse_II[removed_R]
        solved_RI = torch.linalg.solve(inverse_RI[:, removed_R], inverse_RI)
        weight_OI -= weight_OI[:, removed_R] @ solved_RI
        inverse_II -= inverse_RI.T @ solved_RI
        inverse_II[removed_R, removed_R] = 1
    parts["eliminate"] = lap() * num_remove / steps
    note = f"time from {steps} of {num_remove} removals" if steps < num_remove else ""
    return Run(parts, columns(torch.stack(order), unit_size), note)


SOLVERS: dict[str, Callable[[Tensor, Tensor, int, int], Run]] = {
    "slimgpt": solve_slimgpt,
    "paper": solve_paper,
    "one by one": solve_one_by_one,
}


def removal_error(problem: hessian.Problem, removed_R: Tensor) -> float:
    """tr(W_R [(H⁻¹)_RR]⁻¹ W_Rᵀ), the error after optimal compensation."""
    factor_RR = torch.linalg.cholesky(problem.inverse_II[removed_R][:, removed_R])
    solved_RO = torch.linalg.solve_triangular(
        factor_RR, problem.weight_OI[:, removed_R].T, upper=False
    )
    return float(solved_RO.square().sum())


def measure(name: str, ratios: list[float], repeats: int, seed: int) -> list[Measurement]:
    """Run all contestants in turn, `repeats` times; extrapolated ones only once."""
    shape = SHAPES[name]
    weight_OI, hessian_II = synthetic_layer(shape, seed)
    problem = hessian.prepare(weight_OI.double(), hessian_II, hessian.Damping(DAMPING))
    damped_II = hessian_II + torch.diag(problem.added_I)
    power = float(((problem.weight_OI @ damped_II) * problem.weight_OI).sum())
    results = []
    for ratio in ratios:
        num_remove = max(1, round(ratio * shape.num_in / shape.unit_size))
        floor = Measurement(name, ratio, "floor")
        rows = {solver: Measurement(name, ratio, solver) for solver in SOLVERS}
        removed: dict[str, Tensor] = {}
        for _ in range(repeats):
            lap = Stopwatch()
            invert(damped_II)
            floor.seconds.append(lap())
            for solver, row in rows.items():
                if row.note:  # extrapolated: once is enough
                    continue
                run = SOLVERS[solver](weight_OI, hessian_II, num_remove, shape.unit_size)
                row.seconds.append(sum(run.parts.values()))
                row.parts.append(run.parts)
                row.note, removed[solver] = run.note, run.removed_R
        ours, reference = removed["slimgpt"], removed["one by one"]
        if not torch.equal(ours[: len(reference)], reference):
            raise AssertionError(f"{name}, {ratio:.0%}: not the order of one-by-one removal")
        removed["one by one"] = ours
        for solver, row in rows.items():
            row.error = removal_error(problem, removed[solver]) / power
        results += [floor, *rows.values()]
        print_table([floor, *rows.values()], f"{name}: {shape}, {ratio:.0%} removed")
    return results


def print_table(rows: list[Measurement], title: str) -> None:
    """Print the medians, and their ratios to the floor and to the paper."""
    table = Table("contestant", "seconds", "range", "× floor", "× paper", "error", "", title=title)
    by_name = {row.contestant: row for row in rows}
    floor, paper = by_name["floor"].median, by_name["paper"].median
    for row in rows:
        details = row.note
        if row.contestant == "slimgpt":
            medians = {
                part: statistics.median(parts[part] for parts in row.parts) for part in row.parts[0]
            }
            details = ", ".join(f"{part} {value / floor:.2f}" for part, value in medians.items())
        table.add_row(
            row.contestant,
            f"{row.median:.3f}",
            f"{min(row.seconds):.3f}–{max(row.seconds):.3f}",
            f"{row.median / floor:.2f}",
            f"{row.median / paper:.2f}",
            "" if row.error is None else f"{row.error:.6f}",
            details,
        )
    Console(width=120).print(table)


def main() -> None:
    """Read the arguments, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="only " + ", ".join(QUICK))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument(
        "--repeats", type=int, help="rounds; by default 3, or 2 beyond 8192 columns"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    results = []
    for name in QUICK if args.quick else args.shapes:
        repeats = args.repeats or (3 if SHAPES[name].num_in <= 8192 else 2)
        results += measure(name, args.ratios, repeats, args.seed)
    write_json(
        args.json,
        damping=DAMPING,
        seed=args.seed,
        shapes={name: shape._asdict() for name, shape in SHAPES.items()},
        measurements=[asdict(row) | {"median": row.median} for row in results],
    )


if __name__ == "__main__":
    main()
