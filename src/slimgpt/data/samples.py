"""Token tensors for calibration and evaluation."""

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimgpt.data.chats import render
from slimgpt.data.datasets import BLANK_LINE, HUB_DATASETS, read_documents
from slimgpt.data.documents import Document
from slimgpt.data.tokenization import tokenize
from slimgpt.errors import DataError

MAX_TOKENS = 2**28  # in a text or in all samples: 2 GiB

HELD_OUT_SHARE = 10  # at most a tenth of a text is held out

SHUFFLED_DOCUMENTS, SHUFFLED_CHARACTERS = 10_000, 2**25  # size of the shuffle buffer

# Upper bound of the memory for reading and tokenising local files or the hub: the shuffle buffer at
# 4 bytes per character, one record of maximum size while it is parsed, a piece in the tokenizer.
READING_BYTES = 2**29


@dataclass(frozen=True)
class SampleOptions:
    """What calibration samples are drawn.

    Attributes
    ----------
    nsamples, seqlen : int
        Number of samples and tokens in each.
    seed : int
        Random seed.
    text_field : str or None
        Field with the text in local data files; by default ``text``, a chat or an instruction.
    num_held_out : int
        Number of windows that `held_out_samples` has of this text, which are left out.
    """

    nsamples: int
    seqlen: int
    seed: int = 0
    text_field: str | None = None
    num_held_out: int = 0


def calibration_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions
) -> Tensor:
    """Draw calibration samples.

    Documents are shuffled and joined until there are enough tokens. The text is cut into
    non-overlapping windows, of which ``nsamples`` are chosen at random. Chats are rendered in the
    model's own template. The shuffle buffer holds at most `SHUFFLED_DOCUMENTS` documents and about
    `SHUFFLED_CHARACTERS` characters. A document longer than
    `slimgpt.data.documents.LONGEST_DOCUMENT` characters counts as several.

    Parameters
    ----------
    name : str
        See `check_dataset`; not ``self``.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    options : SampleOptions
        Its seed is that of the shuffling and of the choice of windows.

    Returns
    -------
    Tensor
        int64, (nsamples, seqlen).

    Raises
    ------
    DataError
        If the data cannot be read or has too few tokens, or more than `MAX_TOKENS` are requested.
    """
    nsamples, seqlen, num_held_out = options.nsamples, options.seqlen, options.num_held_out
    needed = tokens_needed(nsamples + num_held_out, seqlen)
    tokens = _tokens(name, tokenizer, options, needed)
    windows = _cut(tokens, seqlen)
    if len(windows) < nsamples + num_held_out:
        held_out = f" and {num_held_out} held-out ones" if num_held_out else ""
        raise DataError(
            f"{name} has {len(tokens)} tokens, {len(windows)} samples of {seqlen}, but "
            f"{nsamples} samples{held_out} need {needed} tokens",
            hint="give a longer text, fewer --nsamples or a smaller --seqlen; in a recovery, fewer "
            "tokens",
        )
    windows = windows[num_held_out:]
    generator = torch.Generator().manual_seed(options.seed)
    return windows[torch.randperm(len(windows), generator=generator)[:nsamples]]


def count_samples(name: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions) -> int:
    """Count the samples that a text has, at most ``nsamples``; see `calibration_tokens`."""
    wanted = options.nsamples + options.num_held_out
    tokens = _tokens(name, tokenizer, options, tokens_needed(wanted, options.seqlen))
    return max(0, min(len(tokens) // options.seqlen, wanted) - options.num_held_out)


def held_out_samples(
    name: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions
) -> Tensor:
    """Take windows of a text that `calibration_tokens` leaves out, if the options say how many.

    They are the first ones of the shuffled text, for the same seed: at most a tenth of it, but one
    at least.

    Returns
    -------
    Tensor
        int64, (at most nsamples, seqlen); no rows if the text is shorter than two windows.
    """
    needed = tokens_needed(HELD_OUT_SHARE * options.nsamples, options.seqlen)
    windows = _cut(_tokens(name, tokenizer, options, needed), options.seqlen)
    least = min(1, len(windows) // 2)
    return windows[: max(least, min(options.nsamples, len(windows) // HELD_OUT_SHARE))]


def _tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, needed: int
) -> Tensor:
    """Tokenise the shuffled text until there are `needed` tokens, or more."""
    documents = read_documents(name, "calibration", options.text_field)
    texts = filter(str.strip, (_text(document, tokenizer) for document in documents))
    tokens = array("q")
    for text in _shuffled(texts, options.seed):
        for some in tokenize([text, BLANK_LINE], tokenizer):
            tokens.extend(some)
        if len(tokens) >= needed:
            break
    return torch.frombuffer(tokens, dtype=torch.int64) if tokens else torch.empty(0).long()


def _cut(tokens: Tensor, seqlen: int) -> Tensor:
    """Cut tokens into windows that do not overlap, (N, seqlen)."""
    num_windows = len(tokens) // seqlen
    return tokens[: num_windows * seqlen].view(num_windows, seqlen)


def evaluation_tokens(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    text_field: str | None = None,
) -> Tensor:
    """Tokenise an evaluation text: all documents, joined and tokenised as one.

    Documents are separated by blank lines, in C4 and PTB by spaces. If the tokenizer adds a BOS
    token, it appears once, at the start. The text is read and tokenised in pieces, only as far as
    `max_tokens` requires (see `slimgpt.data.tokenization.tokenize`). Chats are rendered in the
    model's own template.

    Parameters
    ----------
    name : str
        See `check_dataset`.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    max_tokens : int, optional
        Keep this many tokens from the start.
    text_field : str, optional
        Field with the text in local data files; by default ``text``, a chat or an instruction.

    Returns
    -------
    Tensor
        int64, (tokens,).

    Raises
    ------
    DataError
        If the data cannot be read, or has more than `MAX_TOKENS` and `max_tokens` is not given.
    """
    separator = HUB_DATASETS[name].separator if name in HUB_DATASETS else BLANK_LINE
    documents = read_documents(name, "evaluation", text_field)
    tokens = array("q")
    for some in tokenize(_joined(documents, separator, tokenizer), tokenizer):
        tokens.extend(some)
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
        if len(tokens) > MAX_TOKENS:
            raise DataError(f"{name} has more than {MAX_TOKENS} tokens", hint="give --max-tokens")
    return torch.tensor(tokens[: min(len(tokens), max_tokens or MAX_TOKENS)], dtype=torch.long)


def _joined(
    documents: Iterable[Document], separator: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    for number, document in enumerate(documents):
        if number and not document.goes_on:
            yield separator
        yield _text(document, tokenizer)


def tokens_needed(nsamples: int, seqlen: int) -> int:
    """Compute the number of tokens in the samples, and check that it is within `MAX_TOKENS`."""
    if nsamples * seqlen > MAX_TOKENS:
        raise DataError(
            f"{nsamples} samples of {seqlen} tokens are {nsamples * seqlen} tokens; at most "
            f"{MAX_TOKENS} can be used",
            hint="give fewer --nsamples or a smaller --seqlen",
        )
    return nsamples * seqlen


def _text(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a document as one text, without the BOS token that the tokenizer adds."""
    if not document.messages:
        return document.prompt + document.text
    text = render(document.messages, tokenizer, document.where)
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return text.removeprefix(str(bos)) if adds_bos else text


def _shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    """Shuffle a stream, one buffer at a time."""
    generator = random.Random(seed)
    while batch := list(_buffer(texts)):
        generator.shuffle(batch)
        yield from batch


def _buffer(texts: Iterator[str]) -> Iterator[str]:
    """Take the texts of one shuffle buffer."""
    num_characters = 0
    for text in itertools.islice(texts, SHUFFLED_DOCUMENTS):
        yield text
        num_characters += len(text)
        if num_characters >= SHUFFLED_CHARACTERS:
            return
