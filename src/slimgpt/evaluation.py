"""Perplexity of a model, and how far its predictions are from those of a base model."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.card import EVAL_FILE, REPORT_FILE, update_card
from slimgpt.config import EvalConfig
from slimgpt.data import check_dataset, describe_dataset, evaluation_tokens
from slimgpt.errors import ConfigError, DataError
from slimgpt.model import Source, find_model, load_config, load_model, load_tokenizer
from slimgpt.run import write_atomically

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOGS = 2.0


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


def evaluate(model: str, **options: Any) -> list[EvalResult]:
    """Measure perplexity; in a directory that SlimGPT wrote, put it into the model card.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``; dense or pruned.
    **options
        The fields of `slimgpt.config.EvalConfig`, for example ``data=("pydocs",)``.

    Returns
    -------
    list of EvalResult
        One for each text and window length.

    Raises
    ------
    SlimGPTError
        If an option, a model or the data is wrong, or a text is shorter than one window.

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
    if base_source:
        _check_same_vocabulary(source, base_source, tokenizer)
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
    live = load_model(source, config.dtype, config.device)
    base = load_model(base_source, config.dtype, config.device) if base_source else None

    results = []
    for name, tokens in texts.items():
        for seqlen in _usable_lengths(config.seqlen, [live, base or live], len(tokens)):
            log.info("evaluating on %s, windows of %d tokens", name, seqlen)
            windows = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
            nll, base_nll, kl = mean_losses(live, base, windows)
            results.append(
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
    directory = Path(source.location)
    if (directory / REPORT_FILE).is_file():
        _add_to_card(directory, results)
    return results


def _check_same_vocabulary(
    source: Source, base: Source, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Both models must give the same token the same number, or the KL means nothing."""
    sizes = [load_config(s).vocab_size for s in (source, base)]
    if sizes[0] != sizes[1] or load_tokenizer(base).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{source.name} and {base.name} have different vocabularies ({sizes[0]} and {sizes[1]} "
            "tokens), so their predictions cannot be compared",
            hint="give the model that was pruned as --against",
        )


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


def _add_to_card(directory: Path, results: list[EvalResult]) -> None:
    """Keep the results with the pruned model; a failure to do so does not lose them."""
    file = directory / EVAL_FILE
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        by_protocol = {
            (r["data_sha256"], r["seqlen"], r["base"]): r for r in [*kept, *map(asdict, results)]
        }
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(list(by_protocol.values()), indent=1) + "\n")
        update_card(directory)
    except (OSError, ValueError) as err:
        log.warning("the results are not kept in %s: %s", directory, err)
