"""Text for calibration, evaluation and training, from data sets and local files to tokens."""

import itertools
import logging
import os
import platform
import random
from array import array
from collections.abc import Iterable, Iterator
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

from slimgpt.chats import chat_tokens, render
from slimgpt.config import did_you_mean
from slimgpt.documents import FIELDS, Document, cut, to_documents
from slimgpt.errors import ConfigError, DataError, MissingDependencyError, NumericalError
from slimgpt.records import (
    FILE_SUFFIXES,
    SUFFIXES_HINT,
    data_files,
    data_suffix,
    needs_pyarrow,
    read_records,
    read_text,
)
from slimgpt.tokens import tokenize

log = logging.getLogger(__name__)

Purpose = Literal["calibration", "evaluation"]
Example = dict[str, list[int]]

SELF = "self"
TEXT_LENGTH, TEXTS_AT_ONCE = 128, 128  # tokens of a text that the model writes
IGNORED = -100  # the label of a token that is not trained on, as in PyTorch
BLANK_LINE = "\n\n"
PYDOCS = "pydocs"
PYDOCS_CALIBRATION = 0.8
MAX_TOKENS = 2**28  # of a text or of all samples: 2 GiB
SHUFFLED_DOCUMENTS, SHUFFLED_CHARACTERS = 10_000, 2**25  # in memory at once
# Memory to read and tokenise local files or the hub, at most: the texts that are shuffled, at 4
# bytes a character, a record of the largest size while it is parsed, and a piece in the tokenizer.
READING_BYTES = 2**29
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
        ``pydocs``, ``self`` (calibration only), a key of `HUB_DATASETS`, a local file, or a
        directory of such files.
    purpose : {"calibration", "evaluation"}
        What it is for.

    Raises
    ------
    ConfigError
        If there is no such data set or file, or both.
    MissingDependencyError
        If reading it needs the package ``datasets`` and that is not installed.
    """
    hub_names = [key for key, dataset in HUB_DATASETS.items() if purpose in dataset.splits]
    known = [PYDOCS, *hub_names] + ([SELF] if purpose == "calibration" else [])
    files = _local_files(name)
    if name in known:
        if files:
            raise ConfigError(
                f"{name!r} is a data set, and a local directory with data files",
                hint=f"write ./{name} for the directory, or rename it to have the data set",
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
    if name and os.path.isdir(name):  # unlike Path, takes names that the system cannot have
        return ConfigError(f"the directory {name} has no data files", hint=SUFFIXES_HINT)
    if os.path.lexists(name) and not os.path.isfile(name):
        return ConfigError(f"{name} is no file", hint="give a file, or a directory of files")
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
    """List the files that a data set's name stands for, sorted; none if it is not local."""
    return [] if name in (PYDOCS, SELF, *HUB_DATASETS) else _local_files(name)


def _local_files(name: str) -> list[Path]:
    if name and os.path.isdir(name):
        return data_files(Path(name))
    return [Path(name)] if os.path.isfile(name) and data_suffix(Path(name)) else []


def describe_dataset(name: str, purpose: Purpose) -> str:
    """Say in a few words what text a data set's name stands for, for reports."""
    if name == PYDOCS:
        part = "first 80 %" if purpose == "calibration" else "last 20 %"
        return f"pydocs ({part}, Python {platform.python_version()})"
    if name in HUB_DATASETS:
        return f"{name} ({HUB_DATASETS[name].path}, {HUB_DATASETS[name].splits[purpose]})"
    if name != SELF and os.path.isdir(name):
        return f"{Path(name).resolve().name} ({len(data_files(Path(name)))} files)"
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
    that do not overlap, of which `nsamples` are chosen at random. Chats are in the model's own
    template. No more than `SHUFFLED_DOCUMENTS` and about `SHUFFLED_CHARACTERS` are shuffled at
    once, and a document beyond `slimgpt.documents.LONGEST_DOCUMENT` characters counts as several.

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
        If the data cannot be read or has too few tokens, or more than `MAX_TOKENS` are asked for.
    """
    needed = _tokens_needed(nsamples, seqlen)
    documents = _documents(name, "calibration", text_field)
    texts = filter(str.strip, (_text(document, tokenizer) for document in documents))
    tokens = array("q")
    for text in _shuffled(texts, seed):
        for some in tokenize([text, BLANK_LINE], tokenizer):
            tokens.extend(some)
        if len(tokens) >= needed:
            break
    num_windows = len(tokens) // seqlen
    if num_windows < nsamples:
        raise DataError(
            f"{name} has {len(tokens)} tokens, {num_windows} samples of {seqlen}, but "
            f"{nsamples} samples need {needed} tokens",
            hint="give a longer text, fewer --nsamples or a smaller --seqlen",
        )
    windows = torch.frombuffer(tokens, dtype=torch.int64)[: num_windows * seqlen]
    windows = windows.view(num_windows, seqlen)
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
    stands once, at the start. The text is read and tokenised piece by piece, no further than
    `max_tokens` (see `slimgpt.tokens.tokenize`). Chats are in the model's own template.

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
        If the data cannot be read, or has more than `MAX_TOKENS` where all are to be kept.
    """
    separator = HUB_DATASETS[name].separator if name in HUB_DATASETS else BLANK_LINE
    documents = _documents(name, "evaluation", text_field)
    tokens = array("q")
    for some in tokenize(_joined(documents, separator, tokenizer), tokenizer):
        tokens.extend(some)
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
        if len(tokens) > MAX_TOKENS:
            raise DataError(f"{name} has more than {MAX_TOKENS} tokens", hint="give --max-tokens")
    return torch.tensor(tokens[: min(len(tokens), max_tokens or MAX_TOKENS)], dtype=torch.long)


def _joined(
    documents: Iterable[Document], separator: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    for number, document in enumerate(documents):
        if number and not document.goes_on:
            yield separator
        yield _text(document, tokenizer)


def _tokens_needed(nsamples: int, seqlen: int) -> int:
    if nsamples * seqlen > MAX_TOKENS:
        raise DataError(
            f"{nsamples} samples of {seqlen} tokens are {nsamples * seqlen} tokens; at most "
            f"{MAX_TOKENS} can be used",
            hint="give fewer --nsamples or a smaller --seqlen",
        )
    return nsamples * seqlen


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
        If the tokenizer has neither BOS nor EOS, or more than `MAX_TOKENS` are asked for.
    NumericalError
        If the model's probabilities are not finite.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError(
            "the tokenizer has neither BOS nor EOS, so the model cannot start a text",
            hint="name texts for --calibration, without self",
        )
    needed, length = _tokens_needed(nsamples, seqlen), min(TEXT_LENGTH, seqlen)
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
        if not upto[:, -1].isfinite().all():
            raise NumericalError(
                f"the logits of token {input_ids.shape[-1] + 1} of a text that the model writes "
                f"are not finite in {str(scores.dtype).removeprefix('torch.')}",
                hint="give --dtype float32; if that does not help, the weights are broken",
            )
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
) -> list[Example]:
    """Tokenise examples to train on.

    An instruction becomes one example: the prompt of Alpaca, the answer and, where it fits, an
    EOS token; the labels are those of the answer. A chat becomes one in the model's template; the
    labels are those of the assistant's turns. Plain text is joined and cut into windows that do
    not overlap, every token of which is a label.

    Parameters
    ----------
    name : str
        See `check_dataset`; not ``self``.
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    seqlen : int
        Tokens of a window, and the most of an instruction or chat; what is longer is cut off.
    max_examples : int, optional
        Stop after this many.
    text_field : str, optional
        Field of the text in local data files; by default ``text``, a chat or an instruction.

    Returns
    -------
    list of dict
        ``input_ids`` and ``labels``, of equal length; the labels are `IGNORED` in what is not to
        be learned. Examples without a label in their first `seqlen` tokens are left out.

    Raises
    ------
    DataError
        If the data cannot be read or has not one example.
    """
    examples: list[Example] = []
    num_dropped = 0
    documents = _documents(name, "calibration", text_field)
    for example in _examples(documents, tokenizer, seqlen):
        if example:
            examples.append(example)
        else:
            num_dropped += 1
        if len(examples) == max_examples:
            break
    if num_dropped:
        log.warning("%d prompts of %s leave no room for an answer: left out", num_dropped, name)
    if not examples:
        raise DataError(
            f"{name} has not one example of {seqlen} tokens",
            hint="give a longer text or a smaller --seqlen",
        )
    return examples


def _examples(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, seqlen: int
) -> Iterator[Example | None]:
    """Give the examples of documents; None for one without a label."""
    text: list[int] = []
    for document in documents:
        if document.prompt or document.messages:
            tokens, labels = _tokens_and_labels(document, tokenizer)
            is_useful = any(label != IGNORED for label in labels[:seqlen])
            yield {"input_ids": tokens[:seqlen], "labels": labels[:seqlen]} if is_useful else None
        else:
            for some in tokenize([document.text, BLANK_LINE], tokenizer):
                text += some
                num_whole = len(text) // seqlen * seqlen
                for start in range(0, num_whole, seqlen):
                    window = text[start : start + seqlen]
                    yield {"input_ids": window, "labels": window}
                text = text[num_whole:]


def _tokens_and_labels(
    document: Document, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    if document.messages:
        tokens, is_answer = chat_tokens(document.messages, tokenizer, document.where)
        pairs = zip(tokens, is_answer, strict=True)
        return tokens, [token if learned else IGNORED for token, learned in pairs]
    eos_token: Any = tokenizer.eos_token_id
    tokens = tokenizer(document.prompt + document.text, verbose=False).input_ids
    if eos_token is not None:
        tokens.append(eos_token)
    start = len(tokenizer(document.prompt, verbose=False).input_ids)
    return tokens, [IGNORED] * start + tokens[start:]


def _text(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a document as one text, without a BOS token, which the tokenizer adds."""
    if not document.messages:
        return document.prompt + document.text
    text = render(document.messages, tokenizer, document.where)
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return text.removeprefix(str(bos)) if adds_bos else text


def _documents(name: str, purpose: Purpose, text_field: str | None) -> Iterator[Document]:
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


def _shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    """Shuffle a stream, a buffer at a time."""
    generator = random.Random(seed)
    while batch := list(_buffer(texts)):
        generator.shuffle(batch)
        yield from batch


def _buffer(texts: Iterator[str]) -> Iterator[str]:
    """Take as many texts as are shuffled at once."""
    num_characters = 0
    for text in itertools.islice(texts, SHUFFLED_DOCUMENTS):
        yield text
        num_characters += len(text)
        if num_characters >= SHUFFLED_CHARACTERS:
            return
