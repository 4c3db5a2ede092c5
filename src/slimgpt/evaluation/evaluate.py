"""Evaluate a model on texts and benchmark tasks, and optionally its base model too.

Shape suffixes: ``N`` windows, ``T`` tokens of a window, ``C`` hidden size, ``L`` layers.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from operator import itemgetter
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.checkpoint.card import keep_results
from slimgpt.checkpoint.results import PERPLEXITY_FILE, TASKS_FILE
from slimgpt.config import EvalConfig
from slimgpt.data.datasets import check_dataset, describe_dataset
from slimgpt.data.samples import evaluation_tokens
from slimgpt.errors import DataError, NumericalError
from slimgpt.evaluation.perplexity import EvalResult, mean_losses, usable_lengths
from slimgpt.evaluation.tasks import Score, load_tasks, run_tasks
from slimgpt.models.comparison import check_same_dtype, check_same_vocabulary
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

# Results with equal values of these keys differ only in the model.
TEXT_PROTOCOL = itemgetter("data_sha256", "seqlen", "base", "dtype")

TASK_PROTOCOL = itemgetter("task", "metric", "num_docs", "num_fewshot", "data", "base", "dtype")


@dataclass(frozen=True)
class TaskResult(Score):
    """Scores of the model and of the base on a task.

    Attributes
    ----------
    model, base : str, str or None
        The models: hub ids, or names of local folders.
    dtype : str
        Precision of both models.
    base_value, base_stderr : float or None
        The base's score and standard error.
    """

    model: str
    base: str | None
    dtype: str
    base_value: float | None
    base_stderr: float | None


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`: one for each text and window length, and one for each task metric."""

    perplexity: tuple[EvalResult, ...]
    tasks: tuple[TaskResult, ...]


def evaluate(model: str, **options: Any) -> Evaluation:
    """Measure perplexity and run tasks; also update the model card of a pruned model.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``; dense or pruned.
    **options
        The fields of `slimgpt.config.EvalConfig`, for example ``data=("pydocs",)``.

    Returns
    -------
    Evaluation
        Perplexity for each text and window length; metrics for each task.

    Raises
    ------
    SlimGPTError
        If an option, a model or the data is wrong, a text is shorter than one window, a package
        for the tasks is missing, or the outputs of a model are not finite. Any exception that ends
        a measurement carries the results so far in its attribute ``measured``.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.evaluate("slim", data=("pydocs",), seqlen=(512,),
    ...                  against="smollm2-135m")  # doctest: +SKIP
    """
    config = EvalConfig.create(**options)
    source = find_model(model)
    base_source = find_model(config.against) if config.against else None
    for name in config.data:
        check_dataset(name, "evaluation")
    tokenizer = load_tokenizer(source)
    if base_source and config.data:
        check_same_vocabulary(source, base_source)
    if base_source and config.dtype == "auto":
        check_same_dtype([source, base_source])
    texts = {
        name: evaluation_tokens(name, tokenizer, config.max_tokens, config.text_field)
        for name in config.data
    }
    for name, tokens in texts.items():
        if len(tokens) < min(config.seqlen):
            raise DataError(
                f"{name} has {len(tokens)} tokens, less than one window of {min(config.seqlen)}",
                hint="give a longer text, more --max-tokens or a smaller --seqlen",
            )
    tasks = load_tasks(config.tasks, config.data_dir, config.num_fewshot) if config.tasks else None
    live = load_model(source, config.dtype, config.device)
    base = load_model(base_source, config.dtype, config.device) if base_source else None
    subjects: dict[str, Any] = {
        "model": source.title,
        "base": base_source.title if base_source else None,
        "dtype": str(live.dtype).removeprefix("torch."),
    }

    perplexity: list[EvalResult] = []
    scores: list[TaskResult] = []
    try:
        for name, tokens in texts.items():
            about = subjects | {
                "data": describe_dataset(name, "evaluation"),
                "data_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
            }
            for seqlen in usable_lengths(config.seqlen, [live, base or live], len(tokens)):
                log.info("evaluating on %s, windows of %d tokens", name, seqlen)
                windows = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
                perplexity.append(_on_text(live, base, windows, about))
                keep_results(source.directory, PERPLEXITY_FILE, perplexity[-1:], TEXT_PROTOCOL)
        if tasks:
            size = config.limit, config.batch_size
            theirs: Iterator[list[Score] | None] = repeat(None)
            if base and base_source:
                theirs = run_tasks(tasks, base, load_tokenizer(base_source), *size)
            for ours in run_tasks(tasks, live, tokenizer, *size):
                nothing = [None] * len(ours)
                found = _compared(ours, nothing, subjects | {"base": None})
                try:
                    found = _compared(ours, next(theirs) or nothing, subjects)
                finally:
                    scores += found
                    keep_results(source.directory, TASKS_FILE, found, TASK_PROTOCOL)
    except BaseException as err:
        vars(err)["measured"] = Evaluation(tuple(perplexity), tuple(scores))
        raise
    return Evaluation(tuple(perplexity), tuple(scores))


def _on_text(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    windows_NT: Tensor,
    about: dict[str, Any],
) -> EvalResult:
    losses = mean_losses(model, base, windows_NT)
    return EvalResult(
        **about,
        seqlen=windows_NT.shape[1],
        tokens=windows_NT.numel() - len(windows_NT),
        perplexity=_perplexity(losses.nll),
        base_perplexity=_perplexity(losses.base_nll) if base else None,
        kl_divergence=losses.kl_divergence if base else None,
        layer_errors=losses.layer_errors,
    )


def _perplexity(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        raise NumericalError(
            f"the perplexity is too large for a number: the mean loss is {nll:.0f} nats per token",
            hint="the weights are broken: download or write the model again",
        ) from None


def _compared(
    ours: Sequence[Score], theirs: Sequence[Score | None], subjects: dict[str, Any]
) -> list[TaskResult]:
    return [
        TaskResult(
            **asdict(score),
            **subjects,
            base_value=other.value if other else None,
            base_stderr=other.stderr if other else None,
        )
        for score, other in zip(ours, theirs, strict=True)
    ]
