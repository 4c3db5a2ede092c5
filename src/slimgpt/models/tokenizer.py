"""Load a checkpoint's tokenizer."""

import json
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from slimgpt.errors import MissingDependencyError, SlimGPTError, UnsupportedModelError
from slimgpt.models.baichuan import read_baichuan
from slimgpt.models.gguf_reading import GGUFContent
from slimgpt.models.loading import gguf_content
from slimgpt.models.pre_tokenizers import PRE_TOKENIZERS
from slimgpt.models.sentencepiece_reading import SENTENCEPIECE_FILE, read_sentencepiece
from slimgpt.models.source import Source, find_file
from slimgpt.models.stored import cannot_load
from slimgpt.runtime.files import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE_FILE,
    "chat_template.jinja",
    "chat_template.json",
)

# Of models that see images.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Raises
    ------
    ConfigError
        If there is none, one of its files is broken, or the hub cannot be reached.
    MissingDependencyError
        If it is a SentencePiece model, and a package to read it is not installed.
    UnsupportedModelError
        If it is a SentencePiece model of Baichuan that cannot be converted.
    """
    content = gguf_content(source)
    try:
        if content:
            # AutoTokenizer would prefer a tokenizer.json beside the file.
            tokenizer = PreTrainedTokenizerFast(
                gguf_file=source.gguf_file, name_or_path=source.location
            )
        elif read_baichuan(source):
            tokenizer = (
                PreTrainedTokenizerFast.from_pretrained(source.location)
                if find_file(source, "tokenizer.json")
                else read_sentencepiece(source)
            )
        else:
            tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
        tokenizer("a")
    except SlimGPTError:
        raise
    except Exception as err:  # tokenizers raises no other class
        _check_tokenizer_files(source)
        raise cannot_load(f"the tokenizer of {source.name}", err) from err
    return _as_in_the_file(tokenizer, content) if content else tokenizer


def tokenizer_files(source: Source) -> dict[str, Path]:
    """Find the files of a tokenizer, by name; empty for a GGUF file."""
    return _find_files(source, TOKENIZER_FILES)


def copied_files(source: Source) -> dict[str, Path]:
    """Find the files that are copied into a result: of the tokenizer, and of the image processor.

    Raises the same errors as `tokenizer_files`.
    """
    return _find_files(source, TOKENIZER_FILES + PROCESSOR_FILES)


def _find_files(source: Source, names: Sequence[str]) -> dict[str, Path]:
    """Find files of a checkpoint that are copied into a result.

    Raises
    ------
    ConfigError
        If the hub cannot be reached.
    UnsupportedModelError
        If one is a link to a file outside the directory, which must not be copied into a result.
    """
    files = {name: file for name in names if (file := find_file(source, name))}
    if source.directory:
        root = source.directory.resolve()
        if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
            root = root.parents[1]  # in the hub's cache, files are links to blobs
        for file in files.values():
            if not file.resolve().is_relative_to(root):
                raise UnsupportedModelError(
                    f"{file} is a link to {file.resolve()}, outside of the model's directory",
                    hint="put a copy of the file in place of the link, if it belongs to the model",
                )
    return files


def _check_tokenizer_files(source: Source) -> None:
    """Find the file or package that prevents a tokenizer from loading."""
    files = tokenizer_files(source)
    for name, file in files.items():
        if name.endswith(".json"):
            read_json(file)
    if SENTENCEPIECE_FILE in files and "tokenizer.json" not in files:
        found = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
        for package, is_there in found.items():
            if not is_there:
                raise MissingDependencyError(
                    package,
                    f"the SentencePiece model {files[SENTENCEPIECE_FILE]}",
                    "pip install 'slimgpt[sentencepiece]' (sentencepiece and protobuf)",
                )


def _as_in_the_file(tokenizer: Any, content: GGUFContent) -> PreTrainedTokenizerFast:
    """Limit a GGUF file's tokenizer to its own tokens, and let it split text as the file says.

    transformers respects only some pre-tokenizer names, and adds tokens of its own. In a file of
    Gemma, each run of spaces is a token of the user's, which is found in the text before anything
    is merged, the longest first; transformers merges its spaces two by two.
    """
    backend: Any = tokenizer.backend_tokenizer
    if max(tokenizer.added_tokens_decoder, default=0) >= content.num_tokens:
        state = json.loads(backend.to_str())
        tokens = state["added_tokens"]
        state["added_tokens"] = [token for token in tokens if token["id"] < content.num_tokens]
        backend = Tokenizer.from_str(json.dumps(state))
    if content.arch == "gemma3":
        runs = takewhile(backend.token_to_id, ("▁" * length for length in count(2)))
        backend.add_tokens([AddedToken(run, normalized=True) for run in runs])
    if known := PRE_TOKENIZERS.get(content.values.get("tokenizer.ggml.pre", "")):
        backend.pre_tokenizer, backend.model.ignore_merges = known
    return PreTrainedTokenizerFast(**tokenizer.init_kwargs | {"tokenizer_object": backend})
