"""Models and measurements of a benchmark that are stored, so that an interrupted run goes on."""

import argparse
import json
import math
import statistics
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import slimgpt


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark that calibrates on text and evaluates on others."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--sample-length", type=int, default=512)
    parser.add_argument("--texts", nargs="+", required=True, help="held-out texts")
    parser.add_argument("--seqlen", nargs="+", type=int, default=[512], help="of these texts")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="of each of these texts")
    parser.add_argument("--dtype", default="bfloat16", help="of the measured models")
    parser.add_argument("--work", type=Path, default=Path(".measured"), help="keeps the models")
    parser.add_argument("--json", type=Path)


def folder(work: Path, name: str, **settings: Any) -> Path:
    """Folder of a model; its name depends on the settings."""
    name = name.replace(" ", "-").replace("/", "-")
    return work / f"{name}-{sha256(json.dumps(settings).encode()).hexdigest()[:8]}"


def is_complete(model: Path) -> bool:
    """Whether a run has finished; an interrupted one is continued."""
    return (model / "config.json").exists()


def measured(model: str, kind: str, place: Path, **options: Any) -> list[dict[str, Any]]:
    """Evaluate a model, or read what was stored.

    Parameters
    ----------
    model : str
        The model.
    kind : {"perplexity", "tasks"}
        What is measured.
    place : Path
        Where the result is stored, without the suffix.
    **options
        Of `slimgpt.evaluate`.
    """
    file = place.with_name(f"{place.name}.json")  # a ratio in the name has a point
    if not file.exists():
        result = asdict(slimgpt.evaluate(model, **options))[kind]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def perplexities(model: str, name: str, work: Path, args: argparse.Namespace) -> list[Any]:
    """Perplexity on the texts, and the KL divergence from the dense model."""
    options: dict[str, Any] = {
        "data": args.texts,
        "seqlen": args.seqlen,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
    }
    if model != args.model:
        options["against"] = args.model
    place = folder(work, f"perplexity-{name}", model=model, **options)
    return measured(model, "perplexity", place, **options)


def loss_left(found: list[Any], reference: list[Any], dense: list[Any]) -> float:
    """Loss ln(perplexity / dense) over that of a reference, median over the texts."""
    return statistics.median(
        math.log(text["perplexity"] / whole["perplexity"])
        / math.log(other["perplexity"] / whole["perplexity"])
        for text, other, whole in zip(found, reference, dense, strict=True)
    )
