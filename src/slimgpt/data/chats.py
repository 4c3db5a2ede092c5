"""Chats in the template that a tokenizer has for them."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimgpt.errors import DataError, MissingDependencyError

Messages = Sequence[dict[str, str]]

ASSISTANT = "assistant"

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str, **options: Any
) -> Any:
    """Write a chat in the tokenizer's template.

    Parameters
    ----------
    messages : sequence of dict
        ``role`` and ``content`` of each turn.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    where : str
        Where the chat is from, for messages.
    **options
        Of ``apply_chat_template``.

    Returns
    -------
    str
        The text, or what the options ask for.

    Raises
    ------
    DataError
        If there is no template, or it does not take this chat.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a chat, and the tokenizer has no chat template",
            hint="take the tokenizer of a chat model, or data with a field 'text'",
        )
    apply: Any = tokenizer.apply_chat_template
    try:
        return apply(list(messages), **{"tokenize": False} | options)
    except ImportError as err:
        raise MissingDependencyError("jinja2", "a chat template", "pip install jinja2") from err
    except Exception as err:  # the template is a program of the model's, and raises what it likes
        reason = " ".join(str(err).split())[:200]
        raise DataError(
            f"the tokenizer's chat template does not take {where}: {reason}",
            hint="change the roles of the turns to what the model knows, or leave the chat out",
        ) from err


def chat_tokens(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[bool]]:
    """Tokenise a chat, and say which tokens are the assistant's.

    A template that marks answers (``{% generation %}``) says so itself. Of others, an answer is
    what the template adds to the turns before it and its own opening of an answer; turns that later
    ones change are not taken for answers.

    Parameters
    ----------
    messages, tokenizer, where
        As for `render`.

    Returns
    -------
    list of int, list of bool
        The tokens, and for each whether it is the assistant's.

    Raises
    ------
    DataError
        See `render`.
    """
    if tokenizer.is_fast and _MARKS_ANSWERS.search(str(tokenizer.chat_template)):
        marked = render(
            messages,
            tokenizer,
            where,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return marked["input_ids"], list(map(bool, marked["assistant_masks"]))
    whole = render(messages, tokenizer, where)
    bounds = [0]  # what is not an answer, an answer, and so on in turn
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT and number:
            before = render(messages[:number], tokenizer, where, add_generation_prompt=True)
            after = render(messages[: number + 1], tokenizer, where)
            if whole.startswith(after) and after.startswith(before):
                bounds += [len(before), len(after)]
    bounds.append(len(whole))
    tokens: list[int] = []
    is_answer: list[bool] = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        part = tokenizer(whole[start:end], add_special_tokens=False, verbose=False).input_ids
        tokens += part
        is_answer += [number % 2 == 1] * len(part)
    return tokens, is_answer
