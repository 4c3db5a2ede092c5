"""Render and tokenise chats with the tokenizer's chat template."""

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
    """Render a chat with the tokenizer's chat template.

    Parameters
    ----------
    messages : sequence of dict
        ``role`` and ``content`` of each turn.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    where : str
        Origin of the chat, for error messages.
    **options
        Passed to ``apply_chat_template``.

    Returns
    -------
    str
        The text, or what the options request.

    Raises
    ------
    DataError
        If there is no template, or it rejects this chat.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a chat, and the tokenizer has no chat template",
            hint="use the tokenizer of a chat model, or data with a field 'text'",
        )
    apply: Any = tokenizer.apply_chat_template
    try:
        return apply(list(messages), **{"tokenize": False} | options)
    except ImportError as err:
        raise MissingDependencyError("jinja2", "a chat template", "pip install jinja2") from err
    except Exception as err:  # the template is the model's own code and may raise anything
        reason = " ".join(str(err).split())[:200]
        raise DataError(
            f"the tokenizer's chat template does not take {where}: {reason}",
            hint="use roles that the template supports, or remove the chat",
        ) from err


def chat_tokens(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[bool]]:
    """Tokenise a chat, and mark the assistant's tokens.

    Some templates mark answers themselves (``{% generation %}``). For others, an answer is the text
    that the template adds to the rendered earlier turns and their generation prompt. A turn that is
    rendered differently once later turns follow does not count as an answer.

    Parameters
    ----------
    messages, tokenizer, where
        As for `render`.

    Returns
    -------
    list of int, list of bool
        The tokens, and whether each is the assistant's.

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
    bounds = [0]  # of alternating parts: not an answer, answer, …
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
