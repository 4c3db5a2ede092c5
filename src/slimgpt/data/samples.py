"""Token tensors for calibration and evaluation."""

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
    """

    nsamples: int
    seqlen: int
    seed: int = 0
    text_field: str | None = None


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

    Windows without a learned token (after the first one, which is not predicted) are left out.

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
    nsamples, seqlen = options.nsamples, options.seqlen
    needed = tokens_needed(nsamples, seqlen)
    tokens, is_learned, useful, num_windows = array("q"), bytearray(), [], 0
    for text in texts:
        for some, learned in text:
            tokens.extend(some)
            is_learned.extend(learned)
        before, num_windows = num_windows, len(tokens) // seqlen
        useful += [
            index
            for index in range(before, num_windows)
            if any(is_learned[index * seqlen + 1 : (index + 1) * seqlen])
        ]
        if len(useful) >= nsamples:
            break
    if len(useful) < nsamples:
        left_out = num_windows - len(useful)
        raise DataError(
            f"{name} has {len(tokens)} tokens, {len(useful)} samples of {seqlen}"
            + f" and {left_out} without a token of an answer" * bool(left_out)
            + f", but {nsamples} samples need {needed} tokens",
            hint="give a longer text, fewer --nsamples (recover: --tokens) or a smaller --seqlen",
        )
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.tensor(useful)[torch.randperm(len(useful), generator=generator)[:nsamples]]
    flat = (
        torch.frombuffer(tokens, dtype=torch.int64),
        torch.frombuffer(is_learned, dtype=torch.bool),
    )
    return Windows(*(x[: num_windows * seqlen].view(-1, seqlen)[chosen] for x in flat))


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
