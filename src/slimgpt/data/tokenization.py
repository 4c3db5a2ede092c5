"""Long texts to tokens, piece by piece, with the tokens of the whole."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

PIECE = 2**18  # characters that are tokenised at once: some 50 MB in the tokenizer

OVERLAP = 2**13  # characters that two pieces share

AGREEMENT = 16  # tokens before and after a cut that are the same in both pieces


class _Tokens(NamedTuple):
    """Token ids, each with the position in the text where it ends."""

    ids: list[int]
    ends: list[int]


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Tokenise a text that comes in pieces, as if it were one.

    What is longer than `PIECE` characters is tokenised in overlapping pieces. They are joined in
    the overlap, where both have the same `AGREEMENT` tokens on each side. This assumes that such a
    run of tokens separates what is before it from what is after it, as it does where a tokenizer
    splits text into words first or merges neighbours only. Where the pieces do not agree (a word
    longer than the overlap), they are tokenised as one. A tokenizer without positions, which are
    the slow ones in Python, gets the whole text.

    Parameters
    ----------
    texts : iterable of str
        Parts of the text, of any length.
    tokenizer : PreTrainedTokenizerBase
        The tokenizer; special tokens that it adds stand at the start and the end of the whole.

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
    position = num_done = 0  # of the window in the text; of its tokens
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
    """Join texts and cut them into pieces of `PIECE` characters."""
    joined = ""
    for text in texts:
        joined += text
        whole = len(joined) // PIECE * PIECE
        yield from (joined[i : i + PIECE] for i in range(0, whole, PIECE))
        joined = joined[whole:]
    if joined:
        yield joined


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
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
    """Find where two overlapping pieces have the same tokens: as many of each come before it."""
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
