"""Recover a pruned model with a little training, and write it as the same kind of checkpoint.

Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) with the settings of SlimGPT (arXiv 2412.18110,
section 4.1), all weights, or adapters that also learn from the dense model (Hinton et al. 2015,
arXiv 1503.02531). The training loop is `transformers.Trainer`.
"""

import hashlib
import json
import logging
import math
import platform
import shutil
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations

from slimgpt.card import RECOVERY_FILE, REPORT_FILE, write_card
from slimgpt.checkpoint import save_checkpoint
from slimgpt.config import RecoverConfig
from slimgpt.data import (
    IGNORED,
    check_dataset,
    describe_dataset,
    evaluation_tokens,
    training_examples,
)
from slimgpt.errors import ConfigError, DataError, MissingDependencyError, RunStateError
from slimgpt.families import family_of
from slimgpt.model import (
    Source,
    check_same_vocabulary,
    find_device,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
)
from slimgpt.run import check_output, peak_memory, staging, write_atomically, writing

log = logging.getLogger(__name__)

Examples = list[dict[str, list[int]]]
METRICS_FILE = "metrics.jsonl"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class RecoverResult:
    """A finished run.

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
    model: str, output: str | Path, *, restart: bool = False, **options: Any
) -> RecoverResult:
    """Train a pruned model and write it as a checkpoint of the same kind.

    The same call goes on from the last checkpoint of a run that was interrupted.

    Parameters
    ----------
    model : str
        A directory with a pruned model, or any model of a supported family.
    output : str or Path
        Directory for the result; must not exist, or be empty.
    restart : bool
        Throw away what an interrupted run has left.
    **options
        The fields of `slimgpt.config.RecoverConfig`, for example ``method="distill"``.

    Returns
    -------
    RecoverResult
        Where the model is, and the report with both curves.

    Raises
    ------
    SlimGPTError
        If an option, a model or the data is wrong, a package is missing, or the interrupted run
        had other options. Nothing is half-written then.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.recover("slim", "recovered", method="distill", max_steps=100)  # doctest: +SKIP
    """
    config = RecoverConfig.create(**options)
    output = Path(output)
    source = find_model(model)
    teacher = _find_teacher(source, config) if config.method == "distill" else None
    check_dataset(config.data, "calibration")
    check_dataset(config.eval_data, "evaluation")
    _check_packages(config)
    check_output(output)
    tokenizer = load_tokenizer(source)
    pad_token: Any = tokenizer.pad_token_id or 0
    examples = training_examples(
        config.data, tokenizer, config.seqlen, config.max_examples, config.text_field
    )
    held_out = _held_out_windows(config, tokenizer)
    identity = {
        "model": source.name,
        "teacher": teacher.name if teacher else None,
        **config.model_dump(mode="json", exclude={"teacher", "device", "report_to"}),
        "examples_sha256": _sha256(examples),
        "held_out_sha256": _sha256(held_out),
    }
    with writing(output), PartialState().main_process_first():
        state = _open_state(output, identity, restart and PartialState().is_main_process)
        checkpoint = _last_checkpoint(state)

    start = time.monotonic()
    arguments = _training_arguments(source, config, output, state)
    arguments.eval_on_start = checkpoint is None
    trainer = _make_trainer(
        _trainable(source, config),
        load_model(teacher, config.dtype, str(arguments.device)) if teacher else None,
        config,
        args=arguments,
        train_dataset=examples,
        eval_dataset=held_out,
        data_collator=partial(_pad, pad_token=pad_token),
        callbacks=[_MetricsWriter(state / METRICS_FILE)],
    )
    trainer.remove_callback(PrinterCallback)
    log.info("training on %d examples of %s", len(examples), config.data)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(state / "trained"))
    metrics = [_metrics(entry) for entry in trainer.state.log_history]
    report = {
        "model": source.name,
        "teacher": teacher.name if teacher else None,
        "config": config.model_dump(mode="json"),
        "data": describe_dataset(config.data, "calibration"),
        "held_out": describe_dataset(config.eval_data, "evaluation"),
        "num_examples": len(examples),
        "steps": trainer.state.global_step,
        "train_loss": [[m["step"], m["loss"]] for m in metrics if "loss" in m],
        "held_out_perplexity": [[m["step"], m["perplexity"]] for m in metrics if "perplexity" in m],
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": peak_memory(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("slimgpt", "torch", "transformers")},
    }
    del trainer
    if PartialState().is_main_process:
        _write(source, config, output, state, report)
        shutil.rmtree(state)
    PartialState().wait_for_everyone()
    return RecoverResult(output, report)


class Distiller(Trainer):
    """Trainer whose loss has the KL divergence to a teacher added.

    Parameters
    ----------
    teacher : PreTrainedModel
        Of the same vocabulary as the model; in evaluation mode, on the device of training.
    kl_weight : float
        Weight of KL(teacher ‖ model), which is a mean over the same tokens as the loss: those
        with a label, of all examples of a step.
    **kwargs
        Of the `Trainer`.
    """

    def __init__(self, teacher: PreTrainedModel, kl_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._teacher, self._kl_weight = teacher, kl_weight

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Add the divergence to the loss of the labels, in training only."""
        result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = result
        if model.training:
            read = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                target = self._teacher(**read, use_cache=False).logits
            is_label = inputs["labels"][:, 1:] != IGNORED
            divergence = functional.kl_div(
                outputs["logits"][:, :-1][is_label].float().log_softmax(-1),
                target[:, :-1][is_label].float().log_softmax(-1),
                reduction="sum",
                log_target=True,
            )
            # The number is of all processes, over which the gradient is averaged.
            weight = self._kl_weight * self.accelerator.num_processes / num_items_in_batch
            loss = loss + weight * divergence
        return (loss, outputs) if return_outputs else loss


class _MetricsWriter(TrainerCallback):
    """Writes every metric to ``metrics.jsonl`` and to the log."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Keep the metrics of the steps that are not run again."""
        self._start, self._first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            lines = [json.dumps(_metrics(entry)) + "\n" for entry in state.log_history]
            self._file.write_text("".join(lines), encoding="utf-8")

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Append the newest metrics."""
        entry = _metrics(state.log_history[-1])
        if not state.is_world_process_zero or list(entry) == ["step"]:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if "perplexity" in entry:
            log.info("step %d: held-out perplexity %.3f", entry["step"], entry["perplexity"])
        else:
            seconds_per_step = (time.monotonic() - self._start) / (entry["step"] - self._first_step)
            left = seconds_per_step * (state.max_steps - entry["step"])
            steps = entry["step"], state.max_steps
            log.info("step %d/%d: loss %.4f; %.0f s left", *steps, entry["loss"], left)


def _metrics(entry: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an entry in the Trainer's log: all but times."""
    kept = {
        key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate") if key in entry
    }
    return kept | ({"perplexity": math.exp(entry["eval_loss"])} if "eval_loss" in entry else {})


def _find_teacher(source: Source, config: RecoverConfig) -> Source:
    """The model to distil from, which must have the vocabulary of the one that is trained."""
    name, report = config.teacher, Path(source.location) / REPORT_FILE
    if name is None and report.is_file():
        name = json.loads(report.read_text(encoding="utf-8"))["base_model"]
    if name is None:
        raise ConfigError(
            f"{source.name} has no pruning report that names its base model",
            hint="name the model to distil from as --teacher",
        )
    teacher = find_model(name)
    check_same_vocabulary(source, teacher)
    return teacher


def _check_packages(config: RecoverConfig) -> None:
    if config.method != "full" and find_spec("peft") is None:
        raise MissingDependencyError(
            "peft", f"the method {config.method!r}", "pip install 'slimgpt[recover]'"
        )
    for tracker in config.report_to:
        if tracker not in get_available_reporting_integrations():
            raise MissingDependencyError(tracker, "this tracker", f"pip install {tracker}")


def _held_out_windows(config: RecoverConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    tokens = evaluation_tokens(config.eval_data, tokenizer, config.eval_tokens).tolist()
    starts = range(0, len(tokens) - config.seqlen + 1, config.seqlen)
    windows = [tokens[start : start + config.seqlen] for start in starts]
    if not windows:
        raise DataError(
            f"{config.eval_data} has {len(tokens)} tokens, less than one window of {config.seqlen}",
            hint="give a longer --eval-data, more --eval-tokens or a smaller --seqlen",
        )
    return [{"input_ids": window, "labels": window} for window in windows]


def _sha256(examples: Examples) -> str:
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


def _open_state(output: Path, identity: dict[str, Any], restart: bool) -> Path:
    """Directory beside the output for what a run needs to go on, checked to be of this run."""
    state = output.absolute().with_name(f".{output.name}.recover")
    manifest = state / MANIFEST_FILE
    if restart and state.exists():
        shutil.rmtree(state)
    if manifest.is_file():
        started = json.loads(manifest.read_text(encoding="utf-8"))
        differences = [
            f"{key} was {started.get(key)!r} and is now {identity.get(key)!r}"
            for key in identity | started
            if started.get(key) != identity.get(key)
        ]
        if differences:
            raise RunStateError(
                f"an interrupted run for {output} differs: {'; '.join(differences)}",
                hint="give the options of that run, or --restart to throw it away",
            )
    else:
        state.mkdir(parents=True, exist_ok=True)
        write_atomically(manifest, json.dumps(identity, indent=1) + "\n")
    return state


def _last_checkpoint(state: Path) -> str | None:
    """The last checkpoint that is whole: the Trainer writes its own state as the last file."""
    found = {
        int(path.parent.name.rpartition("-")[2]): str(path.parent)
        for path in state.glob("checkpoint-*/trainer_state.json")
        if path.read_bytes().endswith(b"}\n")
    }
    if not found:
        return None
    log.info("resuming after step %d", max(found))
    return found[max(found)]


def _training_arguments(
    source: Source, config: RecoverConfig, output: Path, state: Path
) -> TrainingArguments:
    device = find_device(config.device)
    dtype = load_config(source).dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if device.index is not None:
        raise ConfigError(
            f"--device {config.device} cannot be chosen for training",
            hint="set CUDA_VISIBLE_DEVICES and give --device cuda",
        )
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError("float16 cannot be trained on a CPU", hint="use --dtype bfloat16")
    num_processes = PartialState().num_processes
    at_once = config.micro_batch_size * num_processes
    if config.batch_size % at_once:
        raise ConfigError(
            f"batch_size={config.batch_size} is no multiple of {at_once}: "
            f"micro_batch_size={config.micro_batch_size} in {num_processes} processes"
        )
    arguments = TrainingArguments(
        output_dir=str(state),
        run_name=output.name,
        report_to=list(config.report_to) or "none",
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // at_once,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # or the Trainer would use nn.DataParallel
    return arguments


def _trainable(source: Source, config: RecoverConfig) -> Any:
    """The model with what is trained in float32: adapters, or all weights."""
    set_seed(config.seed)
    if config.method == "full":
        return load_model(source, "float32", "cpu").requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    model = load_model(source, config.dtype, "cpu")
    family = family_of(model.config.model_type)
    adapted = [n for spec in (family.attention, family.ffn) for n in (*spec.inputs, spec.output)]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=adapted,
    )
    return get_peft_model(model, lora)


def _make_trainer(
    model: Any, teacher: PreTrainedModel | None, config: RecoverConfig, **kwargs: Any
) -> Trainer:
    if teacher is None:
        return Trainer(model=model, **kwargs)
    return Distiller(teacher, config.kl_weight, model=model, **kwargs)


def _pad(examples: Examples, pad_token: int) -> dict[str, Tensor]:
    """Batch examples of different lengths, padded on the right."""
    padding = {"input_ids": pad_token, "labels": IGNORED, "attention_mask": 0}
    columns = {key: [torch.tensor(example[key]) for example in examples] for key in examples[0]}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    return {
        key: pad_sequence(column, batch_first=True, padding_value=padding[key])
        for key, column in columns.items()
    }


def _write(
    source: Source, config: RecoverConfig, output: Path, state: Path, report: dict[str, Any]
) -> None:
    """Merge what was trained into the weights as they are in the checkpoint, and save them."""
    trained = str(state / "trained")
    model: Any = load_model(source, device="cpu")
    if config.method == "full":
        model = load_model(Source(trained, trained), str(model.dtype).removeprefix("torch."), "cpu")
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, trained).merge_and_unload()
    log.info("saving to %s", output)
    with staging(output) as directory, writing(output):
        save_checkpoint(model, load_tokenizer(source), load_config(source), directory)
        shutil.copy(state / METRICS_FILE, directory)
        text = json.dumps(report, indent=1) + "\n"
        (directory / RECOVERY_FILE).write_text(text, encoding="utf-8")
        pruning_report = Path(source.location) / REPORT_FILE
        if pruning_report.is_file():
            shutil.copy(pruning_report, directory)
            write_card(directory)
