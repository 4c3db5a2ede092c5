"""What is kept beside a pruned model: results, and the card (README.md) that is made from them."""

import json
import logging
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from slimgpt.checkpoint.results import (
    PERPLEXITY_FILE,
    RECOVERY_FILE,
    REPORT_FILE,
    SECONDS_FOR_OTHERS,
    TASKS_FILE,
    PruningReport,
    RecoveryReport,
    read_report,
    read_typed,
)
from slimgpt.errors import ConfigError, SlimGPTError
from slimgpt.runtime.files import write_atomically
from slimgpt.runtime.locks import writing_alone

log = logging.getLogger(__name__)

CARD_FILE = "README.md"

_CARD = """---
{front_matter}---
# {base_name}, pruned by {percent:g} %

A smaller dense model, made from {base_name} by structured pruning with
SlimGPT {version}: whole key/value groups of attention and whole FFN channels are gone, and
{rest}.

| | |
|---|---|
| Parameters | {params_before:,} → {params_after:,} |
| Removed of the prunable block parameters, asked for | {target_ratio:.2%} |
| Removed of the prunable block parameters, in fact | {block_ratio:.2%} |
| Removed of all parameters, embeddings included | {total_ratio:.2%} |
| Layer ratios | {layer_ratios} |
| Calibration | {data}, {nsamples} × {seqlen} tokens, seed {seed} |
| Method | {method} |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path{trust})
tokenizer = AutoTokenizer.from_pretrained(path{trust})
```
{why}{recovery}
## Perplexity

{perplexity}
Not measured. `slimgpt eval` measures it and fills this section.
{end_of_perplexity}

## Tasks

{tasks}
Not measured. `slimgpt eval --tasks commonsense` measures them and fills this section.
{end_of_tasks}

Kept indices, errors and versions: `{report_file}`.
"""

_REST = """the
remaining weights are updated so that each layer's output changes as little as possible
(method: [arXiv 2412.18110](https://arxiv.org/abs/2412.18110))"""

_REST_OF_OTHERS = "the\nremaining weights are as they were (method for comparison: {method})"

_METHOD = (
    "slimgpt, channels {channel_selection}, head error {head_error}, "
    "damping {damping} {damping_mode}, correction {correction}, refit epochs {refit_epochs}"
)

_PERPLEXITY = "<!-- perplexity -->", "<!-- end of perplexity -->"

_TASKS = "<!-- tasks -->", "<!-- end of tasks -->"

_WHY = """
The layers differ in width, so a small modelling file comes with the checkpoint
(`trust_remote_code=True`). After `import slimgpt` it is not needed.
"""

_RECOVERY = """
## Recovery

After pruning, trained for {steps} steps of {batch_size} examples on {data}: method {method},
learning rate {learning_rate:g}, {seqlen} tokens per example. Perplexity on {held_out}, windows of
{seqlen} tokens: {before:.2f} before and {after:.2f} after. Curves: `{recovery_file}`.
"""


def write_card(directory: Path) -> None:
    """Write ``README.md`` from ``pruning_report.json`` and, if there is one, the recovery report.

    Parameters
    ----------
    directory : Path
        Of a pruned model.
    """
    raw = read_report(directory / REPORT_FILE, PruningReport)
    report, base = _escaped(raw), raw["base_model"]
    config, calibration = report["config"], report["calibration"]
    uniform = config["uniform"]
    is_ours = config["method"] == "slimgpt"
    card = _CARD.format(
        **{key: report[key] for key in ("params_before", "params_after")},
        **{key: report[key] for key in ("target_ratio", "block_ratio", "total_ratio")},
        **{key: calibration[key] for key in ("data", "nsamples", "seqlen")},
        seed=config["seed"],
        layer_ratios=_layer_ratios(config, report["layer_ratios"], report["is_measured"]),
        rest=_REST if is_ours else _REST_OF_OTHERS.format(**config),
        method=_METHOD.format(**config) if is_ours else config["method"],
        front_matter=_front_matter(base),
        percent=round(100 * report["target_ratio"], 4),
        base_name=report["base_model"],
        version=report["versions"]["slimgpt"],
        trust="" if uniform else ", trust_remote_code=True",
        why="" if uniform else _WHY,
        recovery=_recovery(directory / RECOVERY_FILE),
        perplexity=_PERPLEXITY[0],
        end_of_perplexity=_PERPLEXITY[1],
        tasks=_TASKS[0],
        end_of_tasks=_TASKS[1],
        report_file=REPORT_FILE,
    )
    write_atomically(directory / CARD_FILE, card)


def _front_matter(base: str) -> str:
    """Metadata for the hub, with the base model if that is there."""
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["slimgpt", "pruned"],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        values["base_model"] = base
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _plain(text: str) -> str:
    """Text on one line, without characters that cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _escaped(value: Any) -> Any:
    """JSON values, in whose texts nothing is markup for Markdown or HTML."""
    if isinstance(value, str):
        for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
            value = value.replace(character, entity)
        return re.sub(r"([\\`*\[\]|~$])", r"\\\1", _plain(value))
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def _layer_ratios(config: dict[str, Any], ratios: Sequence[float], is_measured: bool) -> str:
    if given := config["layer_ratios"]:
        percents = ", ".join(f"{ratio:.1%}" for ratio in ratios[: len(given)])
        return f"given: {percents} of the first blocks; the others are whole"
    if is_measured:
        return f"measured, {min(ratios):.1%} to {max(ratios):.1%}"
    return (
        f"{config['schedule']}, {ratios[0]:.1%} in the first block to {ratios[-1]:.1%} in the last"
    )


def _recovery(file: Path) -> str:
    if not file.is_file():
        return ""
    report = _escaped(read_report(file, RecoveryReport))
    config, curve = report["config"], report["held_out_perplexity"]
    return _RECOVERY.format(
        **{key: report[key] for key in ("steps", "data", "held_out")},
        **{key: config[key] for key in ("batch_size", "method", "learning_rate", "seqlen")},
        before=curve[0][1],
        after=curve[-1][1],
        recovery_file=RECOVERY_FILE,
    )


def _update_card(directory: Path, name: str, results: list[dict[str, Any]]) -> None:
    """Replace results in ``README.md``, if it has a section for them, and nothing else."""
    file = directory / CARD_FILE
    sections = {
        PERPLEXITY_FILE: (*_PERPLEXITY, _perplexity_table),
        TASKS_FILE: (*_TASKS, _tasks_table),
    }
    if name not in sections or not file.is_file():
        return
    start, end, make_table = sections[name]
    try:
        card = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        log.warning("the results are not in %s, which cannot be read: %s", file, err)
        return
    before, found_start, rest = card.partition(start)
    _, found_end, after = rest.partition(end)
    if found_start and found_end:
        table = make_table(_escaped(results))
        write_atomically(file, f"{before}{start}\n{table}\n{end}{after}")


def _perplexity_table(results: list[dict[str, Any]]) -> str:
    rows = [
        "| Text | Window | Tokens | Precision | Perplexity | Base | Its perplexity | KL to it |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['data']} | {r['seqlen']} | {r['tokens']:,} | {r['dtype']} "
            f"| {_number(r['perplexity'])} | {r['base'] or ''} | {_number(r['base_perplexity'])} "
            f"| {_number(r['kl_divergence'])} |"
            for r in sorted(results, key=lambda r: (r["data"], r["seqlen"]))
        ),
    ]
    protocol = "Windows do not overlap; every token but the first of a window is predicted."
    return "\n".join([*rows, "", protocol])


def _tasks_table(results: list[dict[str, Any]]) -> str:
    rows = [
        "| Task | Metric | Shots | Questions | Data | Precision | Score | Base | Its score |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['task']} | {r['metric']} | {r['num_fewshot']} | {r['num_docs']:,} | {r['data']} "
            f"| {r['dtype']} | {_score(r['value'], r['stderr'])} | {r['base'] or ''} "
            f"| {_score(r['base_value'], r['base_stderr'])} |"
            for r in results
        ),
    ]
    versions = ", ".join(sorted({r["lm_eval"].split(",")[0] for r in results}))
    return "\n".join([*rows, "", f"lm-eval {versions}, ± one standard error."])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _score(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def keep_results(
    directory: Path | None,
    name: str,
    results: Sequence[Any],
    protocol: Callable[[dict[str, Any]], Hashable],
) -> None:
    """Keep results with a pruned model and in its card; a failure to do so does not lose them.

    Parameters
    ----------
    directory : Path or None
        Of the model. Without one, and in one without ``pruning_report.json``, nothing is kept.
    name : str
        File in it: a JSON list of all results.
    results : sequence of dataclass instances
        What was measured now.
    protocol : callable
        Of a result as JSON: what it has in common with older ones that it takes the place of.
    """
    if not results or directory is None or not (directory / REPORT_FILE).is_file():
        return
    file = directory / name
    try:
        if file.parent.is_symlink():
            raise OSError(f"{file.parent} is a link that leads elsewhere")
        file.parent.mkdir(exist_ok=True)
        with writing_alone(file.parent, SECONDS_FOR_OTHERS):
            kept = [*_kept(file, type(results[0])), *results]
            by_protocol = {protocol(result): result for result in map(asdict, kept)}
            values = list(by_protocol.values())
            write_atomically(file, json.dumps(values, indent=1) + "\n")
            _update_card(directory, name, values)
    except (OSError, SlimGPTError) as err:
        log.warning("the results are not kept in %s: %s", directory, err)


def _kept(file: Path, kind: type) -> list[Any]:
    """The results in a file; one that is of another form is set aside."""
    if not file.exists():
        return []
    try:
        return read_typed(file, list[kind])
    except ConfigError as err:
        names = (file.with_name(f"{file.name}.bad-{number}") for number in count(1))
        aside = next(name for name in names if not name.exists())
        file.rename(aside)
        log.warning("%s; it is now %s", err, aside.name)
        return []
