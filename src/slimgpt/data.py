"""Text for calibration, evaluation and training, from data sets and local files to tokens."""

import itertools
import json
import logging
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimgpt.config import did_you_mean
from slimgpt.errors import ConfigError, DataError, MissingDependencyError

log = logging.getLogger(__name__)

Purpose = Literal["calibration", "evaluation"]
Document = tuple[str, str]  # a prompt, empty for plain text, and what follows it

SELF = "self"
TEXT_LENGTH, TEXTS_AT_ONCE = 128, 128  # tokens of a text that the model writes
IGNORED = -100  # the label of a token that is not trained on, as in PyTorch
BLANK_LINE = "\n\n"
PYDOCS = "pydocs"
PYDOCS_CALIBRATION = 0.8
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
LOCAL_HINT = "local alternatives: pydocs, or a file ending in " + ", ".join(FILE_SUFFIXES)


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hugging Face hub.

    Attributes
    ----------
    path : str
        Its id.
    splits : dict
        The split for each purpose.
    options : dict
        Further arguments of ``datasets.load_dataset``.
    text_field : str or None
        Field of the text; None for instructions (see `instruction_prompt`).
    separator : str
        What stands between two documents for evaluation, as published results have it.
    evaluation_documents : int or None
        Documents that count for evaluation, from the first; None is all.
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
    """Check a data set's name before any work is done.

    Parameters
    ----------
    name : str
        ``pydocs``, ``self`` (calibration only), a key of `HUB_DATASETS` or a local file.
    purpose : {"calibration", "evaluation"}
        What it is for.

    Raises
    ------
    ConfigError
        If there is no such data set or file.
    MissingDependencyError
        If reading it needs the package ``datasets`` and that is not installed.
    """
    path = Path(name)
    hub_names = [key for key, dataset in HUB_DATASETS.items() if purpose in dataset.splits]
    if path.suffix in FILE_SUFFIXES:
        if not path.is_file():
            raise ConfigError(f"no data file {name}")
        needed = path.suffix == ".parquet"
    else:
        known = [PYDOCS, *hub_names] + ([SELF] if purpose == "calibration" else [])
        if name not in known:
            raise ConfigError(
                f"unknown {purpose} data set {name!r}",
                hint=f"{did_you_mean(name, known)}, or a local file {'/'.join(FILE_SUFFIXES)}",
            )
        needed = name in hub_names
    if needed and find_spec("datasets") is None:
        raise MissingDependencyError(
            "datasets", f"the data set {name!r}", "pip install 'slimgpt[datasets]'"
        )


def describe_dataset(name: str, purpose: Purpose) -> str:
    """Say in a few words what text a data set's name stands for, for reports."""
    if name == PYDOCS:
        part = "first 80 %" if purpose == "calibration" else "last 20 %"
        return f"pydocs ({part}, Python {platform.python_version()})"
    if name in HUB_DATASETS:
        return f"{name} ({HUB_DATASETS[name].path}, {HUB_DATASETS[name].splits[purpose]})"
    return name if name == SELF else Path(name).name


def short_name(description: str) -> str:
    """What `describe_dataset` says, without the source."""
    return description.partition(" (")[0]


def calibration_tokens(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int = 0,
    text_field: str | None = None,
) -> Tensor:
    """Draw calibration samples.

    Documents are shuffled and joined until there are enough tokens; the text is cut into windows
    that do not overlap, of which `nsamples` are chosen at random.

    Parameters
    ----------
    name : str
        See `check_dataset`; not ``self``.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    nsamples, seqlen : int
        Number of samples and tokens of each.
    seed : int
        Seed of both random choices.
    text_field : str, optional
        Field of the text in local data files; by default ``text``, or an instruction record.

    Returns
    -------
    Tensor
        int64, (nsamples, seqlen).

    Raises
    ------
    DataError
        If the data cannot be read or has too few tokens.
    """
    tokens: list[int] = []
    needed = nsamples * seqlen
    documents = filter(str.strip, map("".join, _documents(name, "calibration", text_field)))
    for text in _shuffled(documents, seed):
        tokens += _tokenize(text + BLANK_LINE, tokenizer)
        if len(tokens) >= needed:
            break
    num_windows = len(tokens) // seqlen
    if num_windows < nsamples:
        raise DataError(
            f"{name} has {len(tokens)} tokens, {num_windows} samples of {seqlen}, but "
            f"{nsamples} samples need {needed} tokens",
            hint="give a longer text, fewer --nsamples or a smaller --seqlen",
        )
    windows = torch.tensor(tokens[: num_windows * seqlen]).view(num_windows, seqlen)
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(num_windows, generator=generator)[:nsamples]]


def evaluation_tokens(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    text_field: str | None = None,
) -> Tensor:
    """Tokens of an evaluation text: all documents joined and tokenised as one.

    Blank lines join documents, in C4 and PTB spaces. Where the tokenizer adds a BOS token, it
    stands once, at the start.

    Parameters
    ----------
    name : str
        See `check_dataset`.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    max_tokens : int, optional
        Keep this many tokens from the start.
    text_field : str, optional
        Field of the text in local data files; by default ``text``, or an instruction record.

    Returns
    -------
    Tensor
        int64, (tokens,).

    Raises
    ------
    DataError
        If the data cannot be read.
    """
    separator = HUB_DATASETS[name].separator if name in HUB_DATASETS else BLANK_LINE
    text = separator.join(map("".join, _documents(name, "evaluation", text_field)))
    return torch.tensor(_tokenize(text, tokenizer)[:max_tokens], dtype=torch.long)


@torch.no_grad()
def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int = 0,
) -> Tensor:
    """Let the dense model write its own calibration samples, at temperature 1.

    It writes many short texts at once, which takes hardly more time than one, and they are joined
    and cut into samples.

    Parameters
    ----------
    model, tokenizer
        The model and its tokenizer, which must name a token to begin with (BOS, else EOS).
    nsamples, seqlen, seed : int
        Number of samples, tokens of each, seed.

    Returns
    -------
    Tensor
        int64, (nsamples, seqlen), on the CPU.

    Raises
    ------
    DataError
        If the tokenizer has neither BOS nor EOS.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError("the tokenizer has neither BOS nor EOS, so the model cannot start a text")
    needed, length = nsamples * seqlen, min(TEXT_LENGTH, seqlen)
    prompts = torch.tensor([[first]] * -(-needed // length))
    generate: Any = model.generate
    texts = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for prompt in prompts.to(model.device).split(TEXTS_AT_ONCE):
            log.info("sampling from the model: text %d of %d", len(texts), len(prompts))
            texts += generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                repetition_penalty=1.0,
                logits_processor=LogitsProcessorList([_Draw()]),
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
            ).cpu()
    return torch.cat(texts)[:needed].view(nsamples, seqlen)


class _Draw(LogitsProcessor):
    """Draw the next token, and leave it as the only one.

    One random number a text; sampling in `generate` takes one a token of the vocabulary, which on
    a CPU costs as much as a small model.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        upto = scores.float().softmax(dim=-1).cumsum(dim=-1)
        # In (0, 1], so that what has no probability is never the first to reach it.
        number = upto[:, -1:] * (1 - torch.rand(len(upto), 1, device=upto.device))
        drawn = torch.searchsorted(upto, number)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0)


def training_examples(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    max_examples: int | None = None,
    text_field: str | None = None,
) -> list[dict[str, list[int]]]:
    """Tokenise examples to train on.

    An instruction becomes one example: the prompt of Alpaca, the answer and, where it fits, an
    EOS token; the labels are those of the answer. Plain text is joined and cut into windows that
    do not overlap, every token of which is a label.

    Parameters
    ----------
    name : str
        See `check_dataset`; not ``self``.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    seqlen : int
        Tokens of a window, and the most of an instruction; what is longer is cut off.
    max_examples : int, optional
        Stop after this many.
    text_field : str, optional
        Field of the text in local data files; by default ``text``, or an instruction record.

    Returns
    -------
    list of dict
        ``input_ids`` and ``labels``, of equal length; the labels are `IGNORED` in the prompt.
        Instructions whose prompt alone fills `seqlen` tokens are left out.

    Raises
    ------
    DataError
        If the data cannot be read or has not one example.
    """
    examples: list[dict[str, list[int]]] = []
    text: list[int] = []
    num_dropped = 0
    eos_token: Any = tokenizer.eos_token_id
    for prompt, answer in _documents(name, "calibration", text_field):
        if prompt:
            tokens = _tokenize(prompt + answer, tokenizer)
            if eos_token is not None:
                tokens.append(eos_token)
            start = len(_tokenize(prompt, tokenizer))
            labels = [IGNORED] * start + tokens[start:]
            if start < min(seqlen, len(tokens)):
                examples.append({"input_ids": tokens[:seqlen], "labels": labels[:seqlen]})
            else:
                num_dropped += 1
        else:
            text += _tokenize(answer + BLANK_LINE, tokenizer)
            num_whole = len(text) // seqlen * seqlen
            windows = [text[i : i + seqlen] for i in range(0, num_whole, seqlen)]
            examples += [{"input_ids": window, "labels": window} for window in windows]
            text = text[num_whole:]
        if max_examples and len(examples) >= max_examples:
            break
    if num_dropped:
        log.warning("%d prompts of %s leave no room for an answer: left out", num_dropped, name)
    if not examples:
        raise DataError(
            f"{name} has not one example of {seqlen} tokens",
            hint="give a longer text or a smaller --seqlen",
        )
    return examples[:max_examples]


def instruction_prompt(record: dict[str, Any]) -> str:
    """Prompt of an instruction record, in the template of Stanford Alpaca."""
    given = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
    paired = ", paired with an input that provides further context" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{record['instruction']}\n\n"
        f"{given}### Response:\n"
    )


def _documents(name: str, purpose: Purpose, text_field: str | None) -> Iterator[Document]:
    if Path(name).suffix in FILE_SUFFIXES:
        return _file_documents(Path(name), text_field)
    if name == PYDOCS:
        return iter([("", _pydocs(purpose))])
    dataset = HUB_DATASETS[name]
    documents = _hub_documents(name, dataset, dataset.splits[purpose])
    return (
        documents
        if purpose == "calibration"
        else itertools.islice(documents, dataset.evaluation_documents)
    )


def _hub_documents(name: str, dataset: HubDataset, split: str) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        for record in load_dataset(dataset.path, split=split, streaming=True, **dataset.options):
            if dataset.text_field:
                yield "", record[dataset.text_field]
            else:
                yield instruction_prompt(record), record["output"]
    except Exception as err:  # whatever went wrong on the way, the data set cannot be read
        reason = " ".join(str(err).split())[:200]
        raise DataError(
            f"cannot read {name} ({dataset.path}) from the hub: {reason}", hint=LOCAL_HINT
        ) from err


def _pydocs(purpose: Purpose) -> str:
    """Python's documentation of its own language, from the standard library."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    cut = text.index("\n\n", int(len(text) * PYDOCS_CALIBRATION))
    return text[:cut] if purpose == "calibration" else text[cut:]


def _file_documents(path: Path, text_field: str | None) -> Iterator[Document]:
    if path.suffix == ".txt":
        with _reading(path):
            yield "", path.read_text(encoding="utf-8")
        return
    for index, record in enumerate(read_records(path)):
        yield _record_document(record, text_field, f"{path}, record {index}")


def read_records(path: Path) -> Iterator[Any]:
    """Read the records of a local file ending in .jsonl, .json or .parquet, one by one.

    Raises
    ------
    DataError
        If it cannot be read, or a JSON file is not a list.
    """
    with _reading(path):
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        elif path.suffix == ".json":
            records = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(records, list):
                raise DataError(f"{path} is not a JSON list of records")
            yield from records
        else:
            from pyarrow.parquet import ParquetFile

            for batch in ParquetFile(path).iter_batches():
                yield from batch.to_pylist()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as err:  # of JSON, UTF-8 and Parquet, too
        raise DataError(f"cannot read {path}: {err}") from err


def _record_document(record: Any, text_field: str | None, where: str) -> Document:
    if isinstance(record, dict):
        text = record.get(text_field or "text")
        if isinstance(text, str):
            return "", text
        parts = (record.get("instruction"), record.get("output"))
        if text_field is None and all(isinstance(part, str) for part in parts):
            return instruction_prompt(record), record["output"]
    fields = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
    raise DataError(
        f"{where} has no text field {text_field or 'text'!r}; it has: {fields}",
        hint="name the field with --text-field",
    )


def _shuffled(documents: Iterator[str], seed: int, buffer_size: int = 10_000) -> Iterator[str]:
    """Shuffle a stream, a buffer at a time."""
    generator = random.Random(seed)
    while batch := list(itertools.islice(documents, buffer_size)):
        generator.shuffle(batch)
        yield from batch


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, verbose=False).input_ids
