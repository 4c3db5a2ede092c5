"""Named data sets, local data files, and their documents."""

import itertools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from slimgpt.config import did_you_mean
from slimgpt.data.documents import FIELDS, Document, cut, to_documents
from slimgpt.data.records import (
    FILE_SUFFIXES,
    SUFFIXES_HINT,
    data_files,
    data_suffix,
    needs_pyarrow,
    read_records,
    read_text,
)
from slimgpt.errors import ConfigError, DataError, MissingDependencyError

Purpose = Literal["calibration", "evaluation"]

SELF = "self"

BLANK_LINE = "\n\n"

PYDOCS = "pydocs"

PYDOCS_CALIBRATION = 0.8

LOCAL_HINT = "local alternatives: pydocs, or a file ending in " + ", ".join(FILE_SUFFIXES)


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hugging Face hub.

    Attributes
    ----------
    path : str
        Hub id.
    splits : dict
        The split for each purpose.
    options : dict
        Additional arguments of ``datasets.load_dataset``.
    text_field : str or None
        Field with the text; None for instructions (see `instruction_prompt`).
    separator : str
        Separator of two documents in evaluation, as in published results.
    evaluation_documents : int or None
        Number of documents for evaluation, from the first; None is all.
    """

    path: str
    splits: dict[Purpose, str]
    options: dict[str, Any] = field(default_factory=dict)
    text_field: str | None = "text"
    separator: str = BLANK_LINE
    evaluation_documents: int | None = None


HUB_DATASETS = {
    "c4": HubDataset(
        "allenai/c4",
        {"calibration": "train", "evaluation": "validation"},
        {
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            }
        },
        separator=" ",
        evaluation_documents=1100,
    ),
    "wikitext2": HubDataset(
        "Salesforce/wikitext",
        {"calibration": "train", "evaluation": "test"},
        {"name": "wikitext-2-raw-v1"},
    ),
    "ptb": HubDataset(
        "ptb-text-only/ptb_text_only",
        {"calibration": "train", "evaluation": "test"},
        {"revision": "refs/convert/parquet"},
        text_field="sentence",
        separator=" ",
    ),
    "alpaca": HubDataset("yahma/alpaca-cleaned", {"calibration": "train"}, text_field=None),
    "gpt4-alpaca": HubDataset("vicgalle/alpaca-gpt4", {"calibration": "train"}, text_field=None),
}


def check_dataset(name: str, purpose: Purpose) -> None:
    """Check the name of a data set before any work is done.

    Parameters
    ----------
    name : str
        ``pydocs``, ``self`` (calibration only), a key of `HUB_DATASETS`, a local file, or a
        directory of such files.
    purpose : {"calibration", "evaluation"}
        Purpose of the data.

    Raises
    ------
    ConfigError
        If no data set or file has this name, or both a data set and a directory have it.
    MissingDependencyError
        If a package that reads it (``datasets`` or ``pyarrow``) is not installed.
    """
    hub_names = [key for key, dataset in HUB_DATASETS.items() if purpose in dataset.splits]
    known = [PYDOCS, *hub_names] + ([SELF] if purpose == "calibration" else [])
    files = _local_files(name)
    if name in known:
        if files:
            raise ConfigError(
                f"{name!r} is a data set, and a local directory with data files",
                hint=f"write ./{name} for the directory, or rename it to use the data set",
            )
    elif not files:
        raise _no_dataset(name, purpose, known)
    if name in hub_names and find_spec("datasets") is None:
        raise MissingDependencyError(
            "datasets", f"the data set {name!r}", "pip install 'slimgpt[datasets]'"
        )
    if any(map(needs_pyarrow, files)) and find_spec("pyarrow") is None:
        raise MissingDependencyError(
            "pyarrow", f"the data set {name!r}", "pip install 'slimgpt[datasets]'"
        )


def _no_dataset(name: str, purpose: Purpose, known: list[str]) -> ConfigError:
    if name and os.path.isdir(name):  # unlike Path, accepts names that the system forbids
        return ConfigError(f"the directory {name} has no data files", hint=SUFFIXES_HINT)
    if os.path.lexists(name) and not os.path.isfile(name):
        return ConfigError(
            f"{name} is not a regular file", hint="give a file, or a directory of files"
        )
    if os.path.isfile(name):
        return ConfigError(
            f"the suffix {Path(name).suffix!r} of the data file {name} is not known",
            hint=SUFFIXES_HINT,
        )
    if data_suffix(Path(name)):
        return ConfigError(f"no data file {name}", hint="correct the path")
    return ConfigError(
        f"unknown {purpose} data set {name!r}",
        hint=f"{did_you_mean(name, known)}, or a local directory or file {'/'.join(FILE_SUFFIXES)}",
    )


def dataset_files(name: str) -> list[Path]:
    """List the local files of a data set, sorted; empty for named data sets."""
    return [] if name in (PYDOCS, SELF, *HUB_DATASETS) else _local_files(name)


def are_same_files(name: str, other: str) -> bool:
    """Whether two names stand for the same local files."""
    files, others = ([file.resolve() for file in dataset_files(n)] for n in (name, other))
    return bool(files) and files == others


def _local_files(name: str) -> list[Path]:
    if name and os.path.isdir(name):
        return data_files(Path(name))
    return [Path(name)] if os.path.isfile(name) and data_suffix(Path(name)) else []


def describe_dataset(name: str, purpose: Purpose) -> str:
    """Describe a data set in a few words, for reports."""
    if name == PYDOCS:
        part = "first 80 %" if purpose == "calibration" else "last 20 %"
        return f"pydocs ({part}, Python {platform.python_version()})"
    if name in HUB_DATASETS:
        return f"{name} ({HUB_DATASETS[name].path}, {HUB_DATASETS[name].splits[purpose]})"
    if name != SELF and os.path.isdir(name):
        return f"{Path(name).resolve().name} ({len(data_files(Path(name)))} files)"
    return name if name == SELF else Path(name).name


def short_name(description: str) -> str:
    """Strip the source from a description by `describe_dataset`."""
    return description.partition(" (")[0]


def read_documents(name: str, purpose: Purpose, text_field: str | None) -> Iterator[Document]:
    """Read the documents of a data set; for names see `check_dataset`."""
    if name == PYDOCS:
        return iter([Document(name, _pydocs(purpose))])
    if name not in HUB_DATASETS:
        return _local_documents(name, text_field)
    dataset = HUB_DATASETS[name]
    records = _hub_records(name, dataset, dataset.splits[purpose])
    if purpose == "evaluation":
        records = itertools.islice(records, dataset.evaluation_documents)
    return to_documents(records, name, dataset.text_field)


def _hub_records(name: str, dataset: HubDataset, split: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        records = load_dataset(dataset.path, split=split, streaming=True, **dataset.options)
        for number, record in enumerate(records, 1):
            yield f"{name}, record {number}", record
    except Exception as err:  # whatever the cause, the data set cannot be read
        reason = " ".join(str(err).split())[:200]
        raise DataError(
            f"cannot read {name} ({dataset.path}) from the hub: {reason}", hint=LOCAL_HINT
        ) from err


def _pydocs(purpose: Purpose) -> str:
    """Return the documentation of the Python language, from the standard library."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    cut = text.index("\n\n", int(len(text) * PYDOCS_CALIBRATION))
    return text[:cut] if purpose == "calibration" else text[cut:]


def _local_documents(name: str, text_field: str | None) -> Iterator[Document]:
    files = _local_files(name)
    if not files:
        raise DataError(f"there is no data file {name}", hint=SUFFIXES_HINT)
    fields = [text_field] if text_field else FIELDS
    for is_text, paths in itertools.groupby(files, lambda path: data_suffix(path) == ".txt"):
        if is_text:
            for path in paths:
                yield from cut(Document(str(path)), read_text(path))
        else:
            records = (record for path in paths for record in read_records(path, fields))
            yield from to_documents(records, name, text_field)
