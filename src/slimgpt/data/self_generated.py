"""Text that the dense model generates itself."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimgpt.data.prompts import Prompts, answer_length
from slimgpt.data.samples import Parts, SampleOptions, Windows, draw_windows, tokens_needed
from slimgpt.errors import DataError, NumericalError

log = logging.getLogger(__name__)

TEXT_LENGTH, TEXTS_AT_ONCE = 128, 128  # tokens in a generated text; texts in a batch

PAD = 0  # token that the attention mask hides


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
    with _seeded(model, options.seed):
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


@torch.no_grad()
def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    options: SampleOptions,
) -> Windows:
    """Have the dense model answer prompts, at temperature 1, until there is enough text.

    The prompts are shuffled. If there are too few, each is answered several times. Prompts and
    answers are joined and cut into windows; only the answers, with their last EOS, are learned.

    Parameters
    ----------
    model, tokenizer
        The model and its tokenizer.
    prompts : Prompts
        See `slimgpt.data.prompts.read_prompts`.
    options : SampleOptions
        Without a text field.

    Raises
    ------
    DataError
        If more than `MAX_TOKENS` are requested.
    NumericalError
        If the model's probabilities are not finite.
    """
    with _seeded(model, options.seed):
        return draw_windows(_answers(model, tokenizer, prompts, options.seqlen), "self", options)


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, seqlen: int
) -> Iterator[Parts]:
    """Answer the prompts again and again."""
    ends, length = _ends(model, tokenizer), answer_length(seqlen)
    at_once = max(1, TEXTS_AT_ONCE * TEXT_LENGTH // (max(map(len, prompts)) + length))
    order = itertools.chain.from_iterable(
        torch.randperm(len(prompts)).tolist() for _ in itertools.count()
    )
    generate: Any = model.generate
    for num_answers in itertools.count(0, at_once):
        if num_answers <= len(prompts) < num_answers + at_once:
            log.info("%d prompts are too few: they are answered several times", len(prompts))
        batch = [prompts[index].tolist() for index in itertools.islice(order, at_once)]
        longest = max(map(len, batch))
        padded = [[PAD] * (longest - len(prompt)) + prompt for prompt in batch]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]
        log.info("generating answer %d", num_answers)
        rows = generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=False,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([_Draw()]),
            max_new_tokens=length,
            eos_token_id=ends or None,
            pad_token_id=PAD,
        ).tolist()
        for prompt, row in zip(batch, rows, strict=True):
            written = row[longest:]
            stop = next((i + 1 for i, token in enumerate(written) if token in ends), length)
            answer = written[:stop]
            yield [(prompt, [False] * len(prompt)), (answer, [True] * len(answer))]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer."""
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({end for end in ends if isinstance(end, int)})


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Draw random numbers from a seed, and leave the generators as they were."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
