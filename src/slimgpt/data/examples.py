"""Training examples, and windows of text, with the tokens that are learned."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimgpt.data.chats import chat_tokens
from slimgpt.data.datasets import BLANK_LINE, read_documents
from slimgpt.data.documents import Document
from slimgpt.data.samples import (
    Parts,
    SampleOptions,
    Windows,
    draw_windows,
    shuffled_documents,
    whole,
)
from slimgpt.data.tokenization import tokenize
from slimgpt.errors import DataError

log = logging.getLogger(__name__)

Example = dict[str, list[int]]

IGNORED = -100  # label of a token that is not trained on, as in PyTorch


def training_examples(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    max_examples: int | None = None,
    text_field: str | None = None,
) -> list[Example]:
    """Tokenise training examples.

    An instruction becomes one example: the prompt of Alpaca, the answer and, if it fits, an
    EOS token; only the answer has labels. A chat is rendered in the model's template; only the
    assistant's turns have labels. Plain text is joined and cut into non-overlapping windows, in
    which every token has a label.

    Parameters
    ----------
    name : str
        See `check_dataset`; not ``self``.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    seqlen : int
        Tokens in a window, and maximum length of an instruction or chat; the rest is cut off.
    max_examples : int, optional
        Stop after this many.
    text_field : str, optional
        Field with the text in local data files; by default ``text``, a chat or an instruction.

    Returns
    -------
    list of dict
        ``input_ids`` and ``labels``, of equal length; tokens that are not trained on have the
        label `IGNORED`. Examples without a label in their first `seqlen` tokens are skipped.

    Raises
    ------
    DataError
        If the data cannot be read or yields no example.
    """
    examples: list[Example] = []
    num_dropped = 0
    documents = read_documents(name, "calibration", text_field)
    for example in _examples(documents, tokenizer, seqlen):
        if example:
            examples.append(example)
        else:
            num_dropped += 1
        if len(examples) == max_examples:
            break
    if num_dropped:
        log.warning(
            "skipped %d examples of %s: their prompts leave no room for an answer",
            num_dropped,
            name,
        )
    if not examples:
        raise DataError(
            f"{name} has not one example of {seqlen} tokens",
            hint="give a longer text or a smaller --seqlen",
        )
    return examples


def _examples(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, seqlen: int
) -> Iterator[Example | None]:
    """Yield the examples of documents; None for one without labels."""
    text: list[int] = []
    for document in documents:
        if document.prompt or document.messages:
            tokens, is_learned = _answers(document, tokenizer)
            labels = _labels(tokens[:seqlen], is_learned[:seqlen])
            is_useful = any(is_learned[:seqlen])
            yield {"input_ids": tokens[:seqlen], "labels": labels} if is_useful else None
        else:
            for some in tokenize([document.text, BLANK_LINE], tokenizer):
                text += some
                num_whole = len(text) // seqlen * seqlen
                for start in range(0, num_whole, seqlen):
                    window = text[start : start + seqlen]
                    yield {"input_ids": window, "labels": window}
                text = text[num_whole:]


def training_windows(
    name: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions
) -> Windows:
    """Draw windows of text to train on, like `slimgpt.data.samples.calibration_tokens`.

    Of chats and instructions only the answers are learned, and each ends as in
    `training_examples`; of plain text every token is learned.

    Parameters
    ----------
    name : str
        See `check_dataset`; not ``self``.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    options : SampleOptions
        What is drawn.

    Raises
    ------
    DataError
        If the data cannot be read or has too few tokens.
    """
    return draw_windows(training_texts(name, tokenizer, options), name, options)


def training_texts(
    name: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions
) -> Iterator[Parts]:
    """Tokenise the shuffled texts from which `training_windows` are cut."""
    for document in shuffled_documents(name, options):
        if document.prompt or document.messages:
            yield [_answers(document, tokenizer)]
        else:
            yield whole([document.text, BLANK_LINE], tokenizer)


def _answers(
    document: Document, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokenise a chat or an instruction, and mark the tokens of the answers."""
    if document.messages:
        return chat_tokens(document.messages, tokenizer, document.where)
    eos_token: Any = tokenizer.eos_token_id
    tokens = tokenizer(document.prompt + document.text, verbose=False).input_ids
    if eos_token is not None:
        tokens.append(eos_token)
    start = len(tokenizer(document.prompt, verbose=False).input_ids)
    return tokens, [index >= start for index in range(len(tokens))]


def _labels(tokens: list[int], is_learned: list[bool]) -> list[int]:
    pairs = zip(tokens, is_learned, strict=True)
    return [token if learned else IGNORED for token, learned in pairs]
