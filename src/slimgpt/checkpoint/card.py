"""Keep results in a pruned model's directory, and write its model card (README.md) from them."""

import json
import logging
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from transformers import AutoConfig
from yaml import YAMLError

from slimgpt.checkpoint.results import (
    PERPLEXITY_FILE,
    RECOVERY_FILE,
    REPORT_FILE,
    SECONDS_FOR_OTHERS,
    TASKS_FILE,
    PruningReport,
    RecoveryReport,
    read_typed,
)
from slimgpt.checkpoint.writer import is_plain
from slimgpt.config import is_baseline
from slimgpt.data.datasets import short_name
from slimgpt.errors import ConfigError, SlimGPTError
from slimgpt.models.layout import auto_class_of
from slimgpt.presentation.tables import (
    escaped,
    markdown_table,
    perplexity_table,
    sizes,
    tasks_table,
    to_markdown,
)
from slimgpt.runtime.files import write_atomically
from slimgpt.runtime.locks import writing_alone

log = logging.getLogger(__name__)

CARD_FILE = "README.md"

_CARD = """
# {base}, pruned by {percent:g} %

A smaller model, made from {base} by structured pruning with
SlimGPT {version}. Whole units ({units}attention heads, FFN channels, experts) are removed;
{rest}.

{facts}

## Use

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained(path{trust})
tokenizer = AutoTokenizer.from_pretrained(path{trust})
```
{why}{recovery}
## Perplexity

<!-- perplexity -->
Not measured. `slimgpt eval` measures it and fills this section.
<!-- end of perplexity -->

## Tasks

<!-- tasks -->
Not measured. `slimgpt eval --tasks commonsense` measures them and fills this section.
<!-- end of tasks -->

Kept indices, errors and versions: `{report_file}`.
"""

_EXPORT_CARD = """---
{metadata}
---

# {title}

`{file}` is a{pruned} model for llama.cpp, made from {base} with SlimGPT.
"""

_REST = """the
remaining weights are updated so that each layer's output changes as little as possible
(method: [arXiv 2412.18110](https://arxiv.org/abs/2412.18110))"""

_METHOD = (
    "slimgpt, channels {0.channel_selection}, head error {0.head_error}, "
    "damping {0.damping} {0.damping_mode}, correction {0.correction}, "
    "refit epochs {0.refit_epochs}"
)

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
}

_WHY = """
The layers differ in width, so the checkpoint has a small modelling file of its own
(`trust_remote_code=True`). After `import slimgpt` it is not needed.
"""

_RECOVERY = """
## Recovery

After pruning, fine-tuned for {report.steps} steps of {config.batch_size} {kind}s on {data}:
method {config.method}, learning rate {config.learning_rate:g}, {config.seqlen} tokens per {kind}.
Held-out perplexity on {held_out}, windows of {config.seqlen} tokens: {before:.2f} before and
{after:.2f} after. {divergence}Curves: `{file}`.
"""

_DIVERGENCE = """KL divergence from {teacher} there: {before:.4f} before and
{after:.4f} after, at step {report.best_step}, from which the weights are. """

_KEPT = """The training did not lower the KL divergence from {teacher}
there ({before:.4f}), so the weights are those before it. """


def write_card(directory: Path) -> None:
    """Write ``README.md`` from ``pruning_report.json`` and, if there is one, the recovery report.

    Parameters
    ----------
    directory : Path
        Directory of a pruned model.
    """
    report = read_typed(directory / REPORT_FILE, PruningReport)
    config, calibration = report.config, report.calibration
    is_ours = not is_baseline(config.method)
    facts = sizes(report) | {
        "Layer ratios": _layer_ratios(report),
        "Calibration": f"{escaped(calibration.data)}, {calibration.nsamples} × "
        f"{calibration.seqlen} tokens, seed {config.seed}",
        "Method": _METHOD.format(config) if is_ours else config.method,
    }
    others = f"the\nremaining weights are unchanged (baseline method: {config.method})"
    model_config = AutoConfig.from_pretrained(directory)
    auto_class, is_stock = auto_class_of(model_config).__name__, is_plain(model_config)
    body = _CARD.format(
        auto_class=auto_class,
        base=escaped(report.base_model),
        percent=round(100 * report.target_ratio, 1 if report.target else 4),
        version=escaped(report.versions["slimgpt"]),
        rest=_REST if is_ours else others,
        facts=markdown_table(("", ""), facts.items()),
        units="layers, " if report.dropped else "",
        trust="" if is_stock else ", trust_remote_code=True",
        why="" if is_stock else _WHY,
        recovery=_recovery(directory / RECOVERY_FILE),
        report_file=REPORT_FILE,
    )
    metadata = _metadata(report.base_model, _PIPELINES[auto_class]).to_yaml()
    write_atomically(directory / CARD_FILE, f"---\n{metadata}\n---\n{body}")


def _metadata(base: str, pipeline: str) -> ModelCardData:
    """Metadata for the hub; names the base model if it is a hub id."""
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["slimgpt", "pruned"],
        **_origin(base, "finetune"),  # the hub's word for other weights of the same kind
    )


def _origin(base: str, relation: str) -> dict[str, Any]:
    """Base model, relation to it and license, if the base is on the hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return {}
    return {"base_model": base, "base_model_relation": relation, **_license(base)}


def export_card(file: Path, model: str) -> str:
    """Make the card of a file for llama.cpp.

    Parameters
    ----------
    file : Path
        The exported file.
    model : str
        The model that it was exported from: a directory or a hub id.
    """
    directory = Path(model)
    report, base = directory / REPORT_FILE, model
    if report.is_file():
        base = read_typed(report, PruningReport).base_model
    elif directory.exists():
        base = directory.resolve().name
    metadata = ModelCardData(
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=["slimgpt", "gguf", *(["pruned"] if report.is_file() else [])],
        **_origin(base, "quantized"),
    )
    return _EXPORT_CARD.format(
        metadata=metadata.to_yaml(),
        title=escaped(file.stem),
        file=escaped(file.name),
        pruned=" pruned" if report.is_file() else "",
        base=escaped(base),
    )


def _license(base: str) -> dict[str, Any]:
    """License of a hub model, if its card is in the cache."""
    file = try_to_load_from_cache(base, CARD_FILE)
    if not isinstance(file, str):
        return {}
    try:
        data = _read_card(Path(file)).data
    except ConfigError as err:
        log.debug("the license of %s is unknown: %s", base, err)
        return {}
    return {name: data.get(name) for name in ("license", "license_name")}


def _read_card(file: Path) -> ModelCard:
    """Read a card and its metadata; the user may have edited both."""
    try:
        return ModelCard.load(file)
    except (OSError, LookupError, RecursionError, TypeError, ValueError, YAMLError) as err:
        raise ConfigError(
            f"{file}, which cannot be read: {' '.join(str(err).split())}",
            hint="a model card is Markdown in UTF-8 with YAML at its top",
        ) from None


def _layer_ratios(report: PruningReport) -> str:
    config, dropped = report.config, report.dropped
    ratios = [ratio for index, ratio in enumerate(report.layer_ratios) if index not in dropped]
    if given := config.layer_ratios:
        percents = ", ".join(f"{ratio:.1%}" for ratio in ratios[: len(given)])
        return f"given: {percents} of the first blocks; the others are whole"
    if dropped and not any(ratios):
        return "the layers that are left are whole"
    if report.is_measured:
        return f"measured, {min(ratios):.1%} to {max(ratios):.1%}"
    return f"{config.schedule}, {ratios[0]:.1%} in the first block to {ratios[-1]:.1%} in the last"


def _recovery(file: Path) -> str:
    if not file.is_file():
        return ""
    report = read_typed(file, RecoveryReport)
    perplexities, divergences = dict(report.held_out_perplexity), dict(report.held_out_kl)
    best = report.best_step if report.best_step in perplexities else max(perplexities)
    divergence = ""
    if {0, best} <= divergences.keys():
        divergence = (_DIVERGENCE if best else _KEPT).format(
            report=report,
            teacher=escaped(report.teacher or ""),
            before=divergences[0],
            after=divergences[best],
        )
    data, kind = escaped(report.data), "example"
    if report.tokens:
        data, kind = f"{data} ({report.tokens:,} tokens)", "window"
    return _RECOVERY.format(
        report=report,
        config=report.config,
        data=data,
        kind=kind,
        held_out=escaped(report.held_out),
        before=report.held_out_perplexity[0][1],
        after=perplexities[best],
        divergence=divergence,
        file=RECOVERY_FILE,
    )


def _update_card(directory: Path, name: str, results: list[Any]) -> None:
    """Update the results in ``README.md`` and its metadata, if the card has a section for them."""
    file = directory / CARD_FILE
    sections = {
        PERPLEXITY_FILE: ("perplexity", perplexity_table, _perplexity_metric),
        TASKS_FILE: ("tasks", tasks_table, _task_metric),
    }
    if name not in sections or not file.is_file():
        return
    section, make_table, metric = sections[name]
    start, end = f"<!-- {section} -->", f"<!-- end of {section} -->"
    try:
        card = _read_card(file)
    except ConfigError as err:
        log.warning("the results are not in %s", err)
        return
    data: Any = card.data
    before, found_start, rest = card.text.partition(start)
    _, found_end, after = rest.partition(end)
    if found_start and found_end:
        card.text = f"{before}{start}\n{to_markdown(make_table(results))}\n{end}{after}"
        metrics = [*(data.eval_results or ()), *map(metric, results)]
        by_protocol = {str((m.unique_identifier, m.metric_type)): m for m in metrics}
        data.eval_results = list(by_protocol.values())
        data.model_name = data.model_name or results[0].model
        write_atomically(file, str(card))


def _perplexity_metric(result: Any) -> EvalResult:
    """A perplexity in the hub's metadata format; ``dataset_config`` distinguishes protocols."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=short_name(result.data),
        dataset_name=result.data,
        dataset_config=f"windows of {result.seqlen} tokens, {result.dtype}",
        metric_type="perplexity",
        metric_value=result.perplexity,
    )


def _task_metric(result: Any) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=result.task,
        dataset_name=result.task,
        dataset_config=f"{result.num_fewshot}-shot, {result.num_docs} questions of {result.data}, "
        f"{result.dtype}",
        metric_type=result.metric,
        metric_value=result.value,
    )


def keep_results(
    directory: Path | None,
    name: str,
    results: Sequence[Any],
    protocol: Callable[[dict[str, Any]], Hashable],
) -> None:
    """Save results in a pruned model's directory and its card. If writing fails, only warn.

    Parameters
    ----------
    directory : Path or None
        Directory of the model. With None, or without ``pruning_report.json``, nothing is saved.
    name : str
        File in the directory: a JSON list of all results.
    results : sequence of dataclass instances
        The new results.
    protocol : callable
        Returns the protocol of a result given as JSON. A new result replaces older ones with the
        same protocol.
    """
    if not results or directory is None or not (directory / REPORT_FILE).is_file():
        return
    file = directory / name
    try:
        if file.parent.is_symlink():
            raise OSError(f"{file.parent} is a link that leads elsewhere")
        file.parent.mkdir(exist_ok=True)
        with writing_alone(file.parent, SECONDS_FOR_OTHERS):
            both = [*_kept(file, type(results[0])), *results]
            kept = list({protocol(asdict(result)): result for result in both}.values())
            write_atomically(file, json.dumps(kept, indent=1, default=asdict) + "\n")
            _update_card(directory, name, kept)
    except (OSError, SlimGPTError) as err:
        log.warning("the results are not kept in %s: %s", directory, err)


def _kept(file: Path, kind: type) -> list[Any]:
    """Read the results in a file; a file of another form is set aside."""
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
