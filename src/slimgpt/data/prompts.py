"""Prompts to which a model writes the answers."""

import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from slimgpt.data.chats import ASSISTANT, render
from slimgpt.data.datasets import read_documents
from slimgpt.data.documents import Document, Message
from slimgpt.data.records import data_suffix
from slimgpt.errors import DataError

log = logging.getLogger(__name__)

Prompts = list[array]  # token ids of each

MAX_PROMPTS = 100_000  # of which the tokens are in memory

LONGEST_ANSWER = 256  # tokens


def answer_length(seqlen: int) -> int:
    """Most tokens of an answer: at most half a window, so that prompt and answer fit in one."""
    return min(LONGEST_ANSWER, seqlen // 2)


def read_prompts(
    name: str, tokenizer: PreTrainedTokenizerBase, seqlen: int, text_field: str | None = None
) -> Prompts:
    """Read and tokenise prompts.

    A line of a text file is a prompt, and so is the text of a record, an instruction (in the prompt
    of Alpaca) and a chat up to its last turn that is not the assistant's. They are rendered in the
    model's chat template, with the beginning of an answer; without a template, the model
    continues the text.

    Parameters
    ----------
    name : str
        See `check_dataset`; not ``self``. The first `MAX_PROMPTS` prompts are read.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    seqlen : int
        Tokens of a window. Prompts that leave no room for an answer of `answer_length` tokens are
        skipped.
    text_field : str, optional
        Field with the text in local data files; by default ``text``, a chat or an instruction.

    Raises
    ------
    DataError
        If the data cannot be read, or has no prompt that is short enough.
    """
    prompts: Prompts = []
    longest, num_skipped = seqlen - answer_length(seqlen), 0
    documents = _lines(read_documents(name, "calibration", text_field))
    for document in itertools.islice(documents, MAX_PROMPTS):
        tokens = _tokens(document, tokenizer)
        if 0 < len(tokens) <= longest:
            prompts.append(array("q", tokens))
        else:
            num_skipped += 1
    if not prompts:
        raise DataError(
            f"{name} has no prompt of at most {longest} tokens"
            + f"; {num_skipped} are longer" * bool(num_skipped),
            hint="write a prompt on each line, or give a larger --seqlen",
        )
    if num_skipped:
        log.warning("skipped %d prompts with more than %d tokens", num_skipped, longest)
    return prompts


def _lines(documents: Iterable[Document]) -> Iterator[Document]:
    """Split text files into lines, and leave out what is empty."""
    for document in documents:
        if data_suffix(Path(document.where)) == ".txt":
            lines = filter(str.strip, document.text.splitlines())
            yield from (document._replace(text=line) for line in lines)
        elif document.messages or (document.prompt + document.text).strip():
            yield document


def _tokens(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise a prompt, up to where the answer begins."""
    text = document.prompt or document.text
    if document.messages or tokenizer.chat_template:
        turns = _turns(document) if document.messages else [{"role": "user", "content": text}]
        rendered = render(turns, tokenizer, document.where, add_generation_prompt=True)
        return tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
    tokens = tokenizer(text, verbose=False).input_ids
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def _turns(document: Document) -> list[Message]:
    """Turns of a chat without the answers at its end."""
    turns = list(document.messages)
    while turns and turns[-1]["role"] == ASSISTANT:
        turns.pop()
    if not turns:
        raise DataError(
            f"{document.where} has only turns of the assistant",
            hint="give chats with a turn of the user",
        )
    return turns
