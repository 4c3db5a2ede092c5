"""Compare the quality of contestants (presets and options) on held-out texts.

The figure of merit of a contestant is its loss ln(PPL / PPL_dense) divided by that of the preset
``paper`` with the same model, ratio, seed and text. All use the same number of calibration tokens.
Contestants other than ``paper`` take half of them from the calibration text and half from text that
the model generates, as by default. Usage:

    python benchmarks/quality.py --calibration c4.jsonl --texts wikitext.txt pydocs
    python benchmarks/quality.py … --contestants paper default mine:preset=default,damping=0.1
"""

import argparse
import copy
import itertools
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from environment import write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

import slimgpt
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer

REFERENCE = "paper"


@dataclass(frozen=True)
class Measurement:
    """Result of one contestant with one model, ratio, seed and text."""

    variant: str
    ratio: float
    seed: int
    contestant: str
    text: str
    dense_perplexity: float
    perplexity: float
    kl_divergence: float
    seconds: float

    @property
    def loss(self) -> float:
        """Increase of the loss by pruning, in nats per token."""
        return math.log(self.perplexity / self.dense_perplexity)


def with_multi_head_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Convert to an equivalent MHA model: repeat each kv head for its query heads."""
    model = copy.deepcopy(model)
    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("k_proj", "v_proj"):
            old = attention.get_submodule(name)
            rows = old.weight.view(config.num_key_value_heads, -1, old.in_features)
            if old.bias is not None:
                raise SystemExit("the mha variant is for models without biases")
            new = nn.Linear(old.in_features, repeats * old.out_features, bias=False)
            repeated = rows.repeat_interleave(repeats, dim=0).flatten(0, 1)
            new.weight = nn.Parameter(repeated, requires_grad=False)
            attention.set_submodule(name, new)
        attention.num_key_value_groups = 1
    config.num_key_value_heads = config.num_attention_heads
    return model


def parse_contestant(text: str, calibration: str) -> tuple[str, dict[str, str]]:
    """Parse ``preset`` or ``name:option=value,…``; ``+`` in a value stands for a comma."""
    name, _, rest = text.partition(":")
    options = (
        dict(option.replace("+", ",").split("=") for option in rest.split(","))
        if rest
        else {"preset": name}
    )
    is_paper = options.get("preset") == REFERENCE
    return name, {"calibration": calibration if is_paper else f"{calibration},self"} | options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", nargs="+", default=["gqa", "mha"], choices=["gqa", "mha"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.33, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--contestants", nargs="+", default=["paper", "default"])
    parser.add_argument("--dtype", default="float32", help="dtype of the dense and pruned models")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=15360)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as scratch:
        for variant in args.variants:
            dense = Path(scratch, variant)
            save_dense(args.model, variant, args.dtype, dense)
            cells = itertools.product(args.seeds, args.ratios, args.contestants)
            for seed, ratio, contestant in cells:
                measurements += measure(dense, Path(scratch, "slim"), seed, ratio, contestant, args)
    report(measurements, args)


def save_dense(name: str, variant: str, dtype: str, directory: Path) -> None:
    """Save the dense model, with its own kv heads or with one for each query head."""
    source = find_model(name)
    model = load_model(source, dtype)
    model = model if variant == "gqa" else with_multi_head_attention(model)
    model.save_pretrained(directory)
    load_tokenizer(source).save_pretrained(directory)


def measure(
    dense: Path, slim: Path, seed: int, ratio: float, contestant: str, args: argparse.Namespace
) -> Iterator[Measurement]:
    """Prune and evaluate once."""
    name, options = parse_contestant(contestant, args.calibration)
    size = {"nsamples": args.nsamples, "seqlen": args.seqlen}
    pruned = slimgpt.prune(str(dense), slim, ratio=ratio, seed=seed, **size, **options)
    texts = {"data": args.texts, "seqlen": args.window, "max_tokens": args.max_tokens}
    for result in slimgpt.evaluate(str(slim), against=str(dense), **texts).perplexity:
        measurement = Measurement(
            dense.name, ratio, seed, name, result.data,
            result.base_perplexity, result.perplexity, result.kl_divergence,
            sum(pruned.report["seconds"].values()),
        )  # fmt: skip
        print(json.dumps(asdict(measurement)), flush=True)
        yield measurement
    shutil.rmtree(slim)


def report(measurements: list[Measurement], args: argparse.Namespace) -> None:
    """Print medians over the seeds, and write all measurements as JSON."""
    title = (
        f"{args.model}, {args.dtype}, calibration {Path(args.calibration).name} {args.nsamples} × "
        f"{args.seqlen} tokens, {len(args.seeds)} seeds; windows of {args.window}, "
        f"{args.max_tokens} tokens"
    )
    table = Table("model", "ratio", "text", "contestant", "PPL", "KL", "loss / paper", title=title)
    losses = {
        (m.variant, m.ratio, m.seed, m.text): m.loss
        for m in measurements
        if m.contestant == REFERENCE
    }
    groups: dict[tuple[str, float, str, str], list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.variant, m.ratio, m.text, m.contestant), []).append(m)
    for (variant, ratio, text, contestant), members in groups.items():
        keys = [(variant, ratio, m.seed, text) for m in members]
        relative = [m.loss / losses[k] for m, k in zip(members, keys, strict=True) if k in losses]
        spread = f"{min(relative):.3f}–{max(relative):.3f}" if relative else ""
        table.add_row(
            variant,
            f"{ratio:.0%}",
            text,
            contestant,
            f"{statistics.median(m.perplexity for m in members):.2f}",
            f"{statistics.median(m.kl_divergence for m in members):.3f}",
            f"{statistics.median(relative):.3f} ({spread})" if relative else "",
        )
    Console(width=120).print(table)
    write_json(args.json, protocol=title, measurements=[asdict(m) for m in measurements])


if __name__ == "__main__":
    main()
