"""Write a model in the format of another engine."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimgpt.config import ExportConfig
from slimgpt.errors import MissingDependencyError, RunStateError
from slimgpt.exporting.formats import FORMATS, Format
from slimgpt.models.source import Source, find_model
from slimgpt.runtime.files import writing
from slimgpt.runtime.locks import writing_alone


@dataclass(frozen=True)
class ExportResult:
    """An exported model.

    Attributes
    ----------
    output : Path
        The written file.
    arch : str
        The format's name for the architecture; for GGUF, the name of llama.cpp's graph.
    num_bytes : int
        Size of the file.
    types : dict of str to int
        How many tensors have each type.
    """

    output: Path
    arch: str
    num_bytes: int
    types: dict[str, int]


def export(model: str, output: str | Path | None = None, **options: Any) -> ExportResult:
    """Write a dense or pruned model in the format of another engine.

    GGUF files are for llama.cpp and tools built on it. If all layers have the same widths, a
    ``Modelfile`` for Ollama is written beside the file, unless one exists.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.
    output : path, optional
        The file to write; must not exist. Default: ``<name>-<type>.gguf`` in the model's directory,
        or in the current directory if the model is not a local directory.
    **options
        The fields of `slimgpt.config.ExportConfig`, for example ``type="q8_0"``.

    Raises
    ------
    SlimGPTError
        If an option or the model is wrong, a package is missing, the file exists, or the engine
        cannot compute the model.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.export("slim", to="gguf", type="q8_0")  # doctest: +SKIP
    """
    config = ExportConfig.create(**options)
    source = find_model(model)
    chosen = FORMATS[config.to]
    for package in chosen.packages:
        if find_spec(package) is None:
            command = f"pip install 'slimgpt[{config.to}]'"
            raise MissingDependencyError(package, f"--to {config.to}", command)
    file = Path(output) if output else _default_output(source, chosen, config)
    _check_new(file)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing_alone(file):
            _check_new(file)  # another process may have written it meanwhile
            arch, types = chosen.write(source, file, config)
    return ExportResult(file, arch, file.stat().st_size, types)


def _check_new(file: Path) -> None:
    if os.path.lexists(file):
        raise RunStateError(f"{file} exists", hint="choose another --output, or remove it first")


def _default_output(source: Source, chosen: Format, config: ExportConfig) -> Path:
    directory = Path(source.name)
    if directory.is_dir():
        return directory / chosen.default_name(directory.resolve().name, config)
    stem = directory.stem if source.gguf_file else directory.name
    return Path(chosen.default_name(stem, config))
