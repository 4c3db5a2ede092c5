"""Perplexity and benchmark tasks of a model, beside those of a base model."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from slimgpt.card import PERPLEXITY_FILE, REPORT_FILE, TASKS_FILE, update_card
from slimgpt.config import EvalConfig
from slimgpt.data import check_dataset, describe_dataset, evaluation_tokens
from slimgpt.errors import DataError
from slimgpt.model import check_same_vocabulary, find_model, load_model, load_tokenizer
from slimgpt.run import write_atomically
from slimgpt.tasks import Score, load_tasks, run_tasks

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOGS = 2.0
# Results that agree in these differ in the model alone.
TEXT_PROTOCOL = ("data_sha256", "seqlen", "base")
TASK_PROTOCOL = ("task", "metric", "num_docs", "num_fewshot", "data", "base")


@dataclass(frozen=True)
class EvalResult:
    """Perplexity on one text with one window length.

    Attributes
    ----------
    model, base : str, str or None
        The models, as the user named them.
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
    """

    model: str
    base: str | None
    data: str
    data_sha256: str
    seqlen: int
    tokens: int
    perplexity: float
    base_perplexity: float | None
    kl_divergence: float | None


@dataclass(frozen=True)
class TaskResult(Score):
    """Score of the model on a task, and of the base.

    Attributes
    ----------
    model, base : str, str or None
        The models, as the user named them.
    base_value, base_stderr : float or None
        The base's score and standard error.
    """

    model: str
    base: str | None
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
        If an option, a model or the data is wrong, a text is shorter than one window, or a
        package for the tasks is missing.

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

    perplexity = []
    for name, tokens in texts.items():
        for seqlen in _usable_lengths(config.seqlen, [live, base or live], len(tokens)):
            log.info("evaluating on %s, windows of %d tokens", name, seqlen)
            windows = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
            nll, base_nll, kl = mean_losses(live, base, windows)
            perplexity.append(
                EvalResult(
                    model=model,
                    base=config.against,
                    data=describe_dataset(name, "evaluation"),
                    data_sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
                    seqlen=seqlen,
                    tokens=windows.numel() - len(windows),
                    perplexity=math.exp(nll),
                    base_perplexity=math.exp(base_nll) if base else None,
                    kl_divergence=kl if base else None,
                )
            )
    scores: list[TaskResult] = []
    if tasks:
        size = config.limit, config.batch_size
        ours = run_tasks(tasks, live, tokenizer, *size)
        theirs: list[Score] | list[None] = [None] * len(ours)
        if base and base_source:
            theirs = run_tasks(tasks, base, load_tokenizer(base_source), *size)
        scores = [
            TaskResult(
                **asdict(score),
                model=model,
                base=config.against,
                base_value=other.value if other else None,
                base_stderr=other.stderr if other else None,
            )
            for score, other in zip(ours, theirs, strict=True)
        ]
    directory = Path(source.location)
    if (directory / REPORT_FILE).is_file():
        _add_to_card(directory, PERPLEXITY_FILE, perplexity, TEXT_PROTOCOL)
        _add_to_card(directory, TASKS_FILE, scores, TASK_PROTOCOL)
    return Evaluation(tuple(perplexity), tuple(scores))


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
def mean_losses(
    model: PreTrainedModel, base: PreTrainedModel | None, windows: Tensor
) -> tuple[float, float, float]:
    """Measure a model, and a base beside it, on windows of tokens.

    Parameters
    ----------
    model, base : PreTrainedModel
        The model, and optionally the one to compare it with.
    windows : Tensor
        int64, (windows, seqlen).

    Returns
    -------
    tuple of float
        Negative log-likelihood of the model and of the base, and KL(base ‖ model), each in nats
        per predicted token; the latter two are zero without a base.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    start = logged = time.monotonic()
    for index, window in enumerate(windows):
        inputs = window.to(model.device)[None]
        targets = inputs[0, 1:]
        log_probs = _log_probs(model, inputs)
        sums[0] += functional.nll_loss(log_probs, targets, reduction="sum").cpu()
        if base is not None:
            base_log_probs = _log_probs(base, inputs)
            sums[1] += functional.nll_loss(base_log_probs, targets, reduction="sum").cpu()
            sums[2] += functional.kl_div(
                log_probs, base_log_probs, reduction="sum", log_target=True
            ).cpu()
        now = time.monotonic()
        if now - logged > SECONDS_BETWEEN_LOGS:
            logged = now
            left = (now - start) / (index + 1) * (len(windows) - index - 1)
            log.info("window %d/%d; %.0f s left", index + 1, len(windows), left)
    return tuple((sums / (windows.numel() - len(windows))).tolist())


def _log_probs(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    return model(inputs, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)


def _add_to_card(
    directory: Path,
    name: str,
    results: Sequence[EvalResult | TaskResult],
    protocol: tuple[str, ...],
) -> None:
    """Keep the results with the pruned model, in place of older ones of the same protocol.

    A failure to do so does not lose the results.
    """
    if not results:
        return
    file = directory / name
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        by_protocol = {tuple(r[key] for key in protocol): r for r in [*kept, *map(asdict, results)]}
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(list(by_protocol.values()), indent=1) + "\n")
        update_card(directory)
    except (OSError, ValueError) as err:
        log.warning("the results are not kept in %s: %s", directory, err)
