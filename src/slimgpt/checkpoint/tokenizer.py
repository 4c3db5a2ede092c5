"""Write the tokenizer of a pruned model."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimgpt.errors import ConfigError
from slimgpt.models.source import Source
from slimgpt.models.tokenizer import (
    SENTENCEPIECE_FILE,
    copied_files,
    load_tokenizer,
    tokenizer_files,
)
from slimgpt.runtime.files import read_json


def write_tokenizer(source: Source, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer of a checkpoint, and any processor, to a model made from it.

    The source's own files are copied, because tools read keys that ``save_pretrained`` does not
    write. ``save_pretrained`` is used for a GGUF file, and if the copied files would load as
    another tokenizer (for example because the auto class does not know the model type).

    Parameters
    ----------
    source : Source
        The checkpoint with the tokenizer.
    tokenizer : PreTrainedTokenizerBase
        The loaded tokenizer.
    directory : Path
        Directory of the model, which must contain its ``config.json``.
    """
    files = tokenizer_files(source)
    for name, file in copied_files(source).items():
        shutil.copyfile(file, directory / name)
    if not files or not _loads_as(directory, tokenizer):
        for name in files.keys() - {SENTENCEPIECE_FILE}:
            (directory / name).unlink()
        tokenizer.save_pretrained(directory)
    _make_portable(directory / "tokenizer_config.json")


def _loads_as(directory: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    with contextlib.suppress(ConfigError):
        loaded = load_tokenizer(Source(str(directory), str(directory)))
        return _describe_tokenizer(loaded) == _describe_tokenizer(tokenizer)
    return False


def _describe_tokenizer(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else tokenizer.get_vocab()
    return [vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template]


def _make_portable(file: Path) -> None:
    """Remove the names of remote code, which is not copied, and use those that old versions know.

    These are of a class and a list, which newer versions know too.
    """
    if not file.is_file():
        return
    old = read_json(file)
    values = {key: value for key, value in old.items() if key != "auto_map"}
    if values.get("tokenizer_class") == "TokenizersBackend":
        values = values | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(values.get("extra_special_tokens"), list):
        values = dict(values)
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values != old:
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
