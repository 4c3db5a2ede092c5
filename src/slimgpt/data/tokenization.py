"""Tokenise long texts in pieces, with the same tokens as for the whole text."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

PIECE = 2**18  # characters tokenised at once: about 50 MB in the tokenizer

OVERLAP = 2**13  # characters shared by two pieces

AGREEMENT = 16  # tokens before and after a cut that must be equal in both pieces


class _Tokens(NamedTuple):
    """Token ids, and the position in the text where each ends."""

    ids: list[int]
    ends: list[int]


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Tokenise a text that arrives in parts, as if it were one.

    A text longer than `PIECE` characters is tokenised in overlapping pieces. Two pieces are joined
    inside their overlap, at a cut with `AGREEMENT` equal tokens on each side. This assumes that the
    tokens on one side of such a run do not depend on the text on the other side, which holds if a
    tokenizer first splits text into words or merges neighbours only. Pieces that do not agree (a
    word longer than the overlap) are tokenised as one. A slow (Python) tokenizer reports no
    positions and gets the whole text.

    Parameters
    ----------
    texts : iterable of str
        Parts of the text, of any length.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer; its special tokens appear only at the start and the end of the text.

    Yields
    ------
    list of int
        The next tokens.
    """
    pieces = _cut_anew(texts) if tokenizer.is_fast else iter(["".join(texts)])
    window, following = next(pieces, ""), next(pieces, None)
    if following is None:
        yield tokenizer(window, verbose=False).input_ids
        return
    first, last = _special_tokens(tokenizer)
    yield first
    position = num_done = 0  # of the window in the text; tokens of it already yielded
    tokens = _encode(window, position, tokenizer)
    while following is not None:
        next_window = window[-OVERLAP:] + following
        next_position = position + len(window) - OVERLAP
        next_tokens = _encode(next_window, next_position, tokenizer)
        met = _meet(tokens, next_tokens)
        if met and met[0] >= num_done:
            yield tokens.ids[num_done : met[0]]
            num_done, tokens = met[1], next_tokens
            window, position = next_window, next_position
        else:
            more = itertools.islice(pieces, len(window) // PIECE)
            window = "".join([window, following, *more])
            tokens = _encode(window, position, tokenizer)
        following = next(pieces, None)
    yield tokens.ids[num_done:]
    yield last


def _cut_anew(texts: Iterable[str]) -> Iterator[str]:
    """Join texts and split them into pieces of `PIECE` characters."""
    joined = ""
    for text in texts:
        joined += text
        whole = len(joined) // PIECE * PIECE
        yield from (joined[i : i + PIECE] for i in range(0, whole, PIECE))
        joined = joined[whole:]
    if joined:
        yield joined


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find the special tokens that the tokenizer adds before and after a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def _encode(text: str, position: int, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    encoded: Any = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return _Tokens(encoded.input_ids, [position + end for _, end in encoded.offset_mapping])


def _meet(before: _Tokens, after: _Tokens) -> tuple[int, int] | None:
    """Find a cut at which two overlapping pieces agree; return its index in each."""
    pairs = list(zip(*after, strict=True))
    start = next((i for i, end in enumerate(before.ends) if end > after.ends[0]), 0)
    stop = next((i for i, pair in enumerate(pairs) if pair[1] > before.ends[-1]), len(pairs))
    places = {pair: i for i, pair in enumerate(pairs[:stop])}
    overlap = list(zip(before.ids[start:], before.ends[start:], strict=True))
    for i in range(len(overlap) - 2 * AGREEMENT + 1):
        j = places.get(overlap[i])
        if j is not None and overlap[i : i + 2 * AGREEMENT] == pairs[j : j + 2 * AGREEMENT]:
            return start + i + AGREEMENT, j + AGREEMENT
    return None
