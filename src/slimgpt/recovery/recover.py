"""Fine-tune a pruned model for a short time, and write it as the same kind of checkpoint.

The methods are in `slimgpt.recovery.methods`; the default, low-rank adapters, has the settings of
SlimGPT (arXiv 2412.18110, section 4.1). The training loop is `transformers.Trainer`.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from slimgpt.checkpoint.card import write_card
from slimgpt.checkpoint.results import RECOVERY_FILE, REPORT_FILE, PruningReport, read_report
from slimgpt.checkpoint.tokenizer import write_tokenizer
from slimgpt.checkpoint.writer import add_older_keys
from slimgpt.config import RecoverConfig, did_you_mean
from slimgpt.data.datasets import check_dataset, describe_dataset
from slimgpt.data.examples import training_examples
from slimgpt.data.samples import evaluation_tokens
from slimgpt.errors import ConfigError, DataError, MissingDependencyError
from slimgpt.models.comparison import check_same_vocabulary
from slimgpt.models.layout import check_language_head
from slimgpt.models.loading import load_config, load_model, usable_seqlen
from slimgpt.models.source import EMBEDDED_MODELS, Source, find_file, find_model
from slimgpt.models.tokenizer import copied_files, load_tokenizer
from slimgpt.models.weights import weight_files
from slimgpt.recovery.methods.base import RecoveryMethod
from slimgpt.recovery.methods.registry import RECOVERY_METHODS
from slimgpt.recovery.trainer import (
    TENSORBOARD_DIR,
    Examples,
    MetricsLogger,
    last_checkpoint,
    pad_batch,
    read_metrics,
    training_arguments,
)
from slimgpt.runtime.distributed import TIME_LIMIT, broadcast, is_main, training_together
from slimgpt.runtime.environment import computation, peak_memory, versions
from slimgpt.runtime.files import describe_file, writing
from slimgpt.runtime.progress import Progress, no_progress
from slimgpt.runtime.run_directory import Run, open_run

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class RecoverResult:
    """The result of a recovery.

    Attributes
    ----------
    output : Path
        The directory with the recovered model.
    report : dict
        The content of ``recovery_report.json``.
    """

    output: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """The inputs of a recovery."""

    source: Source
    teacher: Source | None
    config: RecoverConfig
    method: RecoveryMethod
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    held_out: Examples
    progress: Progress


def recover(
    model: str,
    output: str | Path,
    *,
    restart: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> RecoverResult:
    """Fine-tune a pruned model and write it as a checkpoint of the same kind.

    After an interruption, the same call continues from the last training checkpoint.

    Parameters
    ----------
    model : str
        A directory with a pruned model, or any model of a supported family.
    output : str or Path
        Directory for the result. It must not exist, be empty, or hold an interrupted run.
    restart : bool
        Discard an interrupted run in `output` and start over.
    progress : Progress
        Called after each training step, see `slimgpt.runtime.progress`.
    **options
        The fields of `slimgpt.config.RecoverConfig`, for example ``method="distill"``.

    Returns
    -------
    RecoverResult
        The output directory, and the report with the training loss and the held-out perplexity.

    Raises
    ------
    SlimGPTError
        If an option, a model or the data is wrong, a package is missing, or the interrupted run
        had other options. The output then has no partial result.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.recover("slim", "recovered", method="distill", max_steps=100)  # doctest: +SKIP
    """
    config = RecoverConfig.create(**options)
    output = Path(output)
    source = find_model(model)
    if find_file(source, RECOVERY_FILE):
        raise ConfigError(
            f"{model} has been recovered already",
            hint="recover the pruned model, with more --epochs or --max-steps",
        )
    needs_teacher = RECOVERY_METHODS[config.method].needs_teacher
    teacher = _find_teacher(source, config) if needs_teacher else None
    check_dataset(config.data, "calibration")
    check_dataset(config.eval_data, "evaluation")
    check_packages(config)
    model_config = load_config(source)
    check_language_head(source.name, model_config)
    seqlen = usable_seqlen(config.seqlen, model_config)
    config = config.model_copy(update={"seqlen": seqlen})
    PartialState(timeout=TIME_LIMIT)  # joins the other processes of torchrun
    arguments = training_arguments(model_config, config, output)
    with open_run(output) as run:
        tokenizer = load_tokenizer(source)
        examples = training_examples(
            config.data, tokenizer, config.seqlen, config.max_examples, config.text_field
        )
        held_out = _held_out_windows(config, tokenizer)
        method = RECOVERY_METHODS[config.method](config)
        job = _Job(source, teacher, config, method, tokenizer, examples, held_out, progress)
        if is_main():
            run.identify(_identity(job, arguments), restart)
        if not run.is_finished():
            _train(job, arguments)
            if is_main():
                _write(run, job)
        run.publish()
    report = broadcast(is_main() and json.loads((output / RECOVERY_FILE).read_text("utf-8")))
    return RecoverResult(output, report)


def _identity(job: _Job, arguments: TrainingArguments) -> dict[str, Any]:
    """Everything that determines the result."""
    models = {"model": job.source} | ({"teacher": job.teacher} if job.teacher else {})
    return {
        **{role: model.title for role, model in models.items()},
        **{f"{role} config": _config_sha256(model) for role, model in models.items()},
        **{
            f"{role}'s {file.name}": describe_file(file)
            for role, model in models.items()
            for file in (*weight_files(model), *copied_files(model).values())
        },
        **job.config.model_dump(mode="json", exclude={"teacher", "report_to"}),
        "examples_sha256": _sha256(job.examples),
        "held_out_sha256": _sha256(job.held_out),
        "device": arguments.device.type,
        "processes": arguments.world_size,
        **computation(),
        **_versions(job.method),
    }


def _versions(method: RecoveryMethod) -> dict[str, str]:
    return versions("accelerate", *([method.package] if method.package else []))


def _train(job: _Job, arguments: TrainingArguments) -> None:
    """Train to the last step and save a checkpoint; resume from the newest one if there is any."""
    state = Path(str(arguments.output_dir))
    checkpoint, before = broadcast(is_main() and last_checkpoint(state)) or (None, None)
    if before:
        log.info("resuming after step %d", before.global_step)
        if before.global_step >= before.max_steps:
            return
    arguments.eval_on_start = not checkpoint
    config, teacher = job.config, job.teacher
    pad_token: Any = job.tokenizer.pad_token_id or 0
    set_seed(config.seed)
    model = job.method.load_trainable(job.source)
    trainer = job.method.make_trainer(
        load_model(teacher, config.dtype, str(arguments.device)) if teacher else None,
        model=model,
        args=arguments,
        train_dataset=job.examples,
        eval_dataset=job.held_out,
        data_collator=partial(pad_batch, pad_token=pad_token),
        callbacks=[MetricsLogger(job.progress)],
    )
    trainer.remove_callback(PrinterCallback)
    log.info("training on %d examples of %s", len(job.examples), config.data)
    with writing(state.parent), training_together():
        trainer.train(resume_from_checkpoint=checkpoint)


def _report(job: _Job, metrics: list[dict[str, Any]], state: TrainerState) -> dict[str, Any]:
    config = job.config
    cost = state.log_history[-1]
    return {
        # The report goes to the hub with the model, so it holds no local paths.
        "model": job.source.title,
        "teacher": job.teacher.title if job.teacher else None,
        "config": config.model_dump(mode="json", exclude={"teacher"})
        | {"data": Path(config.data).name, "eval_data": Path(config.eval_data).name},
        "data": describe_dataset(config.data, "calibration"),
        "held_out": describe_dataset(config.eval_data, "evaluation"),
        "num_examples": len(job.examples),
        "steps": state.global_step,
        "train_loss": [[m["step"], m["loss"]] for m in metrics if "loss" in m],
        "held_out_perplexity": [[m["step"], m["perplexity"]] for m in metrics if "perplexity" in m],
        "seconds": round(cost["seconds"], 3),
        "peak_memory_bytes": max(cost["peak_memory_bytes"], peak_memory() or 0) or None,
        "versions": _versions(job.method),
    }


def _find_teacher(source: Source, config: RecoverConfig) -> Source:
    """Find the teacher, whose vocabulary must match the trained model's."""
    name, report = config.teacher, find_file(source, REPORT_FILE)
    if name is None and report:
        base = read_report(report, PruningReport)["base_model"]
        if "/" in base or base in EMBEDDED_MODELS:  # otherwise the name of a local folder
            name = base
    if name is None:
        raise ConfigError(
            f"{source.name} has no pruning report that says where on the hub its base model is",
            hint="name the model to distil from as --teacher",
        )
    teacher = find_model(name)
    check_same_vocabulary(source, teacher)
    return teacher


def check_packages(config: RecoverConfig) -> None:
    """Check that the packages for the method and the trackers are installed."""
    package = RECOVERY_METHODS[config.method].package
    if package and find_spec(package) is None:
        raise MissingDependencyError(
            package, f"the method {config.method!r}", "pip install 'slimgpt[recover]'"
        )
    for tracker in config.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            known = did_you_mean(tracker, list(INTEGRATION_TO_CALLBACK))
            raise ConfigError(f"no tracker {tracker!r}", hint=known)
        if tracker not in get_available_reporting_integrations():
            raise MissingDependencyError(tracker, "this tracker", f"pip install {tracker}")


def _held_out_windows(config: RecoverConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    tokens = evaluation_tokens(
        config.eval_data, tokenizer, config.eval_tokens, config.text_field
    ).tolist()
    starts = range(0, len(tokens) - config.seqlen + 1, config.seqlen)
    windows = [tokens[start : start + config.seqlen] for start in starts]
    if not windows:
        raise DataError(
            f"{config.eval_data} has {len(tokens)} tokens, less than one window of {config.seqlen}",
            hint="give a longer --eval-data, more --eval-tokens or a smaller --seqlen",
        )
    return [{"input_ids": window, "labels": window} for window in windows]


def _config_sha256(source: Source) -> str:
    return hashlib.sha256(load_config(source).to_json_string().encode()).hexdigest()


def _sha256(examples: Examples) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example).encode())
    return digest.hexdigest()


def _write(run: Run, job: _Job) -> None:
    """Merge the trained weights into the weights of the checkpoint, and save them."""
    last: Any = last_checkpoint(run.state)
    trained, state = last
    source = job.source
    model = job.method.load_trained(source, trained)
    log.info("saving to %s", run.output)
    with run.result() as directory:
        model.save_pretrained(directory)
        add_older_keys(directory)
        write_tokenizer(source, job.tokenizer, directory)
        metrics = [read_metrics(entry) for entry in state.log_history]
        lines = "".join(json.dumps(entry) + "\n" for entry in metrics)
        (directory / METRICS_FILE).write_text(lines, encoding="utf-8")
        text = json.dumps(_report(job, metrics, state), indent=1) + "\n"
        (directory / RECOVERY_FILE).write_text(text, encoding="utf-8")
        if (run.state / TENSORBOARD_DIR).is_dir():
            shutil.copytree(run.state / TENSORBOARD_DIR, directory / TENSORBOARD_DIR)
        if pruning_report := find_file(source, REPORT_FILE):
            shutil.copyfile(pruning_report, directory / REPORT_FILE)
            write_card(directory)
