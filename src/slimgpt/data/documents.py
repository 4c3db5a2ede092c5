"""Convert records of data sets to documents: plain text, instructions and chats."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from slimgpt.errors import DataError

log = logging.getLogger(__name__)

Message = dict[str, str]

TEXT, CHAT = "text", ("messages", "conversations")

INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"

FIELDS = (TEXT, *CHAT, INSTRUCTION, INPUT, OUTPUT)

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

LONGEST_DOCUMENT = 2**21  # characters; a longer one is split

MAX_WITHOUT_TEXT = 10**6  # consecutive records

_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Document(NamedTuple):
    """A text, an instruction or a chat.

    Attributes
    ----------
    where : str
        File and line, or data set, for error messages.
    text : str
        The text, or the answer to an instruction.
    prompt : str
        The instruction, in the template of Alpaca; empty for other documents.
    messages : tuple of dict
        ``role`` and ``content`` of each turn of a chat; empty for other documents.
    goes_on : bool
        Whether it continues the previous document.
    """

    where: str
    text: str = ""
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    goes_on: bool = False

    @property
    def num_characters(self) -> int:
        """Length of the content, without a template."""
        turns = sum(len(message["content"]) for message in self.messages)
        return len(self.prompt) + len(self.text) + turns


def instruction_prompt(record: dict[str, Any]) -> str:
    """Format the prompt of an instruction record with the template of Stanford Alpaca."""
    given = f"### Input:\n{record[INPUT]}\n\n" if record.get(INPUT) else ""
    paired = ", paired with an input that provides further context" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{record[INSTRUCTION]}\n\n"
        f"{given}### Response:\n"
    )


def to_documents(
    records: Iterable[tuple[str, Any]], name: str, text_field: str | None = None
) -> Iterator[Document]:
    """Convert records to documents.

    Parameters
    ----------
    records : iterable of (str, Any)
        Origin of each record (for messages) and its value.
    name : str
        Name of the data set.
    text_field : str, optional
        The field with a text or a chat; by default the `FIELDS` are tried in order.

    Yields
    ------
    Document
        One per record, or several for a long one. Records whose text is null are skipped, and a
        warning counts them.

    Raises
    ------
    DataError
        If a record has no such field, or its value has another type or is not valid Unicode.
    """
    num_null = num_in_a_row = 0
    try:
        for where, record in records:
            document = _document(where, record, text_field)
            num_in_a_row = 0 if document and document != Document(where) else num_in_a_row + 1
            if num_in_a_row == MAX_WITHOUT_TEXT:
                raise DataError(
                    f"{MAX_WITHOUT_TEXT} records up to {where} have no text",
                    hint="remove the records without text",
                )
            if document is None:
                num_null += 1
            elif document.messages:
                yield document
            else:
                yield from cut(document, [document.text])
    finally:
        if num_null:
            log.warning("%d records of %s have a null text: skipped", num_null, name)


def cut(document: Document, texts: Iterable[str]) -> Iterator[Document]:
    """Split a long text into documents, preferably at blank lines, else at white space.

    Parameters
    ----------
    document : Document
        The document without its text.
    texts : iterable of str
        The text, in parts.

    Yields
    ------
    Document
        At most `LONGEST_DOCUMENT` characters each; together they are the text.
    """
    rest = ""
    for text in texts:
        rest += text
        while len(rest) > LONGEST_DOCUMENT:
            end = _last_break(rest[:LONGEST_DOCUMENT])
            yield document._replace(text=rest[:end])
            rest = rest[end:]
            document = Document(document.where, goes_on=True)
    yield document._replace(text=rest)


def _last_break(text: str) -> int:
    for blank in ("\n\n", "\n", " "):
        if (place := text.rfind(blank)) >= 0:
            return place + len(blank)
    return len(text)


def _document(where: str, record: Any, text_field: str | None) -> Document | None:
    """Convert a record to a document; None if its text is null."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where} is {_kind(record)}, not an object with a text",
            hint='a record looks like {"text": "…"}',
        )
    names = (text_field,) if text_field else (TEXT, *CHAT)
    chats = () if text_field else CHAT
    present = [name for name in names if name in record]
    for name in present:
        value = record[name]
        if isinstance(value, str) and name not in chats:
            return Document(where, _checked(value, where, name))
        if isinstance(value, list | tuple):
            return Document(where, messages=_messages(value, where, name)) if value else None
    if not text_field and INSTRUCTION in record and OUTPUT in record:
        return _instruction(where, record)
    if not present:
        fields = ", ".join(itertools.islice(map(str, record), 10))[:200] or "no field"
        raise DataError(
            f"{where} has no text field {text_field or TEXT!r}; it has: {_printable(fields)}",
            hint="name the field with --text-field",
        )
    wrong = next((name for name in present if record[name] is not None), None)
    if wrong:
        wanted = "a list of turns" if wrong in chats else "a string"
        raise _wrong_type(where, wrong, record[wrong], wanted)
    return None


def _instruction(where: str, record: dict[str, Any]) -> Document | None:
    parts = {name: record.get(name) for name in (INSTRUCTION, INPUT, OUTPUT)}
    if parts[INSTRUCTION] is None or parts[OUTPUT] is None:
        return None
    texts = {n: _checked(part, where, n) for n, part in parts.items() if part is not None}
    return Document(where, texts[OUTPUT], prompt=instruction_prompt(texts))


def _messages(turns: Any, where: str, name: str) -> tuple[Message, ...]:
    """Read the turns of a chat: role and content, or ShareGPT's from and value."""
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise _wrong_type(where, place, turn, "an object with role and content")
        keys = ("role", "content") if "role" in turn else ("from", "value")
        if missing := [key for key in keys if key not in turn]:
            raise DataError(
                f"{where}: {place} has no {missing[0]!r}",
                hint="a turn has role and content, or from and value",
            )
        role, content = (_checked(turn[key], where, f"{place}.{key}") for key in keys)
        messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
    return tuple(messages)


def _checked(value: Any, where: str, name: str) -> str:
    """Check that a value is a valid Unicode string."""
    if not isinstance(value, str):
        raise _wrong_type(where, name, value)
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise DataError(
            f"{where}: character {err.start + 1} of {name!r} is half of a surrogate pair "
            f"(\\u{ord(value[err.start]):04x}), which is not valid Unicode",
            hint="remove the record, or write its text again as UTF-8",
        ) from None
    return value


def _wrong_type(where: str, name: str, value: Any, wanted: str = "a string") -> DataError:
    return DataError(
        f"{where}: {_printable(repr(name))} is {_kind(value)}, not {wanted}",
        hint="name the field with the text with --text-field",
    )


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
