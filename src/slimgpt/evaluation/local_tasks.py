"""Load the data of tasks from a local folder."""

import csv
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimgpt.data.records import Record, read_records
from slimgpt.errors import DataError

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")

SPLIT_NAMES = {"validation": {"validation", "valid", "val", "dev"}}

FIELDS_HINT = "a local file has the fields of the hub's data set; its folder is --data-dir"

SUPER_GLUE, MMLU = "aps/super_glue", "cais/mmlu"


def find_split(data_dir: Path, task: str, dataset_name: str | None, split: str) -> Path | None:
    """Find the file with a split of a task's data.

    Parameters
    ----------
    data_dir : Path
        Folder to search, with its subfolders.
    task, dataset_name : str, str or None
        The file's name begins with the words of one or both of these. Case and kind of separator
        are ignored: ``arc_easy_test.jsonl``, ``astronomy_dev.csv``.
    split : str
        The next word of the name; for ``validation`` also valid, val or dev.

    Returns
    -------
    Path or None
        None if there is no such file.

    Raises
    ------
    DataError
        If there is more than one such file.
    """
    names = [name for name in (task, dataset_name) if name]
    prefixes = [_words(name) for name in (*names, "_".join(names))]
    aliases = SPLIT_NAMES.get(split, {split})

    def fits(path: Path) -> bool:
        words = _words(path.stem)
        return path.suffix in SUFFIXES and any(
            words[: len(prefix)] == prefix and not aliases.isdisjoint(words[len(prefix) :][:1])
            for prefix in prefixes
        )

    found = sorted(filter(fits, data_dir.rglob("*")))
    if len(found) > 1:
        raise DataError(
            f"more than one file fits the {split} split of {task}: {found[0]} and {found[1]}",
            hint="give a --data-dir with one of them",
        )
    return found[0] if found else None


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def tested_split(config: dict[str, Any]) -> str:
    """Name of the split on which a task is scored."""
    return config.get("test_split") or config.get("validation_split") or ""


def find_files(
    configs: dict[str, dict[str, Any]], data_dir: Path, required: set[str]
) -> dict[str, dict[str, Path]]:
    """Find the files of the splits that each task needs; only tasks with all splits are listed."""
    files, missing = {}, []
    for task, config in configs.items():
        splits = {tested_split(config)}
        if config.get("num_fewshot"):
            shots = (config.get(key) for key in ("fewshot_split", "training_split"))
            splits.add(next(filter(None, shots), "validation"))
        found = {s: find_split(data_dir, task, config.get("dataset_name"), s) for s in splits}
        if None in found.values():
            missing.append((task, next(split for split, path in found.items() if not path)))
        else:
            files[task] = found
    if missing and (not files or required.intersection(task for task, _ in missing)):
        task, split = missing[0]
        raise DataError(
            f"no {split} split of {task} in {data_dir}",
            hint=f"looked for {task}_{split}*{{{','.join(SUFFIXES)}}}, in subfolders too",
        )
    if missing:
        log.warning(
            "left out, without data in %s: %s", data_dir, ", ".join(task for task, _ in missing)
        )
    return files


def check_answers(task: Any, file: Path) -> None:
    """Check that every question can be formatted, and that each answer is among the choices."""
    is_choice = task.OUTPUT_TYPE == "multiple_choice"
    for number, doc in enumerate(task.eval_docs, 1):
        try:
            text, answer = task.doc_to_text(doc), task.doc_to_target(doc)
            choices = task.doc_to_choice(doc) if is_choice else []
        except Exception as err:  # the task's template fails on the row in its own way
            raise DataError(
                f"{file}: question {number} cannot be put: {' '.join(repr(err).split())[:200]}",
                hint=FIELDS_HINT,
            ) from err
        if is_choice:
            answer = text if task.multiple_input else answer
            for one in answer if isinstance(answer, list) else [answer]:
                known = range(len(choices)) if isinstance(one, int) else choices
                if one not in known:
                    raise DataError(
                        f"{file}: question {number} has the answer {one!r}, "
                        f"none of its {len(choices)}",
                        hint="correct the answer, or leave the question out",
                    )


def local_dataset(files: dict[str, Path], dataset_path: str) -> Any:
    """Read the files of the splits into a `datasets.DatasetDict`."""
    from datasets import Dataset, DatasetDict

    return DatasetDict(
        {split: Dataset.from_list(_read_rows(path, dataset_path)) for split, path in files.items()}
    )


def _read_rows(path: Path, dataset_path: str) -> list[dict[str, Any]]:
    """Read the rows of a file, all with the same fields."""
    rows: list[dict[str, Any]] = []
    if path.suffix == ".csv" and dataset_path != MMLU:
        raise DataError(
            f"{path}: of CSV, which has no types, only the files of MMLU are read",
            hint="write the data as .jsonl",
        )
    for where, record in _mmlu_csv(path) if path.suffix == ".csv" else read_records(path):
        if not isinstance(record, dict):
            raise DataError(f"{where} is a {type(record).__name__}, not a row", hint=FIELDS_HINT)
        row = _as_on_the_hub(where, record, dataset_path)
        if missing := [name for name in (rows[0] if rows else ()) if name not in row]:
            raise DataError(f"{where} lacks the field {missing[0]!r}", hint=FIELDS_HINT)
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as err:
            raise DataError(
                f"{where} has half of a surrogate pair, which is no Unicode text",
                hint="leave the row out, or write its text anew as UTF-8",
            ) from err
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows", hint=FIELDS_HINT)
    return rows


def _mmlu_csv(path: Path) -> Iterator[Record]:
    header: list[str] = ["question", *"ABCD", "answer"]
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, cells in enumerate(filter(None, csv.reader(lines, strict=True)), 1):
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, row {number} has {len(cells)} columns, not {len(header)}",
                        hint=f"the columns are {', '.join(header)}",
                    )
                yield Record(f"{path}, row {number}", dict(zip(header, cells, strict=True)))
    except (OSError, ValueError, csv.Error) as err:
        raise DataError(
            f"cannot read {path}, after row {number}: {err}", hint="write the file as CSV in UTF-8"
        ) from err


def _as_on_the_hub(where: str, row: dict[str, Any], dataset_path: str) -> dict[str, Any]:
    """Convert a record of the original release to the fields of the hub's copy, if they differ."""
    try:
        if dataset_path == SUPER_GLUE and "label" not in row:
            return row | {"label": int(row["answer"])}
        if dataset_path == MMLU and "choices" not in row:
            return {
                "question": row["question"],
                "choices": [row[letter] for letter in "ABCD"],
                "answer": "ABCD".index(row["answer"]),
            }
    except KeyError as err:
        raise DataError(f"{where} lacks the field {err}", hint=FIELDS_HINT) from err
    except (TypeError, ValueError) as err:
        raise DataError(
            f"{where} has the answer {row['answer']!r}, which is none", hint=FIELDS_HINT
        ) from err
    return row
