"""How many tokens can be trained on in a given time: measured once at the start of a run."""

import copy
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainingArguments

from slimgpt.config import LONGEST_TEXT, RecoverConfig
from slimgpt.data.datasets import SELF
from slimgpt.data.examples import training_texts
from slimgpt.data.samples import SampleOptions, count_samples
from slimgpt.data.self_generated import TEXTS_AT_ONCE, sample_from_model
from slimgpt.errors import ConfigError
from slimgpt.recovery.job import Data, Job
from slimgpt.recovery.teacher import (
    Predictions,
    Teacher,
    all_learned,
    store_predictions,
)
from slimgpt.recovery.text import text_options
from slimgpt.recovery.trainer import EVALUATIONS
from slimgpt.runtime.distributed import broadcast, is_main, num_processes, training_together
from slimgpt.runtime.environment import free_memory
from slimgpt.runtime.files import writing
from slimgpt.runtime.run_directory import BUDGET_FILE, Run

log = logging.getLogger(__name__)

STEPS = 3  # of the trial; the first one warms up

TEXT_LENGTH = 16  # tokens of each text that is generated for the measurement

TRIAL_DIR = "trial"


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a recovery take.

    Attributes
    ----------
    generation : float
        A token of text that the dense model generates.
    prediction : float
        The dense model's stored prediction of a token.
    step : float
        A training step.
    evaluation : float
        An evaluation on all held-out windows.
    checkpoint : float
        Saving the state of the training.
    loading : float
        Loading the dense model and the trained one, and writing the result.
    """

    generation: float
    prediction: float
    step: float
    evaluation: float
    checkpoint: float
    loading: float


@dataclass(frozen=True)
class Budget:
    """The tokens that fit in a time.

    Attributes
    ----------
    minutes : float
        What was asked for.
    tokens : int
        What is trained on.
    measuring : float
        Seconds that the measurement took.
    """

    minutes: float
    tokens: int
    measuring: float


def find_budget(run: Run, job: Job, teacher: Teacher | None, trial: TrainingArguments) -> Budget:
    """Choose a number of tokens for ``config.minutes``, or read what was chosen before.

    Parameters
    ----------
    run : Run
        Stores the choice. All processes call this together.
    job : Job
        With a time.
    teacher : callable or None
        Loads the dense model.
    trial : TrainingArguments
        How the training will be.

    Raises
    ------
    ConfigError
        If the time is too short for one window of each text.
    DataError
        If a text is shorter than that.
    """
    if not run.all_have(BUDGET_FILE):
        start = time.monotonic()
        costs = measure(run, job, teacher, trial)
        costs, seconds = broadcast((costs, time.monotonic() - start))
        tokens = tokens_within(job.config, costs, seconds, len(job.held_out))
        if is_main():
            tokens = min(tokens, _tokens_of_texts(job, tokens))
            log.info("%g minutes are enough for %d tokens", job.config.minutes, tokens)
            budget = Budget(job.config.minutes or 0.0, tokens, round(seconds, 3))
            run.write(BUDGET_FILE, json.dumps(asdict(budget)))
    return TypeAdapter(Budget).validate_json(run.read(BUDGET_FILE))


def tokens_within(config: RecoverConfig, costs: Costs, spent: float, num_held_out: int) -> int:
    """Compute how many tokens fit in ``config.minutes``.

    Parameters
    ----------
    config : RecoverConfig
        The options.
    costs : Costs
        What was measured.
    spent : float
        Seconds that are gone.
    num_held_out : int
        Windows on which the model is evaluated.

    Returns
    -------
    int
        A multiple of ``config.seqlen``.

    Raises
    ------
    ConfigError
        If these are fewer than one window for each text.
    """
    eval_steps, save_steps = config.eval_steps, config.save_steps or config.eval_steps
    fixed = spent + costs.loading + costs.evaluation
    fixed += num_held_out * config.seqlen * costs.prediction
    step = costs.step
    if eval_steps and save_steps:
        step += costs.evaluation / eval_steps + costs.checkpoint / save_steps
    else:
        fixed += EVALUATIONS * (costs.evaluation + costs.checkpoint)
    each = config.epochs * step / config.batch_size
    own = config.data.count(SELF) / len(config.data)
    each += config.seqlen * (own * costs.generation + costs.prediction)
    seconds, least = 60 * (config.minutes or 0.0), len(config.data)
    num_windows = min(int((seconds - fixed) / each), LONGEST_TEXT // config.seqlen)
    if num_windows < least:
        needed = math.ceil((fixed + least * each) / 6) / 10
        raise ConfigError(
            f"{config.minutes:g} minutes are too few: of {seconds:.0f} s, {fixed:.0f} s go to what "
            f"does not depend on the text, and a window of {config.seqlen} tokens takes "
            f"{each:.1f} s",
            hint=f"give at least {needed:g} minutes, or fewer --eval-tokens",
        )
    return num_windows * config.seqlen


def _tokens_of_texts(job: Job, tokens: int) -> int:
    """Count the tokens that all texts together have in equal parts, at most `tokens`."""
    config, num_texts = job.config, len(job.config.data)
    most = LONGEST_TEXT // config.seqlen - job.num_left_out
    wanted = min(math.ceil(tokens / config.seqlen / num_texts), most)
    for name in config.data:
        if name == SELF:
            continue
        options = text_options(config, name, wanted, job.num_left_out)
        found = count_samples(training_texts(name, job.tokenizer, options), options)
        if found < wanted:
            log.warning("%s is too short for the time: it has %d windows to train on", name, found)
            wanted = max(found, 1)
    return wanted * num_texts * config.seqlen


def measure(run: Run, job: Job, teacher: Teacher | None, arguments: TrainingArguments) -> Costs:
    """Measure what a recovery costs, on held-out windows. All processes call this together.

    Parameters
    ----------
    run : Run
        The trial writes to a directory inside its state.
    job, teacher, arguments
        As for `find_budget`.
    """
    config, scratch = job.config, Run(run.state / TRIAL_DIR)
    with writing(run.output):
        if is_main():
            shutil.rmtree(scratch.output, ignore_errors=True)
            scratch.state.mkdir(parents=True)
    broadcast(None)
    log.info("measuring the speed for %g minutes", config.minutes)
    rows = [window["input_ids"] for window in job.held_out]
    repeated = [rows[i % len(rows)] for i in range(STEPS * config.batch_size)]
    train: Any = [{"input_ids": row, "labels": row} for row in repeated]
    by_teacher = _Teaching()
    if teacher:
        by_teacher = _teach(scratch, job, torch.tensor(repeated), teacher)
        train = by_teacher.predictions or train
        free_memory()  # of the teacher
    times = _train(job, train, scratch, arguments)
    free_memory()
    if is_main():
        shutil.rmtree(scratch.output)
    return Costs(
        by_teacher.generation,
        by_teacher.prediction,
        times["step"],
        times["evaluation"] * len(job.held_out) / _num_evaluated(train),
        times["checkpoint"],
        # Loaded, loaded again with what was trained, and written.
        by_teacher.loading + 3 * times["loading"],
    )


@dataclass(frozen=True)
class _Teaching:
    """Seconds of the dense model's part, as in `Costs`, and its predictions."""

    loading: float = 0.0
    generation: float = 0.0
    prediction: float = 0.0
    predictions: Predictions | None = None


def _teach(scratch: Run, job: Job, windows_NT: Tensor, load: Teacher) -> _Teaching:
    """Measure the dense model, which is in memory only here."""
    start = time.monotonic()
    model = load()
    with torch.no_grad():  # warms up
        model(windows_NT[:1].to(model.device), use_cache=False)
    loading = time.monotonic() - start
    generation = _generation(job, model) if SELF in job.config.data else 0.0
    if not job.method.distils:
        return _Teaching(loading, generation)
    windows = all_learned(windows_NT)
    predictions = store_predictions(scratch, "trial", windows, lambda: model, job.config)
    seconds = predictions.seconds / windows_NT.numel() / num_processes()
    return _Teaching(loading, generation, seconds, predictions)


def _generation(job: Job, model: Any) -> float:
    """Seconds per token of generated text, on the main process alone, as in the run.

    With prompts it is an estimate: windows have tokens of the prompts too, which cost less.
    """
    start = time.monotonic()
    if is_main():
        sample_from_model(model, job.tokenizer, SampleOptions(TEXTS_AT_ONCE, TEXT_LENGTH))
    broadcast(None)
    return (time.monotonic() - start) / TEXTS_AT_ONCE / TEXT_LENGTH


class _Clock(TrainerCallback):
    """Times of a short training: of each step, of the evaluation and of the checkpoint."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.evaluated = self.saved = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:  # which waits until the device has finished the step
            self.steps.append(time.monotonic())

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()


def _num_evaluated(train: Sequence[Any]) -> int:
    """Windows on which the trial is evaluated."""
    return min(len(train), 2 * num_processes())


def _train(job: Job, train: Any, scratch: Run, arguments: TrainingArguments) -> dict[str, float]:
    """Train for some steps; seconds of a step, an evaluation, a checkpoint, and of loading."""
    trial: Any = copy.copy(arguments)
    trial.output_dir, trial.report_to = str(scratch.state), []
    trial.max_steps = trial.eval_steps = trial.save_steps = STEPS
    data, clock = Data(train, Subset(train, range(_num_evaluated(train)))), _Clock()
    start = time.monotonic()
    trainer = job.make_trainer(data, trial, clock)
    loading = time.monotonic() - start
    with writing(scratch.output), training_together():
        trainer.train()
    trainer.accelerator.free_memory()
    return {
        "step": (clock.steps[-1] - clock.steps[0]) / (STEPS - 1),
        "evaluation": clock.evaluated - clock.steps[-1],
        "checkpoint": clock.saved - clock.evaluated,
        "loading": loading,
    }
