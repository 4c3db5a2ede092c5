"""Fine-tune a pruned model for a short time, and write it as the same kind of checkpoint.

The methods are in `slimgpt.recovery.methods`; the default, low-rank adapters, has the settings of
SlimGPT (arXiv 2412.18110, section 4.1). The training loop is `transformers.Trainer`.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from slimgpt.checkpoint.card import write_card
from slimgpt.checkpoint.results import (
    RECOVERY_FILE,
    REPORT_FILE,
    PruningReport,
    RecoveryReport,
    read_report,
)
from slimgpt.checkpoint.tokenizer import write_tokenizer
from slimgpt.checkpoint.writer import add_older_keys
from slimgpt.config import RecoverConfig, did_you_mean
from slimgpt.data.datasets import (
    SELF,
    are_same_files,
    check_dataset,
    dataset_files,
    describe_dataset,
)
from slimgpt.data.examples import training_examples, training_texts, training_windows
from slimgpt.data.prompts import Prompts, read_prompts
from slimgpt.data.samples import evaluation_tokens, held_out_samples
from slimgpt.errors import ConfigError, DataError, MissingDependencyError
from slimgpt.models.comparison import check_same_vocabulary
from slimgpt.models.layout import check_language_head
from slimgpt.models.loading import load_config, load_model
from slimgpt.models.source import EMBEDDED_MODELS, Source, find_file, find_model
from slimgpt.models.tokenizer import copied_files, load_tokenizer
from slimgpt.models.weights import weight_files
from slimgpt.recovery.budget import Budget, find_budget
from slimgpt.recovery.job import Data, Job
from slimgpt.recovery.methods.base import RecoveryMethod
from slimgpt.recovery.methods.registry import RECOVERY_METHODS
from slimgpt.recovery.teacher import (
    Teacher,
    all_learned,
    labelled,
    store_predictions,
)
from slimgpt.recovery.text import draw_text, text_options
from slimgpt.recovery.trainer import (
    DERIVED,
    TENSORBOARD_DIR,
    Examples,
    MetricsLogger,
    best_step,
    check_checkpoint,
    check_training,
    derive_options,
    has_stalled,
    held_out_curve,
    last_checkpoint,
    read_metrics,
    training_arguments,
)
from slimgpt.runtime.distributed import TIME_LIMIT, broadcast, is_main, training_together
from slimgpt.runtime.environment import computation, free_memory, peak_memory, versions
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


def recover(
    model: str,
    output: str | Path,
    *,
    restart: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> RecoverResult:
    """Fine-tune a pruned model and write it as a checkpoint of the same kind.

    After an interruption, the same call continues from what is stored: text, predictions of the
    dense model, the last training checkpoint.

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
        The output directory, and the report with the training loss, the held-out perplexity and,
        of distillation, the held-out KL divergence.

    Raises
    ------
    SlimGPTError
        If an option, a model or the data is wrong, a package is missing, or the interrupted run
        had other options. The output then has no partial result.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.recover("slim", "recovered", method="distill", tokens="1M")  # doctest: +SKIP
    """
    config = RecoverConfig.create(**options)
    output = Path(output)
    source = find_model(model)
    if find_file(source, RECOVERY_FILE):
        raise ConfigError(
            f"{model} has been recovered already",
            hint="recover the pruned model, with more --tokens, --epochs or --max-steps",
        )
    teacher = _find_teacher(source, config) if config.uses_teacher else None
    config, model_config = _checked(source, config)
    PartialState(timeout=TIME_LIMIT)  # joins the other processes of torchrun
    arguments = training_arguments(model_config, config, output)
    with open_run(output) as run:
        tokenizer = load_tokenizer(source)
        examples = None if config.is_on_text else _examples(config, tokenizer)
        prompts = _prompts(config, tokenizer)
        held_out = _held_out_windows(config, tokenizer)
        left_out = _num_left_out(config, held_out)
        method = RECOVERY_METHODS[config.method](config)
        job = Job(
            source,
            teacher,
            config,
            method,
            tokenizer,
            examples,
            prompts,
            held_out,
            left_out,
            progress,
        )
        if is_main():
            run.identify(_identity(job, arguments), restart)
        if not run.is_finished():
            budget = None
            if config.minutes:
                budget = find_budget(run, job, _teacher(job, arguments), arguments)
                timed = config.model_copy(update={"tokens": budget.tokens, "minutes": None})
                job = replace(job, config=derive_options(timed, model_config))
                arguments = training_arguments(model_config, job.config, output)
            data = _load_data(run, job, _teacher(job, arguments))
            _train(job, data, arguments)
            if is_main():
                _write(run, job, data, budget)
        run.publish()
    report = broadcast(is_main() and json.loads((output / RECOVERY_FILE).read_text("utf-8")))
    return RecoverResult(output, report)


def _checked(source: Source, config: RecoverConfig) -> tuple[RecoverConfig, PreTrainedConfig]:
    """Check data, packages and model; the options with those derived from the model."""
    for name in config.sources:
        check_dataset(name, "calibration")
    check_dataset(config.eval_data, "evaluation")
    check_packages(config)
    model_config = load_config(source)
    check_language_head(source.name, model_config)
    return derive_options(config, model_config), model_config


def check_recovery(model: str, config: RecoverConfig) -> None:
    """Check, before `model` is pruned, that the pruned model can be recovered on text.

    No weights are read, but the texts are, as far as they are needed.

    Parameters
    ----------
    model : str
        The dense model.
    config : RecoverConfig
        The options; the model is also the teacher.

    Raises
    ------
    SlimGPTError
        If an option, the model or the data is wrong, a text is too short, or a package is missing.
    """
    source = find_model(model)
    config, model_config = _checked(source, config)
    check_training(config, model_config, int(os.environ.get("WORLD_SIZE", "1")))
    tokenizer = load_tokenizer(source)
    num_left_out = _num_left_out(config, _held_out_windows(config, tokenizer))
    num_windows = (config.tokens or config.seqlen) // config.seqlen
    most = math.ceil(num_windows / len(config.data))
    for name in config.data:
        if name != SELF:
            training_windows(name, tokenizer, text_options(config, name, most, num_left_out))


def find_recovered(output: Path, config: RecoverConfig) -> RecoverResult | None:
    """Find a finished result in a directory.

    Raises
    ------
    OtherRunError
        If it was made with other options.
    """
    run, file = Run(output), output / RECOVERY_FILE
    if not (run.is_complete and file.is_file()):
        return None
    report = read_report(file, RecoveryReport)
    budget = report.get("budget")
    found = report["config"] | ({"tokens": None, "minutes": budget["minutes"]} if budget else {})
    asked = config.model_dump(mode="json", exclude={"teacher", *DERIVED})
    run.check_made_with(asked | _names_of(config), found)
    return RecoverResult(output, report)


def _names_of(config: RecoverConfig) -> dict[str, Any]:
    """Names of the texts in a report, which goes to the hub and so holds no local paths."""
    return {
        "data": [Path(name).name for name in config.data],
        "eval_data": Path(config.eval_data).name,
        "prompts": config.prompts and Path(config.prompts).name,
    }


def _identity(job: Job, arguments: TrainingArguments) -> dict[str, Any]:
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
        **_texts(job),
        "held_out_sha256": _sha256(job.held_out),
        "device": arguments.device.type,
        "processes": arguments.world_size,
        **computation(),
        **_versions(job.method),
    }


def _texts(job: Job) -> dict[str, Any]:
    """What determines the text or the examples."""
    if job.examples is not None:
        return {"examples_sha256": _sha256(job.examples)}
    files = [file for name in job.config.sources for file in dataset_files(name)]
    return {f"text file {file}": describe_file(file) for file in files}


def _load_data(run: Run, job: Job, load_teacher: Teacher | None) -> Data:
    """Draw the text, and have the dense model read it; its memory is free again afterwards."""
    config = job.config
    if job.examples is not None:
        return Data(job.examples, job.held_out)
    teacher = cache(load_teacher) if load_teacher else None  # loads it once
    windows, seconds = draw_text(run, job, teacher)
    if not job.method.distils or teacher is None:
        rows = [labelled(windows, index) for index in range(len(windows.tokens))]
        examples = [{name: row.tolist() for name, row in window.items()} for window in rows]
        data = Data(examples, job.held_out, seconds)
    else:
        held_out_NT = torch.tensor([window["input_ids"] for window in job.held_out])
        texts = {"training": windows, "held-out": all_learned(held_out_NT)}
        train, held_out = (store_predictions(run, *t, teacher, config) for t in texts.items())
        data = Data(train, held_out, seconds + train.seconds + held_out.seconds)
    del teacher
    free_memory()
    return data


def _teacher(job: Job, arguments: TrainingArguments) -> Teacher | None:
    """A function that loads the dense model, if it is needed."""
    if job.teacher is None:
        return None
    return partial(load_model, job.teacher, job.config.dtype, str(arguments.device))


def _versions(method: RecoveryMethod) -> dict[str, str]:
    return versions("accelerate", *([method.package] if method.package else []))


def _train(job: Job, data: Data, arguments: TrainingArguments) -> None:
    """Train to the last step and save a checkpoint; resume from the newest one if there is any."""
    state = Path(str(arguments.output_dir))
    checkpoint, before = broadcast(is_main() and last_checkpoint(state)) or (None, None)
    if before:
        log.info("resuming after step %d", before.global_step)
        if before.global_step >= before.max_steps or has_stalled(before):
            return
    arguments.eval_on_start = not checkpoint
    set_seed(job.config.seed)
    trainer = job.make_trainer(data, arguments, MetricsLogger(job.progress))
    log.info("training on %d examples of %s", len(data.train), ", ".join(job.config.data))
    with writing(state.parent), training_together():
        trainer.train(resume_from_checkpoint=checkpoint)


def _report(job: Job, data: Data, state: TrainerState, budget: Budget | None) -> dict[str, Any]:
    config, metrics = job.config, [read_metrics(entry) for entry in state.log_history]
    cost = state.log_history[-1]
    described = [describe_dataset(name, "calibration") for name in config.data]
    num_read = round((state.epoch or 0) * len(data.train))
    return {
        "model": job.source.title,
        "teacher": job.teacher.title if job.teacher else None,
        "config": config.model_dump(mode="json", exclude={"teacher"}) | _names_of(config),
        "data": ", ".join(described),
        "held_out": describe_dataset(config.eval_data, "evaluation")
        + (" (windows left out of the training)" if job.num_left_out else ""),
        "num_examples": len(data.train),
        "tokens": num_read * config.seqlen if config.tokens else None,
        "steps": state.global_step,
        "best_step": best_step(state),
        "train_loss": [[m["step"], m["loss"]] for m in metrics if "loss" in m],
        "held_out_perplexity": [[m["step"], m["perplexity"]] for m in metrics if "perplexity" in m],
        "held_out_kl": [[step, kl] for step, kl in held_out_curve(state).items()],
        "preparation_seconds": round(data.seconds, 3),
        "seconds": round(cost["seconds"], 3),
        "budget": budget and _taken(budget, data.seconds + cost["seconds"]),
        "peak_memory_bytes": max(cost["peak_memory_bytes"], peak_memory() or 0) or None,
        "versions": _versions(job.method),
    }


def _taken(budget: Budget, seconds: float) -> dict[str, Any]:
    """What was asked for, and the seconds that measurement, preparation and training took."""
    return asdict(budget) | {"seconds": round(budget.measuring + seconds, 3)}


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
            hint="name the dense model as --teacher",
        )
    teacher = find_model(name)
    check_same_vocabulary(source, teacher)
    return teacher


def check_packages(config: RecoverConfig) -> None:
    """Check that the packages for the method and the trackers are installed."""
    package = RECOVERY_METHODS[config.method](config).package
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


def _examples(config: RecoverConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    (name,) = config.data
    return training_examples(name, tokenizer, config.seqlen, config.max_examples, config.text_field)


def _prompts(config: RecoverConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts | None:
    if config.prompts is None:
        return None
    return read_prompts(config.prompts, tokenizer, config.seqlen, config.text_field)


def _is_left_out(config: RecoverConfig) -> bool:
    """Whether the held-out text is also trained on, so that a part of it must be left out."""
    return config.is_on_text and any(are_same_files(n, config.eval_data) for n in config.data)


def _num_left_out(config: RecoverConfig, held_out: Examples) -> int:
    """Windows of each local text that are held out and not trained on."""
    return len(held_out) if _is_left_out(config) else 0


def _held_out_windows(config: RecoverConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Windows of the held-out text; see `_is_left_out`. All tokens count, also those of chats."""
    hint = "give a longer --eval-data, more --eval-tokens or a smaller --seqlen"
    if _is_left_out(config):
        most = max(1, config.eval_tokens // config.seqlen)
        options = text_options(config, config.eval_data, most, 0)
        texts = training_texts(config.eval_data, tokenizer, options)
        windows = held_out_samples(texts, options).tolist()
        if not windows:
            raise DataError(
                f"{config.eval_data} has less than two windows of {config.seqlen} tokens, so none "
                "can be left out of the training",
                hint=hint,
            )
    else:
        tokens = evaluation_tokens(
            config.eval_data, tokenizer, config.eval_tokens, config.text_field
        ).tolist()
        starts = range(0, len(tokens) - config.seqlen + 1, config.seqlen)
        windows = [tokens[start : start + config.seqlen] for start in starts]
        if not windows:
            raise DataError(
                f"{config.eval_data} has {len(tokens)} tokens, less than one window of "
                f"{config.seqlen}",
                hint=hint,
            )
    return [{"input_ids": window, "labels": window} for window in windows]


def _config_sha256(source: Source) -> str:
    return hashlib.sha256(load_config(source).to_json_string().encode()).hexdigest()


def _sha256(examples: Examples) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example).encode())
    return digest.hexdigest()


def _write(run: Run, job: Job, data: Data, budget: Budget | None) -> None:
    """Merge the best of the trained weights into the weights of the checkpoint, and save them."""
    last: Any = last_checkpoint(run.state)
    _, state = last
    source = job.source
    if best := best_step(state):
        trained = run.state / f"checkpoint-{best}"
        check_checkpoint(trained)
        model = job.method.load_trained(source, str(trained))
    else:
        log.warning(
            "the training has not lowered the held-out KL divergence of %.4f: the result has the "
            "weights of %s; give a lower --learning-rate or more --tokens",
            held_out_curve(state)[0],
            source.name,
        )
        model = load_model(source, device="cpu")
    log.info("saving to %s", run.output)
    with run.result() as directory:
        model.save_pretrained(directory)
        add_older_keys(directory)
        write_tokenizer(source, job.tokenizer, directory)
        lines = "".join(json.dumps(read_metrics(entry)) + "\n" for entry in state.log_history)
        (directory / METRICS_FILE).write_text(lines, encoding="utf-8")
        text = json.dumps(_report(job, data, state, budget), indent=1) + "\n"
        (directory / RECOVERY_FILE).write_text(text, encoding="utf-8")
        if (run.state / TENSORBOARD_DIR).is_dir():
            shutil.copytree(run.state / TENSORBOARD_DIR, directory / TENSORBOARD_DIR)
        if pruning_report := find_file(source, REPORT_FILE):
            shutil.copyfile(pruning_report, directory / REPORT_FILE)
            write_card(directory)
