"""Recover a pruned model with a little training, and write it as the same kind of checkpoint.

Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) with the settings of SlimGPT (arXiv 2412.18110,
section 4.1), all weights, or adapters that also learn from the dense model (Hinton et al. 2015,
arXiv 1503.02531). The training loop is `transformers.Trainer`.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer import TRAINER_STATE_NAME

from slimgpt.card import RECOVERY_FILE, REPORT_FILE, PruningReport, read_report, write_card
from slimgpt.checkpoint import add_older_rope_keys, write_tokenizer
from slimgpt.config import RecoverConfig, did_you_mean
from slimgpt.data import (
    IGNORED,
    check_dataset,
    describe_dataset,
    evaluation_tokens,
    training_examples,
)
from slimgpt.distributed import TIME_LIMIT, from_main, is_main, training_together
from slimgpt.errors import ConfigError, DataError, MissingDependencyError, NumericalError
from slimgpt.families import family_of
from slimgpt.files import describe_file, reading, write_atomically, writing
from slimgpt.model import (
    SMOLLM2_ALIAS,
    Source,
    check_same_vocabulary,
    find_device,
    find_file,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    tokenizer_files,
    usable_seqlen,
)
from slimgpt.run import CHECKSUMS_FILE, Run, computation, open_run, peak_memory, versions
from slimgpt.weights import open_weights, weight_files

log = logging.getLogger(__name__)

Examples = list[dict[str, list[int]]]
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "runs"


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
        Directory for the result; must not exist, be empty, or hold an interrupted run.
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
    if find_file(source, RECOVERY_FILE):
        raise ConfigError(
            f"{model} has been recovered already",
            hint="recover the pruned model, with more --epochs or --max-steps",
        )
    teacher = _find_teacher(source, config) if config.method == "distill" else None
    check_dataset(config.data, "calibration")
    check_dataset(config.eval_data, "evaluation")
    check_packages(config)
    model_config = load_config(source)
    seqlen = usable_seqlen(config.seqlen, model_config)
    config = config.model_copy(update={"seqlen": seqlen})
    PartialState(timeout=TIME_LIMIT)  # joins the other processes of torchrun
    arguments = _training_arguments(model_config, config, output)
    with open_run(output) if is_main() else nullcontext() as run:
        tokenizer = load_tokenizer(source)
        examples = training_examples(
            config.data, tokenizer, config.seqlen, config.max_examples, config.text_field
        )
        held_out = _held_out_windows(config, tokenizer)
        if run:
            identity = _identity(source, teacher, config, arguments, examples, held_out)
            run.identify(identity, restart)
        if not from_main(run and run.is_written):
            _train(source, teacher, tokenizer, examples, held_out, config, arguments)
            if run:
                _write(run, source, teacher, tokenizer, config, len(examples))
        if run:
            run.publish()
    report = from_main(is_main() and json.loads((output / RECOVERY_FILE).read_text("utf-8")))
    return RecoverResult(output, report)


def _identity(
    source: Source,
    teacher: Source | None,
    config: RecoverConfig,
    arguments: TrainingArguments,
    examples: Examples,
    held_out: Examples,
) -> dict[str, Any]:
    """All that the result depends on."""
    models = {"model": source} | ({"teacher": teacher} if teacher else {})
    return {
        **{role: model.title for role, model in models.items()},
        **{f"{role} config": _config_sha256(model) for role, model in models.items()},
        **{
            f"{role}'s {file.name}": describe_file(file)
            for role, model in models.items()
            for file in (*weight_files(model), *tokenizer_files(model).values())
        },
        **config.model_dump(mode="json", exclude={"teacher", "report_to"}),
        "examples_sha256": _sha256(examples),
        "held_out_sha256": _sha256(held_out),
        "device": arguments.device.type,
        "processes": arguments.world_size,
        **computation(),
        **_versions(config),
    }


def _versions(config: RecoverConfig) -> dict[str, str]:
    return versions("accelerate") if config.method == "full" else versions("accelerate", "peft")


def _train(
    source: Source,
    teacher: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    held_out: Examples,
    config: RecoverConfig,
    arguments: TrainingArguments,
) -> None:
    """Train up to the checkpoint of the last step, from the last one that there is."""
    state = Path(str(arguments.output_dir))
    checkpoint, before = from_main(is_main() and _last_checkpoint(state)) or (None, None)
    if before:
        log.info("resuming after step %d", before.global_step)
        if before.global_step >= before.max_steps:
            return
    arguments.eval_on_start = not checkpoint
    pad_token: Any = tokenizer.pad_token_id or 0
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
    with writing(state.parent), training_together():
        trainer.train(resume_from_checkpoint=checkpoint)


def _report(
    source: Source,
    teacher: Source | None,
    config: RecoverConfig,
    num_examples: int,
    state: TrainerState,
) -> dict[str, Any]:
    metrics = [_metrics(entry) for entry in state.log_history]
    cost = state.log_history[-1]
    return {
        # The report goes to the hub with the model, so it holds no local paths.
        "model": source.title,
        "teacher": teacher.title if teacher else None,
        "config": config.model_dump(mode="json", exclude={"teacher"})
        | {"data": Path(config.data).name, "eval_data": Path(config.eval_data).name},
        "data": describe_dataset(config.data, "calibration"),
        "held_out": describe_dataset(config.eval_data, "evaluation"),
        "num_examples": num_examples,
        "steps": state.global_step,
        "train_loss": [[m["step"], m["loss"]] for m in metrics if "loss" in m],
        "held_out_perplexity": [[m["step"], m["perplexity"]] for m in metrics if "perplexity" in m],
        "seconds": round(cost["seconds"], 3),
        "peak_memory_bytes": max(cost["peak_memory_bytes"], peak_memory() or 0) or None,
        "versions": _versions(config),
    }


class RecoveryTrainer(Trainer):
    """Trainer whose checkpoints have checksums, and the last of which stays.

    It raises an ``OSError`` when a checkpoint cannot be written.
    """

    def _save_checkpoint(self, *args: Any) -> None:
        with training_together():
            try:
                super()._save_checkpoint(*args)
            except RuntimeError as err:  # torch.save has no type of its own
                if "gloo" in str(err).lower():
                    raise
                raise OSError(str(err)) from err
        from_main(None)  # all have written what is theirs
        if self.is_world_process_zero():
            state = Path(str(self.args.output_dir))
            newest = state / f"checkpoint-{self.state.global_step}"
            files = sorted(path for path in newest.rglob("*") if path.is_file())
            sums = {file.relative_to(newest).as_posix(): describe_file(file) for file in files}
            write_atomically(newest / CHECKSUMS_FILE, json.dumps(sums) + "\n")
            for older in set(state.glob("checkpoint-*")) - {newest}:
                shutil.rmtree(older)


class Distiller(RecoveryTrainer):
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
        before = state.log_history[-1] if state.log_history else {}
        self._seconds_before = before.get("seconds", 0.0)
        self._peak_before = before.get("peak_memory_bytes", 0)
        if state.is_world_process_zero:
            self._file.write_text(_metrics_lines(state), encoding="utf-8")

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Append the newest metrics; note the cost in the log, which checkpoints have."""
        seconds = time.monotonic() - self._start
        state.log_history[-1] |= {
            "seconds": self._seconds_before + seconds,
            "peak_memory_bytes": max(self._peak_before, peak_memory() or 0),
        }
        entry = _metrics(state.log_history[-1])
        for key in ("loss", "perplexity"):
            if not math.isfinite(entry.get(key, 0.0)):
                raise NumericalError(
                    f"the training has diverged: {key} {entry[key]} at step {entry['step']}",
                    hint="begin anew with a lower --learning-rate and --restart",
                )
        if not state.is_world_process_zero or list(entry) == ["step"]:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if "perplexity" in entry:
            log.info("step %d: held-out perplexity %.3f", entry["step"], entry["perplexity"])
        else:
            left = seconds / (entry["step"] - self._first_step) * (state.max_steps - entry["step"])
            steps = entry["step"], state.max_steps
            log.info("step %d/%d: loss %.4f; %.0f s left", *steps, entry["loss"], left)


def _metrics_lines(state: TrainerState) -> str:
    return "".join(json.dumps(_metrics(entry)) + "\n" for entry in state.log_history)


def _metrics(entry: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an entry in the Trainer's log: all but what it cost."""
    kept = {
        key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate") if key in entry
    }
    if "eval_loss" in entry:  # whose exp may overflow
        kept["perplexity"] = torch.tensor(entry["eval_loss"], dtype=torch.float64).exp().item()
    return kept


def _find_teacher(source: Source, config: RecoverConfig) -> Source:
    """The model to distil from, which must have the vocabulary of the one that is trained."""
    name, report = config.teacher, find_file(source, REPORT_FILE)
    if name is None and report:
        base = read_report(report, PruningReport)["base_model"]
        if "/" in base or base == SMOLLM2_ALIAS:  # else the folder of a local model
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
    if config.method != "full" and find_spec("peft") is None:
        raise MissingDependencyError(
            "peft", f"the method {config.method!r}", "pip install 'slimgpt[recover]'"
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


def _last_checkpoint(state: Path) -> tuple[str, TrainerState] | None:
    """The last checkpoint that is whole; its files are compared with their checksums."""
    whole = [file.parent for file in state.glob(f"checkpoint-*/{CHECKSUMS_FILE}")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if newest is None:
        return None
    with reading(newest / CHECKSUMS_FILE):
        sums = json.loads((newest / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        names = list(sums)
    for name in names:
        with reading(newest / name):
            if describe_file(newest / name) != sums[name]:
                raise ValueError("its checksum does not match")
    return str(newest), TrainerState.load_from_json(str(newest / TRAINER_STATE_NAME))


def _training_arguments(
    model_config: PreTrainedConfig, config: RecoverConfig, output: Path
) -> TrainingArguments:
    device = find_device(config.device)
    dtype = model_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
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
            f"micro_batch_size={config.micro_batch_size} in {num_processes} processes",
            hint=f"choose a --batch-size that {at_once} divides, or other --micro-batch-size",
        )
    arguments = TrainingArguments(
        output_dir=str(Run(output).state),
        run_name=output.name,
        report_to=list(config.report_to) or "none",
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=1,  # more are averaged wrongly if processes share an odd number
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
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=config.save_steps,
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
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
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=family_of(model.config.model_type).linears,
    )
    return get_peft_model(model, lora)


def _make_trainer(
    model: Any, teacher: PreTrainedModel | None, config: RecoverConfig, **kwargs: Any
) -> Trainer:
    if teacher is None:
        return RecoveryTrainer(model=model, **kwargs)
    return Distiller(teacher, config.kl_weight, model=model, **kwargs)


def _pad(examples: Examples, pad_token: int) -> dict[str, Tensor]:
    """Batch examples of different lengths, padded on the right to a multiple of 32 tokens.

    Kernels that are compiled for a length, as on CPUs, are then compiled for a few.
    """
    ids = [example["input_ids"] for example in examples]
    length = math.ceil(max(map(len, ids)) / 32) * 32

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    return {
        "input_ids": padded(ids, pad_token),
        "labels": padded([example["labels"] for example in examples], IGNORED),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }


def _write(
    run: Run,
    source: Source,
    teacher: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    config: RecoverConfig,
    num_examples: int,
) -> None:
    """Merge what was trained into the weights as they are in the checkpoint, and save them."""
    last: Any = _last_checkpoint(run.state)
    trained, state = last
    model: Any
    if config.method == "full":
        dtype = open_weights(source, load_config(source)).dtype
        model = load_model(Source(trained, trained), str(dtype).removeprefix("torch."), "cpu")
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_model(source, device="cpu"), trained)
        model = model.merge_and_unload()
    log.info("saving to %s", run.output)
    with run.product() as directory:
        model.save_pretrained(directory)
        add_older_rope_keys(directory)
        write_tokenizer(source, tokenizer, directory)
        (directory / METRICS_FILE).write_text(_metrics_lines(state), encoding="utf-8")
        report = _report(source, teacher, config, num_examples, state)
        text = json.dumps(report, indent=1) + "\n"
        (directory / RECOVERY_FILE).write_text(text, encoding="utf-8")
        if (run.state / TENSORBOARD_DIR).is_dir():
            shutil.copytree(run.state / TENSORBOARD_DIR, directory / TENSORBOARD_DIR)
        if pruning_report := find_file(source, REPORT_FILE):
            shutil.copyfile(pruning_report, directory / REPORT_FILE)
            write_card(directory)
