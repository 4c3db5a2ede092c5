"""Write all results for a pruned model as one self-contained HTML page."""

import logging
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from slimgpt.benchmarking.results import BenchResult
from slimgpt.checkpoint.results import (
    PERPLEXITY_FILE,
    RECOVERY_FILE,
    REPORT_FILE,
    SPEED_FILE,
    TASKS_FILE,
    PruningReport,
    RecoveryReport,
    read_report,
    read_typed,
)
from slimgpt.config import PruneConfig, RecoverConfig, ReportConfig, is_baseline
from slimgpt.data.datasets import short_name
from slimgpt.errors import ConfigError, MissingDependencyError
from slimgpt.evaluation.evaluate import TaskResult
from slimgpt.evaluation.perplexity import EvalResult
from slimgpt.models.comparison import check_same_vocabulary
from slimgpt.models.loading import load_model
from slimgpt.models.source import Source, find_model
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.presentation import tables
from slimgpt.runtime.files import write_atomically, writing
from slimgpt.runtime.locks import writing_alone

log = logging.getLogger(__name__)

PAGE_FILE = "report.html"

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "To bake bread at home, you need",
    "Once upon a time, a small robot",
)


def report(output: str | Path, **options: Any) -> Path:
    """Write ``report.html`` into the directory of a pruned model.

    The page shows the pruning report, the results of evaluations and benchmarks, and the recovery
    report in that directory. Sections without data are left out.

    Parameters
    ----------
    output : str or Path
        Directory of the pruned model.
    **options
        The fields of `slimgpt.config.ReportConfig`, for example ``against="smollm2-135m"``.

    Returns
    -------
    Path
        The written file. The same inputs give the same bytes.

    Raises
    ------
    SlimGPTError
        If an option is wrong, the directory has no pruning report, or a package is missing.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.report("slim", against="smollm2-135m")  # doctest: +SKIP
    """
    config = ReportConfig.create(**options)
    directory = Path(output)
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise MissingDependencyError(package, "a report", "pip install 'slimgpt[report]'")
    if not (directory / REPORT_FILE).is_file():
        raise ConfigError(
            f"{directory} has no {REPORT_FILE}",
            hint="name a directory that `slimgpt prune` or `slimgpt recover` has written",
        )
    recovery = directory / RECOVERY_FILE
    results = {
        "pruning": read_report(directory / REPORT_FILE, PruningReport),
        "sizes": tables.sizes(read_typed(directory / REPORT_FILE, PruningReport)),
        "perplexity": _results(directory / PERPLEXITY_FILE, EvalResult),
        "tasks": _results(directory / TASKS_FILE, TaskResult),
        "speeds": _results(directory / SPEED_FILE, BenchResult),
        "recovery": read_report(recovery, RecoveryReport) if recovery.is_file() else None,
    }
    samples = _continuations(directory, config.against, config) if config.against else []
    page = _render(**results, samples=samples, config=config)
    file = directory / PAGE_FILE
    with writing(file), writing_alone(file):
        write_atomically(file, page)
    return file


def _results(file: Path, kind: type) -> list[Any]:
    """Read the results in a file; an empty list if there is no file."""
    return read_typed(file, list[kind]) if file.is_file() else []


def _continuations(directory: Path, against: str, config: ReportConfig) -> list[dict[str, str]]:
    """Greedy continuations of each prompt by the base and by the model."""
    prompts = _prompts(config.prompts) if config.prompts else PROMPTS
    sources = [find_model(against), find_model(str(directory))]
    check_same_vocabulary(sources[1], sources[0])
    texts = [_generate(source, prompts, config) for source in sources]
    return [
        {"prompt": prompt, "base": base, "model": ours}
        for prompt, base, ours in zip(prompts, *texts, strict=True)
    ]


def _prompts(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"cannot read --prompts {file}: {err}", hint="give a text file in UTF-8"
        ) from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {file} has no prompt", hint="write one on each line")
    return prompts


def _generate(source: Source, prompts: Sequence[str], config: ReportConfig) -> list[str]:
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source, config.dtype, config.device)
    end, text = tokenizer.eos_token_id, model.config.get_text_config()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        length, context = inputs["input_ids"].shape[1], text.max_position_embeddings
        if length + config.new_tokens > context:
            raise ConfigError(
                f"a prompt of {length} tokens and {config.new_tokens} new ones exceed the context "
                f"of {source.name}, {context}",
                hint="give shorter prompts or fewer --new-tokens",
            )
        log.info("%s goes on with: %s", source.name, prompt)
        ids = model.generate(**inputs.to(model.device), max_new_tokens=config.new_tokens)
        texts.append(tokenizer.decode(ids[0, length:], skip_special_tokens=True))
    return texts


def _render(pruning: dict[str, Any], recovery: dict[str, Any] | None, **results: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from slimgpt.presentation import figures

    environment = Environment(
        loader=PackageLoader("slimgpt.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"millions": _millions, "number": tables.brief, "short_name": short_name}
    commands = [_command("prune", pruning["base_model"], pruning["config"], PruneConfig)]
    if recovery:
        chosen = recovery["config"] | ({"teacher": t} if (t := recovery["teacher"]) else {})
        commands.append(_command("recover", recovery["model"], chosen, RecoverConfig))
    return environment.get_template("report.html.j2").render(
        pruning=pruning,
        recovery=recovery,
        is_baseline=is_baseline(pruning["config"]["method"]),
        removed=_removed_units(pruning),
        ffn_name=_ffn_name(pruning),
        experts=_experts_table(pruning),
        tables=tables,
        colors=figures.COLORS,
        drawn=_drawn(pruning, results["perplexity"], recovery),
        headline_perplexity=_longest_window(results["perplexity"]),
        headline_speed=next((s for s in results["speeds"] if len(s.costs) > 1), None),
        commands=commands,
        **results,
    )


def _drawn(
    pruning: dict[str, Any], perplexity: list[EvalResult], recovery: dict[str, Any] | None
) -> dict[str, str]:
    """Draw the charts for which there is data, by name."""
    from slimgpt.presentation.figures import bars, curves, inline, unit_map

    blocks, ratios = pruning["blocks"], pruning["layer_ratios"]

    dense = [shape["sublayers"][1] for shape in pruning["shapes"]]
    dropped = pruning.get("dropped", ())
    errors = {
        name: [
            (block["block"], block["sublayers"][place]["relative_error"])
            for block in blocks
            if block["block"] not in dropped
        ]
        for place, name in enumerate(("attention", _ffn_name(pruning)))
    }
    kept, before = _heads(blocks, pruning["shapes"])
    parts = [sublayer.get("parts", 1) for sublayer in dense]  # channels of an expert
    widths = [
        len(decided.get("parts") or ()) or len(decided["keep"]) * number
        for decided, number in zip((b["sublayers"][1] for b in blocks), parts, strict=True)
    ]
    drawn = {
        "ratios": inline(
            f"Bars of the share removed from each block: {ratios[0]:.1%} of the first, "
            f"{ratios[-1]:.1%} of the last.",
            bars(
                {"removed": ratios} | _scheduled(pruning),
                (f"all blocks: {pruning['block_ratio']:.1%}", pruning["block_ratio"]),
                percent=True,
            ),
        ),
        "widths": inline(
            f"Bars of the channels of each block ({_ffn_name(pruning)}): {widths[0]:,} are kept in "
            f"the first and {widths[-1]:,} in the last.",
            bars(
                {
                    "kept": widths,
                    "before": [s["num_units"] * n for s, n in zip(dense, parts, strict=True)],
                }
            ),
        ),
        "errors": inline(
            f"Curves of the relative error of {' and '.join(errors)} in each block; the largest "
            f"is {max(error for points in errors.values() for _, error in points):.1%}.",
            curves(errors, percent=True),
        ),
    }
    if sensitivity := pruning.get("sensitivity"):
        kept_blocks = [block["block"] for block in blocks if block["block"] not in dropped]
        costs = {
            name: [
                (block, by_sublayer[place])
                for block, by_sublayer in zip(kept_blocks, sensitivity["costs"], strict=True)
            ]
            for place, name in enumerate(errors)
        }
        drawn["costs"] = inline(
            f"Curves of what the pruning of {' and '.join(costs)} costs in each block, in nats per "
            "token.",
            curves(costs),
        )
    if trials := pruning.get("trials"):
        drawn["trials"] = inline(
            f"Curve of the divergence of each trial: {trials[0]:.3f} at first, "
            f"{min(trials):.3f} at best.",
            curves({"": list(enumerate(trials, 1))}, "trial"),
        )
    if _has_attention(pruning):
        drawn["heads"] = inline(
            f"Map of the attention heads: {sum(map(len, kept))} of {sum(before)} are kept.",
            unit_map(kept, before),
            height=min(80 + 24 * max(before), 560),
        )
    compared = [result for result in perplexity if result.layer_errors]
    label = "{0}, windows of {1.seqlen}"
    if len({(result.base, result.dtype) for result in compared}) > 1:
        label += ", from {1.base} in {1.dtype}"
    distances = {
        label.format(short_name(result.data), result): list(enumerate(result.layer_errors or ()))
        for result in compared
    }
    if distances:
        last = next(iter(distances.values()))[-1][1]
        drawn["distances"] = inline(
            f"Curves of the distance from the base after each block: {last:.1%} after the last.",
            curves(distances, percent=True),
        )
    if recovery:
        titles = {"train_loss": "loss", "held_out_perplexity": "perplexity", "held_out_kl": "KL"}
        for name, title in titles.items():
            points = recovery.get(name)
            if not points:
                continue
            drawn[name] = inline(
                f"Curve of the {title} over the steps: {points[0][1]:.2f} at first, "
                f"{points[-1][1]:.2f} at last.",
                curves({"": points}, "step"),
            )
    return drawn


def _scheduled(pruning: dict[str, Any]) -> dict[str, list[float]]:
    """Share that the schedule would remove from each block, if the widths were measured."""
    sensitivity = pruning.get("sensitivity")
    return {"by the schedule": sensitivity["layer_ratios"]} if sensitivity else {}


def _ffn_name(pruning: dict[str, Any]) -> str:
    """Name of the second sublayers of the blocks."""
    kinds = {shape["sublayers"][1]["kind"] for shape in pruning["shapes"]}
    names = {"ffn": "FFN", "experts": "experts"}
    return " or ".join(name for kind, name in names.items() if kind in kinds)


def _has_attention(pruning: dict[str, Any]) -> bool:
    """Whether any block has attention that can be pruned."""
    return not all(shape["sublayers"][0].get("is_fixed") for shape in pruning["shapes"])


def _with_experts(pruning: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any], int]]:
    """Decision and shape of each sublayer with experts, and its block, if that is not dropped."""
    dropped = pruning.get("dropped", ())
    blocks = zip(pruning["blocks"], pruning["shapes"], strict=True)
    pairs = ((b["sublayers"][1], s["sublayers"][1], b["block"]) for b, s in blocks)
    return [pair for pair in pairs if pair[0]["kind"] == "experts" and pair[2] not in dropped]


def _removed_units(pruning: dict[str, Any]) -> str:
    """Name what was removed."""
    dropped = pruning.get("dropped", ())
    ratios = (r for i, r in enumerate(pruning["layer_ratios"]) if i not in dropped)
    if dropped and not any(ratios):
        return "layers"
    experts = _with_experts(pruning)
    has_parts = any(decided.get("parts") for decided, _, _ in experts)
    is_fewer = any(len(decided["keep"]) < shape["num_units"] for decided, shape, _ in experts)
    names = {
        "layers": bool(dropped),
        "attention heads": _has_attention(pruning),
        "FFN channels": len(experts) < len(pruning["blocks"]),
        "channels of experts": has_parts,
        "experts": is_fewer or (bool(experts) and not has_parts),
    }
    *first, last = [name for name, is_removed in names.items() if is_removed]
    return f"{', '.join(first)} and {last}" if first else last


def _experts_table(pruning: dict[str, Any]) -> tables.Table | None:
    """What is left of the experts of each block, and how their tokens are routed."""
    rows = []
    for decided, shape, block in _with_experts(pruning):
        number, parts = len(decided["keep"]), shape.get("parts", 1)
        channels = len(decided.get("parts") or ()) // max(number, 1) or parts
        row = {
            "block": str(block),
            "experts": f"{number} of {shape['num_units']}",
            "channels of each": f"{channels:,} of {parts:,}" if parts > 1 else "",
            "rerouted": "",
            "load shift": "",
            "few tokens": "",
        }
        if routing := decided.get("routing"):
            row["rerouted"] = f"{routing['rerouted']:.1%}"
            row["load shift"] = f"{routing['load_shift']:.1%}"
            row["few tokens"] = str(len(routing.get("few_tokens", ())))
        rows.append(row)
    return tables.Table(rows, set(rows[0]) - {"block"}) if rows else None


def _heads(
    blocks: list[dict[str, Any]], shapes: list[dict[str, Any]]
) -> tuple[list[list[int]], list[int]]:
    """Indices of the heads that each block keeps, and its number of heads before.

    They are query heads where those can go by themselves, else units.
    """
    kept, before = [], []
    for block, shape in zip(blocks, shapes, strict=True):
        decided, dense = (
            next(s for s in of["sublayers"] if s["kind"] == "attention") for of in (block, shape)
        )
        per_unit = dense.get("parts", 1)
        before.append(dense["num_units"] * per_unit)
        units = (range(u * per_unit, (u + 1) * per_unit) for u in decided["keep"])
        kept.append(decided.get("parts") or [head for unit in units for head in unit])
    return kept, before


def _longest_window(results: list[EvalResult]) -> EvalResult | None:
    """The first result with the longest window, preferably one with a base."""
    return max(results, key=lambda r: (r.base_perplexity is not None, r.seqlen), default=None)


def _command(
    verb: str, model: str, config: dict[str, Any], options: type[PruneConfig | RecoverConfig]
) -> str:
    """Command line of a run, with the options that differ from the defaults."""
    defaults = options.create().model_dump(mode="json")
    lines = [shlex.join(["slimgpt", verb, model]), "--output OUT"]
    for name, value in config.items():
        if value == defaults[name]:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            lines.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(shlex.join([flag, text]))
    return " \\\n  ".join(lines)


def _millions(count: float) -> str:
    """Format a large number in millions or billions."""
    unit, name = (1e9, "B") if count >= 1e9 else (1e6, "M") if count >= 1e6 else (1e3, "k")
    return f"{count / unit:.3g} {name}"
