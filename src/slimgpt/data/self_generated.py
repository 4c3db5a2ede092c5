"""Calibration samples that the dense model generates itself."""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimgpt.data.samples import SampleOptions, tokens_needed
from slimgpt.errors import DataError, NumericalError

log = logging.getLogger(__name__)

TEXT_LENGTH, TEXTS_AT_ONCE = 128, 128  # tokens in a generated text; texts in a batch


@torch.no_grad()
def sample_from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SampleOptions
) -> Tensor:
    """Generate calibration samples with the dense model, at temperature 1.

    The model generates many short texts in one batch, which takes hardly longer than one text. They
    are joined and cut into samples.

    Parameters
    ----------
    model, tokenizer
        The model and its tokenizer, which must define a token to start from (BOS, else EOS).
    options : SampleOptions
        Without a text field.

    Returns
    -------
    Tensor
        int64, (nsamples, seqlen), on the CPU.

    Raises
    ------
    DataError
        If the tokenizer has neither BOS nor EOS, or more than `MAX_TOKENS` are requested.
    NumericalError
        If the model's probabilities are not finite.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError(
            "the tokenizer has neither BOS nor EOS, so the model cannot start a text",
            hint="give other texts than self",
        )
    nsamples, seqlen = options.nsamples, options.seqlen
    needed, length = tokens_needed(nsamples, seqlen), min(TEXT_LENGTH, seqlen)
    prompts = torch.tensor([[first]] * -(-needed // length))
    generate: Any = model.generate
    texts = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        for prompt in prompts.to(model.device).split(TEXTS_AT_ONCE):
            log.info("generating text %d of %d", len(texts), len(prompts))
            texts += generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                repetition_penalty=1.0,
                logits_processor=LogitsProcessorList([_Draw()]),
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
            ).cpu()
    return torch.cat(texts)[:needed].view(nsamples, seqlen)


class _Draw(LogitsProcessor):
    """Draw the next token, and mask all others.

    This needs one random number per text. Sampling in `generate` needs one per vocabulary entry,
    which on a CPU costs as much as a small model.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        upto = scores.float().softmax(dim=-1).cumsum(dim=-1)
        if not upto[:, -1].isfinite().all():
            raise NumericalError(
                f"the logits of token {input_ids.shape[-1] + 1} of a generated text "
                f"are not finite in {str(scores.dtype).removeprefix('torch.')}",
                hint="give --dtype float32; if that does not help, the weights are broken",
            )
        # In (0, 1], so that a token without probability is never the first to reach it.
        number = upto[:, -1:] * (1 - torch.rand(len(upto), 1, device=upto.device))
        drawn = torch.searchsorted(upto, number)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0)
