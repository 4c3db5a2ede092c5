r"""Compare ways to choose the widths: time, perplexity and KL divergence with equal parameters.

For each ratio and seed the model is pruned in each way, with the same calibration text. `tyr` is a
plain reading of Týr-the-Pruner (arXiv 2503.09657): for each sublayer of the dense model, weights
compensated by Optimal Brain Surgeon at many widths; a search that starts from uniform widths,
moves units between two sublayers at a time, and keeps what lowers the KL divergence of the
assembled model on held-out calibration tokens; four rounds, with steps from 12.5 % to 1.6 %.
Models and measurements in the folder --work are reused, and an interrupted run goes on. Usage:

    python benchmarks/allocation.py --ratios 0.5 --text c4.jsonl \
        --texts wikitext.txt c4-heldout.jsonl pydocs --json allocation.json

Shape suffixes: ``N`` samples, ``T`` tokens, ``I`` columns of an output projection, ``O`` rows,
``K`` kept columns, ``V`` vocabulary.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import write_json
from measured import add_options, folder, is_complete, loss_left, perplexities
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

import slimgpt
from slimgpt.data.samples import SampleOptions, calibration_tokens
from slimgpt.models.blocks import bind
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.models.units import Kept
from slimgpt.solver.elimination import eliminate_channels, eliminate_units
from slimgpt.solver.hessian import Damping, prepare

SCHEDULED = {"widths": "scheduled"}
WAYS: dict[str, dict[str, Any]] = {
    "uniform": SCHEDULED | {"schedule": "uniform"},
    "log 0": SCHEDULED | {"min_ratio": 0.0},
    "log 1/8": SCHEDULED,
    "log 1/4": SCHEDULED | {"min_ratio": 0.25},  # of the ratio
    "measured": {},
    "searched 2": {"widths": "searched", "search_budget": 2.0},
    "searched 15": {"widths": "searched", "search_budget": 15.0},
    "tyr": {},
}

NUM_ROUNDS, PROBES = 4, 4  # rounds of a search; held-out samples that judge a candidate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.33, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--text", required=True, help="plain text to calibrate on")
    parser.add_argument("--tyr-minutes", type=float, default=15)
    args = parser.parse_args()
    rows = []
    for ratio in args.ratios:
        for seed in args.seeds:
            rows += [row(way, ratio, seed, args) for way in args.ways]
    report(perplexities(args.model, "dense", args.work, args), rows, args)


def row(way: str, ratio: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Prune in one way, and measure."""
    options = WAYS[way] | {
        "ratio": ratio,
        "seed": seed,
        "calibration": (args.text, "self"),
        "nsamples": args.nsamples,
        "seqlen": args.sample_length,
    }
    if "min_ratio" in options:
        options["min_ratio"] *= ratio
    output = folder(args.work, f"{way}-{ratio}-{seed}", model=args.model, **options)
    if way == "tyr":
        seconds = prune_like_tyr(output, ratio, seed, args)
    else:
        if not is_complete(output):
            slimgpt.prune(args.model, output, **options)
        seconds = sum(json.loads((output / "pruning_report.json").read_text())["seconds"].values())
    found = perplexities(str(output), f"{way}-{ratio}-{seed}", args.work, args)
    return {"way": way, "ratio": ratio, "seed": seed, "seconds": seconds, "perplexity": found}


@dataclass
class Levels:
    """A sublayer of the dense model, and its compensated weights at any width.

    Attributes
    ----------
    sublayer : Sublayer
        The sublayer.
    hessian_II : Tensor
        Damped, float64.
    order : Tensor
        Units in the order of removal.
    """

    sublayer: Sublayer
    hessian_II: Tensor
    order: Tensor
    _weights: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, sublayer: Sublayer, hessian_II: Tensor) -> "Levels":
        """Eliminate all units but one, as Optimal Brain Surgeon does."""
        problem = prepare(sublayer.output.weight, hessian_II, Damping())
        most = sublayer.num_units - 1
        if sublayer.unit_size > 1:
            left = eliminate_units(problem, most, sublayer.unit_size)
        else:
            left = eliminate_channels(problem, most)
        damped_II = hessian_II.double() + problem.added_I.diag()
        return cls(sublayer, damped_II, left.order)

    def weight(self, width: int) -> Tensor:
        """The output projection (O, I) with zeros in the columns of removed units."""
        if width not in self._weights:
            whole_OI = self.sublayer.output.weight.double()
            kept = sorted(set(range(self.sublayer.num_units)) - set(self.removed(width)))
            columns_K = self.sublayer.columns(Kept(torch.tensor(kept)))
            factor_KK = torch.linalg.cholesky(self.hessian_II[columns_K][:, columns_K])
            right_KO = self.hessian_II[columns_K] @ whole_OI.T
            weight_OI = torch.zeros_like(whole_OI)
            weight_OI[:, columns_K] = torch.cholesky_solve(right_KO, factor_KK).T
            self._weights[width] = weight_OI.to(self.sublayer.output.weight)
        return self._weights[width]

    def removed(self, width: int) -> list[int]:
        """Units that are gone at a width."""
        return self.order[: self.sublayer.num_units - width].tolist()


@torch.no_grad()
def prune_like_tyr(output: Path, ratio: float, seed: int, args: argparse.Namespace) -> float:
    """Search, and write the dense model with zeros in removed columns; return the seconds."""
    file = output / "seconds.json"
    if file.exists():
        return json.loads(file.read_text())
    start, source = time.monotonic(), find_model(args.model)
    model, tokenizer = load_model(source, "float32", "cpu"), load_tokenizer(source)
    number = args.nsamples + PROBES
    drawn = SampleOptions(number, args.sample_length, seed)
    samples_NT = calibration_tokens(args.text, tokenizer, drawn)
    sublayers = [sublayer for block in bind(model) for sublayer in block.sublayers]
    sums = hessians(model, sublayers, samples_NT[:-PROBES])
    levels = [Levels.of(*pair) for pair in zip(sublayers, sums, strict=True)]
    whole = [sublayer.output.weight.clone() for sublayer in sublayers]
    probes_NT = samples_NT[-PROBES:]
    dense = [log_softmax(model(probe_T[None]).logits[0], dim=-1) for probe_T in probes_NT]

    def divergence(widths: list[int]) -> float:
        for level, weight_OI, width in zip(levels, whole, widths, strict=True):
            is_whole = width == level.sublayer.num_units
            level.sublayer.output.weight.copy_(weight_OI if is_whole else level.weight(width))
        total = 0.0
        for probe_T, dense_TV in zip(probes_NT, dense, strict=True):
            logits_TV = model(probe_T[None]).logits[0]
            total += float(
                kl_div(log_softmax(logits_TV, dim=-1), dense_TV, reduction="sum", log_target=True)
            )
        for sublayer, weight_OI in zip(sublayers, whole, strict=True):  # levels start from these
            sublayer.output.weight.copy_(weight_OI)
        return total / probes_NT.numel()

    widths, history = search(levels, ratio, divergence, args.tyr_minutes * 60, seed)
    for level, width in zip(levels, widths, strict=True):
        if width < level.sublayer.num_units:
            level.sublayer.output.weight.copy_(level.weight(width))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "search.json").write_text(json.dumps({"widths": widths, "history": history}))
    seconds = time.monotonic() - start
    file.write_text(json.dumps(seconds))
    return seconds


def hessians(model: Any, sublayers: list[Sublayer], samples_NT: Tensor) -> list[Tensor]:
    """E[x xᵀ] of the inputs of all output projections of the dense model."""
    sums = [torch.zeros(2 * [s.output.in_features]) for s in sublayers]

    def adds_to(sum_II: Tensor) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            input_TI = inputs[0].flatten(0, 1)
            sum_II.addmm_(input_TI.T, input_TI)

        return add

    handles = [
        sublayer.output.module.register_forward_pre_hook(adds_to(sum_II))
        for sublayer, sum_II in zip(sublayers, sums, strict=True)
    ]
    for sample_T in samples_NT:
        model.model(sample_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [sum_II / samples_NT.numel() for sum_II in sums]


def search(
    levels: list[Levels], ratio: float, value: Any, seconds: float, seed: int
) -> tuple[list[int], list[tuple[float, float]]]:
    """Evolve widths from uniform ones; return the best, and the value over time."""
    generator, start = random.Random(seed), time.monotonic()
    shapes = [level.sublayer.shape for level in levels]
    budget = round(ratio * sum(shape.params for shape in shapes))
    widths = [max(round((1 - ratio) * shape.num_units), 1) for shape in shapes]
    history: list[tuple[float, float]] = []
    for index in range(NUM_ROUNDS):
        # Channels in steps of an eighth of a sublayer, then half of that, and so on.
        steps = [max(s.num_units // (8 * 2**index), 1) if s.kind == "ffn" else 1 for s in shapes]
        widths = repaired(shapes, widths, steps, budget, generator)
        best = value(widths)
        while time.monotonic() - start < seconds * (index + 1) / NUM_ROUNDS:
            child = list(widths)
            for place, sign in zip(generator.sample(range(len(shapes)), 2), (1, -1), strict=True):
                moved = child[place] + sign * steps[place]
                child[place] = min(max(moved, 1), shapes[place].num_units)
            child = repaired(shapes, child, steps, budget, generator)
            if child != widths and (found := value(child)) < best:
                widths, best = child, found
                history.append((time.monotonic() - start, best))
                print(f"tyr, round {index + 1}, {history[-1][0]:.0f} s: KL {best:.4f}", flush=True)
    # Steps of one channel, so that as many parameters are gone as with the other ways.
    return repaired(shapes, widths, [1] * len(steps), budget, generator), history


def repaired(
    shapes: list[Any], widths: list[int], steps: list[int], budget: int, generator: random.Random
) -> list[int]:
    """Remove channels, or put some back, in random FFNs, until the budget is met to one step."""
    widths = list(widths)
    for _ in range(10**6):
        removed = sum(s.params - s.kept_params(w) for s, w in zip(shapes, widths, strict=True))
        places = list(changeable(shapes, widths, steps, removed - budget))
        if not places:
            return widths
        place = generator.choice(places)
        widths[place] += steps[place] if removed > budget else -steps[place]
    raise SystemExit("the budget cannot be met by channels alone")


def changeable(
    shapes: list[Any], widths: list[int], steps: list[int], excess: int
) -> Iterator[int]:
    """FFNs that one step brings nearer to the budget; `excess` parameters too many are gone."""
    for place, (shape, width, step) in enumerate(zip(shapes, widths, steps, strict=True)):
        new = width + step if excess > 0 else width - step
        is_near = abs(excess) <= step * shape.unit_params / 2
        if shape.kind == "ffn" and 1 <= new <= shape.num_units and not is_near:
            yield place


def report(dense: list[Any], rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print one line for each model, and write all measurements as JSON."""
    title = (
        f"{args.model}, {args.nsamples} × {args.sample_length} tokens; windows of {args.seqlen} "
        f"tokens, first {args.max_tokens} tokens of each text, {args.dtype}"
    )
    table = Table("ratio", "seed", "widths", "s", "loss / measured", title=title)
    for text in dense:
        table.add_column(f"{text['data']}: PPL (KL)")
    table.add_row("", "", "dense", "", "", *(f"{text['perplexity']:.2f}" for text in dense))
    for found in rows:
        case = found["ratio"], found["seed"]
        references = [r for r in rows if (r["ratio"], r["seed"], r["way"]) == (*case, "measured")]
        lost = [loss_left(found["perplexity"], r["perplexity"], dense) for r in references]
        table.add_row(
            f"{case[0]:.0%}",
            str(case[1]),
            found["way"],
            f"{found['seconds']:.0f}",
            "".join(f"{value:.3f}" for value in lost),
            *(f"{t['perplexity']:.2f} ({t['kl_divergence']:.3f})" for t in found["perplexity"]),
        )
    Console(width=180).print(table)
    write_json(args.json, protocol=title, dense=dense, models=rows)


if __name__ == "__main__":
    main()
