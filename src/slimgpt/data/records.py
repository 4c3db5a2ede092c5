"""Read records and texts of local data files in pieces, in bounded memory."""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from slimgpt.errors import DataError

TEXT_SUFFIXES = (".txt", ".jsonl", ".json")

FILE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")

COMPRESSIONS = (".gz", ".zst")  # after one of the first three

SUFFIXES_HINT = f"known are {', '.join(FILE_SUFFIXES)}; all but the last also with " + " or ".join(
    COMPRESSIONS
)

PIECE = 2**18  # bytes of a text that are read at once

MAX_RECORD = 2**25  # bytes of a line, characters of a JSON value

MAX_ROW_GROUP = 2**30  # bytes of a Parquet row group, decompressed

MAX_NESTED_VALUES = 2**24  # values of a list column in a row group

MAX_BATCH = 1024  # rows of a Parquet file that are read at once

_BLANK = re.compile(r"[ \t\r\n]*")

_DAMAGED_HINT = "the file is damaged, or its suffix is wrong: write it again"


class Record(NamedTuple):
    """A value in a file, and where it is: file and line, or file and number of the record."""

    where: str
    value: Any


def data_suffix(path: Path) -> str | None:
    """Return the suffix that decides how a file is read, without compression; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    known = FILE_SUFFIXES
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        known = TEXT_SUFFIXES
    return suffixes[-1] if suffixes and suffixes[-1] in known else None


def needs_pyarrow(path: Path) -> bool:
    """Whether reading a data file requires the package pyarrow."""
    return path.suffix.lower() in (".parquet", ".zst")


def data_files(directory: Path) -> list[Path]:
    """List the files with a known suffix in a directory tree, sorted, without hidden ones."""
    found = []
    for root, folders, names in os.walk(directory):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        files = (Path(root, name) for name in names if not name.startswith("."))
        found += [file for file in files if data_suffix(file) and file.is_file()]
    return sorted(found)


def read_records(path: Path, fields: Collection[str] = ()) -> Iterator[Record]:
    """Read the records of a .jsonl, .json or .parquet file, one by one.

    A .json file is a list of records, or a sequence of JSON values.

    Parameters
    ----------
    path : Path
        The file.
    fields : collection of str
        Columns of a Parquet file to read, if it has any of them; by default all.

    Raises
    ------
    DataError
        If the file cannot be read, or a record is too large.
    """
    suffix = data_suffix(path)
    if suffix == ".parquet":
        return _parquet_records(path, fields)
    return _lines(path) if suffix == ".jsonl" else _json_records(path)


def read_text(path: Path) -> Iterator[str]:
    r"""Read a UTF-8 text in pieces, without a byte order mark, with newlines as ``\n``.

    Raises
    ------
    DataError
        If the file cannot be read or is not UTF-8.
    """
    decoder: Any = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    num_read, block = 0, b" "
    with _opened(path) as stream:
        while block:
            block = stream.read(PIECE)
            num_read += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as err:
                position = num_read - len(err.object) + err.start
                raise _not_utf8(str(path), position, err) from err
            if text:
                yield text


def _not_utf8(where: str, position: int, err: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where} is not UTF-8: {err.reason} at byte {position}", hint="write the text as UTF-8"
    )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed; errors inside the context name the file."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".gz":
                with gzip.open(file) as unpacked:
                    yield unpacked  # pyright: ignore[reportReturnType]
            elif path.suffix.lower() == ".zst":
                from pyarrow import CompressedInputStream

                yield io.BufferedReader(CompressedInputStream(file, "zstd"))  # pyright: ignore
            else:
                yield file
    except (OSError, EOFError, zlib.error) as err:
        raise DataError(f"cannot read {path}: {err}", hint=_DAMAGED_HINT) from err


def _lines(path: Path) -> Iterator[Record]:
    with _opened(path) as stream:
        line, number = b" ", 0
        while line:
            line, number = stream.readline(MAX_RECORD + 1), number + 1
            where = f"{path}, line {number}"
            if len(line) > MAX_RECORD:
                raise _too_long(where)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                records = [Record(where, json.loads(text))] if text.strip() else []
            except UnicodeDecodeError as err:
                raise _not_utf8(where, err.start, err) from err
            except (ValueError, RecursionError) as err:
                raise DataError(
                    f"cannot read {where}: {_reason(err)}", hint="each line is one JSON object"
                ) from err
            yield from records


def _too_long(where: str) -> DataError:
    return DataError(
        f"{where} is longer than {MAX_RECORD // 2**20} MiB",
        hint="cut the text into several records",
    )


def _reason(err: ValueError | RecursionError) -> str:
    """Explain a JSON error; the caller adds the place."""
    if isinstance(err, json.JSONDecodeError):
        return f"no JSON: {err.msg} at column {err.colno}"
    return "nested too deep" if isinstance(err, RecursionError) else str(err)


def _json_records(path: Path) -> Iterator[Record]:
    text = _JsonText(path)
    is_list = text.next_character() == "["
    if is_list:
        text.skip(1)
    number = 0
    while text.next_character() not in ("", "]" if is_list and not number else ""):
        number += 1
        yield Record(f"{path}, record {number}", text.value())
        if is_list and text.next_character() != ",":
            break
        if is_list:
            text.skip(1)
    if is_list:
        if text.next_character() != "]":
            raise text.error("',' or ']' expected after a record")
        text.skip(1)
        if text.next_character():
            raise text.error("more text after the list")


class _JsonText:
    """A sequence of JSON values, of which at most one is in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.pieces = path, read_text(path)
        self.text, self.position, self.line = "", 0, 1

    def next_character(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            blank: Any = _BLANK.match(self.text, self.position)
            self.skip(blank.end() - self.position)
            if self.position < len(self.text) or not self._read_on():
                return self.text[self.position : self.position + 1]

    def skip(self, num_characters: int) -> None:
        end = self.position + num_characters
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def value(self) -> Any:
        """Parse the value at the current position."""
        decode: Callable[..., tuple[Any, int]] = json.JSONDecoder().raw_decode
        while True:
            try:
                value, end = decode(self.text, self.position)
            except json.JSONDecodeError as err:
                if self._read_on():  # the value may go on
                    continue
                self.skip(err.pos - self.position)
                raise self.error(err.msg) from err
            except (ValueError, RecursionError) as err:
                raise self.error(_reason(err)) from err
            if end < len(self.text) or not self._read_on():  # a number may go on
                self.skip(end - self.position)
                return value

    def error(self, problem: str) -> DataError:
        return DataError(
            f"cannot read {self.path}, line {self.line}: no JSON: {problem}", hint=_DAMAGED_HINT
        )

    def _read_on(self) -> bool:
        """Double the text in memory from the current position on."""
        parts = [self.text[self.position :]]
        before, self.position = len(parts[0]), 0
        if before > MAX_RECORD:
            raise _too_long(f"a record in {self.path}, line {self.line},")
        length = before
        for piece in self.pieces:
            parts.append(piece)
            length += len(piece)
            if length >= 2 * before:
                break
        self.text = "".join(parts)
        return length > before


def _parquet_records(path: Path, fields: Collection[str]) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in fields] or None
            for group in range(file.num_row_groups):
                num_rows = _batch_size(path, file, group, columns)
                for batch in file.iter_batches(num_rows, [group], columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield Record(f"{path}, record {number}", row)
    except (ArrowException, OSError, ValueError, OverflowError) as err:
        where = f"{path}, after record {number}" if number else path
        reason = " ".join(str(err).split())[:200]
        raise DataError(f"cannot read {where}: {reason}", hint=_DAMAGED_HINT) from err


def _batch_size(path: Path, file: Any, group: int, columns: list[str] | None) -> int:
    """Number of rows that stay within the bound of a row group, even at their largest size.

    A value is stored at least once, so no value is larger than its column. But a column can repeat
    a value a billion times in a few bytes.
    """
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    if columns:
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    num_values = max((chunk.num_values for chunk in chunks), default=0)
    if size > MAX_ROW_GROUP or num_values > max(MAX_NESTED_VALUES, metadata.num_rows):
        raise DataError(
            f"row group {group} of {path} has {size / 2**30:.1f} GiB and {num_values} values in a "
            f"column; at most {MAX_ROW_GROUP / 2**30:.0f} GiB and {MAX_NESTED_VALUES} are read",
            hint="write the file with smaller row groups",
        )
    return max(1, min(MAX_BATCH, MAX_ROW_GROUP // max(size, 1)))
