"""Token tensors for calibration and evaluation."""

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

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
        Number of windows at the beginning of the shuffled text that are left out; see
        `held_out_samples`.
    """

    nsamples: int
    seqlen: int
    seed: int = 0
    text_field: str | None = None
    num_held_out: int = 0


class Windows(NamedTuple):
    """Windows of text.

    Attributes
    ----------
    tokens : Tensor
        int64, (N, T).
    is_learned : Tensor
        Whether the loss of a training counts a token, bool, (N, T).
    """

    tokens: Tensor
    is_learned: Tensor


# A text in parts: tokens, and whether each is learned.
Parts = Iterable[tuple[list[int], list[bool]]]


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
    parts = (
        whole([_text(document, tokenizer), BLANK_LINE], tokenizer)
        for document in shuffled_documents(name, options)
    )
    return draw_windows(parts, name, options).tokens


def whole(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Parts:
    """Tokenise a text of which every token is learned."""
    return ((some, [True] * len(some)) for some in tokenize(texts, tokenizer))


def draw_windows(texts: Iterable[Parts], name: str, options: SampleOptions) -> Windows:
    """Join texts until there are enough windows, and choose some of these at random.

    The held-out windows are left out, and so are windows without a learned token (after the first
    one, which is not predicted).

    Parameters
    ----------
    texts : iterable of Parts
        The texts, of which only as many are read as are needed.
    name : str
        Their origin, for the error.
    options : SampleOptions
        What is drawn.

    Raises
    ------
    DataError
        If there are too few tokens, or more than `MAX_TOKENS` are requested.
    """
    nsamples, num_held_out = options.nsamples, options.num_held_out
    windows, num_tokens = _cut(texts, options)
    useful = num_held_out + _is_useful(windows)[num_held_out:].nonzero().flatten()
    if len(useful) < nsamples:
        num_windows = len(windows.tokens)
        left_out = max(0, num_windows - num_held_out - len(useful))
        raise DataError(
            f"{name} has {num_tokens} tokens, {num_windows - left_out} samples of {options.seqlen}"
            + f" and {left_out} without a token of an answer" * bool(left_out)
            + f", but {nsamples} samples"
            + f" and {num_held_out} held-out ones" * bool(num_held_out)
            + f" need {(nsamples + num_held_out) * options.seqlen} tokens",
            hint="give a longer text, fewer --nsamples or a smaller --seqlen; in a recovery, fewer "
            "tokens",
        )
    generator = torch.Generator().manual_seed(options.seed)
    chosen = useful[torch.randperm(len(useful), generator=generator)[:nsamples]]
    return Windows(windows.tokens[chosen], windows.is_learned[chosen])


def count_samples(texts: Iterable[Parts], options: SampleOptions) -> int:
    """Count the windows that `draw_windows` can choose from, at most ``nsamples``."""
    windows, _ = _cut(texts, options)
    return min(options.nsamples, int(_is_useful(windows)[options.num_held_out :].sum()))


def held_out_samples(texts: Iterable[Parts], options: SampleOptions) -> Tensor:
    """Take windows of texts that `draw_windows` leaves out, if its options say how many.

    They are the first ones, learned or not: at most a tenth of the texts, but one at least.

    Parameters
    ----------
    texts : iterable of Parts
        The texts, in the same order as for `draw_windows`.
    options : SampleOptions
        How many are taken at most.

    Returns
    -------
    Tensor
        int64, (at most nsamples, seqlen); no rows if the texts are shorter than two windows.
    """
    enough = replace(options, nsamples=HELD_OUT_SHARE * options.nsamples, num_held_out=0)
    tokens_NT = _cut(texts, enough)[0].tokens
    least = min(1, len(tokens_NT) // 2)
    return tokens_NT[: max(least, min(options.nsamples, len(tokens_NT) // HELD_OUT_SHARE))]


def _cut(texts: Iterable[Parts], options: SampleOptions) -> tuple[Windows, int]:
    """Join texts and cut them into windows, until enough can be drawn.

    Returns
    -------
    Windows, int
        All windows, in their order; and the number of tokens that were read.
    """
    seqlen = options.seqlen
    tokens_needed(options.nsamples + options.num_held_out, seqlen)
    tokens, is_learned = array("q"), bytearray()
    num_windows = num_useful = 0
    for text in texts:
        for some, learned in text:
            tokens.extend(some)
            is_learned.extend(learned)
        before, num_windows = num_windows, len(tokens) // seqlen
        num_useful += sum(
            any(is_learned[index * seqlen + 1 : (index + 1) * seqlen])
            for index in range(max(before, options.num_held_out), num_windows)
        )
        if num_useful >= options.nsamples:
            break
    if not num_windows:
        empty = torch.empty(0, seqlen)
        return Windows(empty.long(), empty.bool()), len(tokens)
    flat = (
        torch.frombuffer(tokens, dtype=torch.int64),
        torch.frombuffer(is_learned, dtype=torch.bool),
    )
    windows = Windows(*(x[: num_windows * seqlen].view(num_windows, seqlen) for x in flat))
    return windows, len(tokens)


def _is_useful(windows: Windows) -> Tensor:
    """Whether windows have a learned token that is predicted, bool, (N,)."""
    return windows.is_learned[:, 1:].any(dim=1)


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


def shuffled_documents(name: str, options: SampleOptions) -> Iterator[Document]:
    """Read the documents of a data set that are not empty, shuffled one buffer at a time."""
    documents = read_documents(name, "calibration", options.text_field)
    filled = (d for d in documents if d.messages or (d.prompt + d.text).strip())
    generator = random.Random(options.seed)
    while batch := list(_buffer(filled)):
        generator.shuffle(batch)
        yield from batch


def _buffer(documents: Iterator[Document]) -> Iterator[Document]:
    """Take the documents of one shuffle buffer."""
    num_characters = 0
    for document in itertools.islice(documents, SHUFFLED_DOCUMENTS):
        yield document
        num_characters += document.num_characters
        if num_characters >= SHUFFLED_CHARACTERS:
            return
