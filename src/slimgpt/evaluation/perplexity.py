"""Measure a model's perplexity on a text, and its KL divergence from a base model."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from slimgpt.errors import NumericalError

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOGS = 2.0


@dataclass(frozen=True)
class EvalResult:
    """Perplexity on one text with one window length.

    Attributes
    ----------
    model, base : str, str or None
        The models: hub ids, or names of local folders.
    dtype : str
        Precision of both models.
    data, data_sha256 : str
        The text, and the start of the SHA-256 of its tokens.
    seqlen : int
        Tokens of a window; windows do not overlap.
    tokens : int
        Number of predicted tokens: all but the first of each window.
    perplexity, base_perplexity : float, float or None
        exp of the mean negative log-likelihood of a token.
    kl_divergence : float or None
        Mean KL(base ‖ model) of the next-token distributions, in nats.
    layer_errors : tuple of float or None
        Relative error of the residual stream after each block (the last one after the final norm):
        the median over tokens of ‖h − h_base‖²/‖h_base‖². None without a base, or if the two models
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
    """Means over the predicted tokens of a text, in nats.

    Attributes
    ----------
    nll, base_nll : float
        Negative log-likelihood of the model and of the base; 0 without a base.
    kl_divergence : float
        KL(base ‖ model); 0 without a base.
    layer_errors : tuple of float or None
        See `EvalResult`.
    """

    nll: float
    base_nll: float
    kl_divergence: float
    layer_errors: tuple[float, ...] | None


def usable_lengths(
    lengths: Iterable[int], models: list[PreTrainedModel], num_tokens: int
) -> list[int]:
    """Limit window lengths to the models' context and to the length of the text."""
    configs = [model.config.get_text_config() for model in models]
    longest = min(num_tokens, *(config.max_position_embeddings for config in configs))
    for length in lengths:
        if length > longest:
            log.warning(
                "seqlen %d is beyond the model's context or the text: %d is used", length, longest
            )
    return sorted({min(length, longest) for length in lengths})


@torch.no_grad()
def mean_losses(model: PreTrainedModel, base: PreTrainedModel | None, windows_NT: Tensor) -> Losses:
    """Measure a model, and optionally its base, on windows of tokens.

    Parameters
    ----------
    model, base : PreTrainedModel
        The model, and optionally the base model to compare with.
    windows_NT : Tensor
        int64, (windows, seqlen).

    Raises
    ------
    NumericalError
        If a mean is not finite.
    """
    configs = [m.config.get_text_config() for m in (model, base or model)]
    shapes = {(config.num_hidden_layers, config.hidden_size) for config in configs}
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
