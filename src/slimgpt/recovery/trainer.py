"""Train with the Trainer of transformers."""

import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from slimgpt.config import RecoverConfig
from slimgpt.data.examples import IGNORED
from slimgpt.errors import ConfigError, NumericalError
from slimgpt.models.device import fast_dtype, find_device
from slimgpt.models.loading import build_skeleton, usable_seqlen
from slimgpt.runtime.distributed import broadcast, training_together
from slimgpt.runtime.environment import peak_memory
from slimgpt.runtime.files import describe_file, reading, write_atomically
from slimgpt.runtime.progress import Progress
from slimgpt.runtime.run_directory import CHECKSUMS_FILE, Run

log = logging.getLogger(__name__)

Examples = list[dict[str, list[int]]]

TENSORBOARD_DIR = "runs"

PATIENCE = 5  # evaluations without a lower held-out divergence, after which distillation ends

# Peak learning rates of distillation for a hidden size of 576, with which they were measured. The
# steps of Adam have one size whatever the gradient, so the change of a matrix product grows with
# the number of its inputs, and the rate falls with it.
LEARNING_RATE, ADAPTERS_LEARNING_RATE, HIDDEN_SIZE = 3e-4, 1e-3, 576

WARMUP, EVALUATIONS = 1 / 20, 10  # share of the steps; evaluations in a distillation

LARGE_MODEL = 10**9  # parameters


# Options that `derive_options` fills in or changes.
DERIVED = {
    "seqlen",
    "gradient_checkpointing",
    "learning_rate",
    "dtype",
    "eval_steps",
    "save_steps",
    "warmup_steps",
}


class RecoveryTrainer(Trainer):
    """Trainer that writes checkpoints with checksums and keeps only the newest and the best one.

    It raises an ``OSError`` if a checkpoint cannot be written.
    """

    def _save_checkpoint(self, *args: Any) -> None:
        with training_together():
            try:
                super()._save_checkpoint(*args)
            except RuntimeError as err:  # torch.save has no error type of its own
                if "gloo" in str(err).lower():
                    raise
                raise OSError(str(err)) from err
        broadcast(None)  # all processes have written their files
        if self.is_world_process_zero():
            state = Path(str(self.args.output_dir))
            newest = state / f"checkpoint-{self.state.global_step}"
            files = sorted(path for path in newest.rglob("*") if path.is_file())
            sums = {file.relative_to(newest).as_posix(): describe_file(file) for file in files}
            write_atomically(newest / CHECKSUMS_FILE, json.dumps(sums) + "\n")
            best = state / f"checkpoint-{best_step(self.state)}"
            for older in set(state.glob("checkpoint-*")) - {newest, best}:
                shutil.rmtree(older)


class MetricsLogger(TrainerCallback):
    """Log the progress, record time and peak memory, and stop if training diverges."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Read time and peak memory of the steps before an interruption."""
        self._start, self._first_step = time.monotonic(), state.global_step
        before = state.log_history[-1] if state.log_history else {}
        self._seconds_before = before.get("seconds", 0.0)
        self._peak_before = before.get("peak_memory_bytes", 0)

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Add time and peak memory to the log entry, which is part of the checkpoints."""
        seconds = time.monotonic() - self._start
        state.log_history[-1] |= {
            "seconds": self._seconds_before + seconds,
            "peak_memory_bytes": max(self._peak_before, peak_memory() or 0),
        }
        entry = read_metrics(state.log_history[-1])
        for key in ("loss", "perplexity", "kl"):
            if not math.isfinite(entry.get(key, 0.0)):
                raise NumericalError(
                    f"the training has diverged: {key} {entry[key]} at step {entry['step']}",
                    hint="begin anew with a lower --learning-rate and --restart",
                )
        if not state.is_world_process_zero:
            return
        if "perplexity" in entry:
            kl = f", held-out KL {entry['kl']:.4f}" if "kl" in entry else ""
            text = "step %d: held-out perplexity %.3f%s"
            log.info(text, entry["step"], entry["perplexity"], kl)
        elif "loss" in entry:
            left = seconds / (entry["step"] - self._first_step) * (state.max_steps - entry["step"])
            steps = entry["step"], state.max_steps
            log.info("step %d/%d: loss %.4f; %.0f s left", *steps, entry["loss"], left)
            self._progress("step", *steps)


def best_step(state: TrainerState) -> int:
    """Find the step with the lowest held-out divergence; without divergences, the last step."""
    curve = held_out_curve(state)
    return min(curve, key=curve.__getitem__) if curve else state.global_step


def has_stalled(state: TrainerState) -> bool:
    """Whether the last `PATIENCE` evaluations have not lowered the held-out divergence."""
    return bool(curve := held_out_curve(state)) and best_step(state) not in [*curve][-PATIENCE:]


def held_out_curve(state: TrainerState) -> dict[int, float]:
    """Held-out divergence at each evaluated step; empty if the method measures none."""
    return {int(m["step"]): m["eval_kl"] for m in state.log_history if "eval_kl" in m}


def read_metrics(entry: dict[str, Any]) -> dict[str, Any]:
    """Select the metrics of an entry of the Trainer's log, without time and memory."""
    kept = {
        key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate") if key in entry
    }
    if "eval_loss" in entry:  # math.exp would raise on overflow
        kept["perplexity"] = torch.tensor(entry["eval_loss"], dtype=torch.float64).exp().item()
    if "eval_kl" in entry:
        kept["kl"] = entry["eval_kl"]
    return kept


def last_checkpoint(state: Path) -> tuple[str, TrainerState] | None:
    """Find the newest complete checkpoint, whose files match their checksums."""
    whole = [file.parent for file in state.glob(f"checkpoint-*/{CHECKSUMS_FILE}")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if newest is None:
        return None
    check_checkpoint(newest)
    return str(newest), TrainerState.load_from_json(str(newest / TRAINER_STATE_NAME))


def check_checkpoint(directory: Path) -> None:
    """Check the files of a checkpoint against their checksums.

    Raises
    ------
    RunStateError
        If a file is damaged.
    """
    with reading(directory / CHECKSUMS_FILE):
        sums = json.loads((directory / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        names = list(sums)
    for name in names:
        with reading(directory / name):
            if describe_file(directory / name) != sums[name]:
                raise ValueError("its checksum does not match")


def derive_options(config: RecoverConfig, model_config: PreTrainedConfig) -> RecoverConfig:
    """Fill in the options that depend on the model, the device and the number of steps.

    Those that depend on the number of steps stay open as long as the time alone is given.
    """
    config = config.model_copy(update={"seqlen": usable_seqlen(config.seqlen, model_config)})
    values: dict[str, Any] = {}
    if config.gradient_checkpointing is None:
        num_params = build_skeleton(model_config).num_parameters()
        values["gradient_checkpointing"] = num_params >= LARGE_MODEL
    if config.method == "distill":
        peak = ADAPTERS_LEARNING_RATE if config.adapters else LEARNING_RATE
        hidden_size = model_config.get_text_config().hidden_size
        values["learning_rate"] = config.learning_rate or peak * HIDDEN_SIZE / hidden_size
        if config.dtype == "auto":
            device, stored = find_device(config.device), model_config.dtype
            stored = stored if isinstance(stored, torch.dtype) else torch.float32
            fast = torch.bfloat16 if device.type == "cuda" else fast_dtype(device, stored)
            values["dtype"] = str(fast).removeprefix("torch.")
        if config.tokens:
            values |= _options_of_steps(config, config.tokens)
    return config.model_copy(update=values)


def _options_of_steps(config: RecoverConfig, tokens: int) -> dict[str, Any]:
    """Options of a distillation that depend on the number of steps."""
    num_windows = tokens // config.seqlen
    num_steps = config.max_steps or math.ceil(
        config.epochs * math.ceil(num_windows / config.batch_size)
    )
    eval_steps = config.eval_steps or math.ceil(num_steps / EVALUATIONS)
    values: dict[str, Any] = {
        "eval_steps": eval_steps,
        "save_steps": config.save_steps or eval_steps,
    }
    if config.warmup_steps is None:
        values["warmup_steps"] = math.ceil(num_steps * WARMUP)
    return values


def check_training(
    config: RecoverConfig, model_config: PreTrainedConfig, num_processes: int
) -> None:
    """Check that the Trainer can follow the options.

    Parameters
    ----------
    config : RecoverConfig
        The options.
    model_config : PreTrainedConfig
        The model's config.
    num_processes : int
        Number of processes that train together.

    Raises
    ------
    ConfigError
        If the device, its precision or the size of the batches cannot be used.
    """
    device = find_device(config.device)
    if device.index is not None:
        raise ConfigError(
            f"--device {config.device} cannot be chosen for training",
            hint="set CUDA_VISIBLE_DEVICES and give --device cuda",
        )
    if _dtype(config, model_config) == torch.float16 and device.type == "cpu":
        raise ConfigError("float16 cannot be trained on a CPU", hint="use --dtype bfloat16")
    at_once = config.micro_batch_size * num_processes
    if config.batch_size % at_once:
        raise ConfigError(
            f"batch_size={config.batch_size} is no multiple of {at_once}: "
            f"micro_batch_size={config.micro_batch_size} in {num_processes} processes",
            hint=f"choose a --batch-size that {at_once} divides, or other --micro-batch-size",
        )


def _dtype(config: RecoverConfig, model_config: PreTrainedConfig) -> Any:
    return model_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)


def training_arguments(
    model_config: PreTrainedConfig, config: RecoverConfig, output: Path
) -> TrainingArguments:
    """Translate our options into those of the Trainer, after `check_training`."""
    num_processes = PartialState().num_processes
    check_training(config, model_config, num_processes)
    device, dtype = find_device(config.device), _dtype(config, model_config)
    arguments = TrainingArguments(
        output_dir=str(Run(output).state),
        run_name=output.name,
        report_to=list(config.report_to) or "none",
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=1,  # larger: wrong mean if processes share an odd number
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size // num_processes,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate or 0.0,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps or 0,
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
        save_steps=config.save_steps or 0,
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # otherwise the Trainer uses nn.DataParallel
    return arguments


def pad_batch(examples: Examples, pad_token: int) -> dict[str, Tensor]:
    """Batch examples of different lengths, padded on the right to a multiple of 32 tokens.

    The multiple limits the number of lengths, because some kernels (as on CPUs) are compiled for
    each length.
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
