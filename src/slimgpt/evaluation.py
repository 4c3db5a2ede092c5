"""Perplexity and benchmark tasks of a model, beside those of a base model.

Shape suffixes: ``N`` windows, ``T`` tokens of a window, ``C`` hidden size, ``L`` layers.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from slimgpt.card import PERPLEXITY_FILE, TASKS_FILE, keep_results
from slimgpt.config import EvalConfig
from slimgpt.data import check_dataset, describe_dataset, evaluation_tokens
from slimgpt.errors import DataError, NumericalError
from slimgpt.model import (
    check_same_dtype,
    check_same_vocabulary,
    find_model,
    load_model,
    load_tokenizer,
)
from slimgpt.tasks import Score, load_tasks, run_tasks

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOGS = 2.0
# Results that agree in these differ in the model alone.
TEXT_PROTOCOL = itemgetter("data_sha256", "seqlen", "base", "dtype")
TASK_PROTOCOL = itemgetter("task", "metric", "num_docs", "num_fewshot", "data", "base", "dtype")


@dataclass(frozen=True)
class EvalResult:
    """Perplexity on one text with one window length.

    Attributes
    ----------
    model, base : str, str or None
        The models: hub ids, or names of local folders.
    dtype : str
        Precision in which they ran.
    data, data_sha256 : str
        The text, and the start of the SHA-256 of its tokens.
    seqlen : int
        Tokens of a window; windows do not overlap.
    tokens : int
        Tokens predicted: all but the first of each window.
    perplexity, base_perplexity : float, float or None
        exp of the mean negative log-likelihood of a token.
    kl_divergence : float or None
        Mean KL(base ‖ model) of the next-token distributions, in nats.
    layer_errors : tuple of float or None
        How far the residual stream is from that of the base after each block, the last one after
        the final norm: ‖h − h_base‖²/‖h_base‖² of the median token. None where the two models
        differ in depth or hidden size.
    """

    model: str
    base: str | None
    dtype: str
    data: str
    data_sha256: str
    seqlen: int
    tokens: int
    perplexity: float
    base_perplexity: float | None
    kl_divergence: float | None
    layer_errors: tuple[float, ...] | None


class Losses(NamedTuple):
    """Means over the predicted tokens of a text, in nats; those with a base are 0 without one.

    Attributes
    ----------
    nll, base_nll : float
        Negative log-likelihood of the model and of the base.
    kl_divergence : float
        KL(base ‖ model).
    layer_errors : tuple of float or None
        See `EvalResult`.
    """

    nll: float
    base_nll: float
    kl_divergence: float
    layer_errors: tuple[float, ...] | None


@dataclass(frozen=True)
class TaskResult(Score):
    """Score of the model on a task, and of the base.

    Attributes
    ----------
    model, base : str, str or None
        The models: hub ids, or names of local folders.
    dtype : str
        Precision in which they ran.
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
    """What `evaluate` measured: on each text and window length, and in each task."""

    perplexity: tuple[EvalResult, ...]
    tasks: tuple[TaskResult, ...]


def evaluate(model: str, **options: Any) -> Evaluation:
    """Measure perplexity and run tasks; in a directory of SlimGPT's, also fill the model card.

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
        for the tasks is missing, or the outputs of a model are not finite. What ends a measurement,
        this or another exception, has what was measured before as its attribute ``measured``.

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
            for seqlen in _usable_lengths(config.seqlen, [live, base or live], len(tokens)):
                log.info("evaluating on %s, windows of %d tokens", name, seqlen)
                perplexity.append(_on_text(live, base, name, tokens, seqlen, subjects))
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
    name: str,
    tokens: Tensor,
    seqlen: int,
    subjects: dict[str, Any],
) -> EvalResult:
    windows = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
    losses = mean_losses(model, base, windows)
    return EvalResult(
        **subjects,
        data=describe_dataset(name, "evaluation"),
        data_sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
        seqlen=seqlen,
        tokens=windows.numel() - len(windows),
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


def _usable_lengths(
    lengths: Iterable[int], models: list[PreTrainedModel], num_tokens: int
) -> list[int]:
    longest = min(num_tokens, *(model.config.max_position_embeddings for model in models))
    for length in lengths:
        if length > longest:
            log.warning(
                "seqlen %d is beyond the model's context or the text: %d is used", length, longest
            )
    return sorted({min(length, longest) for length in lengths})


@torch.no_grad()
def mean_losses(model: PreTrainedModel, base: PreTrainedModel | None, windows_NT: Tensor) -> Losses:
    """Measure a model, and a base beside it, on windows of tokens.

    Parameters
    ----------
    model, base : PreTrainedModel
        The model, and optionally the one to compare it with.
    windows_NT : Tensor
        int64, (windows, seqlen).

    Raises
    ------
    NumericalError
        If a mean is not finite.
    """
    shapes = {(m.config.num_hidden_layers, m.config.hidden_size) for m in (model, base or model)}
    with_streams = base is not None and len(shapes) == 1
    sums = torch.zeros(3, dtype=torch.float64)
    errors_LT: list[Tensor] = []
    start = logged = time.monotonic()
    for index, window_T in enumerate(windows_NT):
        targets_T = window_T[1:].to(model.device)
        log_probs, streams = _run(model, window_T, with_streams)
        sums[0] += functional.nll_loss(log_probs, targets_T, reduction="sum").cpu()
        if base is not None:
            base_log_probs, base_streams = _run(base, window_T, with_streams)
            sums[1] += functional.nll_loss(base_log_probs, targets_T, reduction="sum").cpu()
            sums[2] += functional.kl_div(
                log_probs, base_log_probs, reduction="sum", log_target=True
            ).cpu()
            if with_streams:
                pairs = zip(streams, base_streams, strict=True)
                errors_LT.append(torch.stack([_relative_errors(*pair) for pair in pairs]).cpu())
        now = time.monotonic()
        if now - logged > SECONDS_BETWEEN_LOGS:
            logged = now
            left = (now - start) / (index + 1) * (len(windows_NT) - index - 1)
            log.info("window %d/%d; %.0f s left", index + 1, len(windows_NT), left)
    if not sums.isfinite().all():
        raise NumericalError(
            f"the outputs are not finite in {str(model.dtype).removeprefix('torch.')}",
            hint="evaluate with --dtype bfloat16 or float32",
        )
    nll, base_nll, kl_divergence = (sums / (windows_NT.numel() - len(windows_NT))).tolist()
    layer_errors = None
    if errors_LT:
        layer_errors = tuple(torch.cat(errors_LT, dim=1).median(dim=1).values.tolist())
    return Losses(nll, base_nll, kl_divergence, layer_errors)


def _run(
    model: PreTrainedModel, window_T: Tensor, with_streams: bool
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of the next tokens, and the residual stream after each block."""
    inputs = window_T.to(model.device)[None]
    output = model(inputs, use_cache=False, output_hidden_states=with_streams)
    streams = [states[0] for states in output.hidden_states[1:]] if with_streams else []
    return output.logits[0, :-1].float().log_softmax(dim=-1), streams


def _relative_errors(stream_TC: Tensor, base_TC: Tensor) -> Tensor:
    change_TC = (stream_TC - base_TC).float()
    return change_TC.square().sum(dim=-1) / base_TC.float().square().sum(dim=-1)
