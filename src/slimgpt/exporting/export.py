"""Write a model in the format of another engine."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimgpt.config import ExportConfig
from slimgpt.errors import MissingDependencyError, RunStateError
from slimgpt.exporting.ollama import write_modelfile
from slimgpt.models.loading import load_config, load_generation_config
from slimgpt.models.source import Source, find_model
from slimgpt.runtime.files import replacing, writing
from slimgpt.runtime.locks import writing_alone


@dataclass(frozen=True)
class ExportResult:
    """An exported model.

    Attributes
    ----------
    output : Path
        The file.
    arch : str
        llama.cpp's name of the graph that computes it.
    num_bytes : int
        Size of the file.
    """

    output: Path
    arch: str
    num_bytes: int


def export(model: str, output: str | Path | None = None, **options: Any) -> ExportResult:
    """Write a dense or pruned model as a GGUF file, for llama.cpp and what is built on it.

    If all layers have the same widths, a ``Modelfile`` for Ollama is put beside it, unless there
    is one already.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.
    output : path, optional
        The file to write; must not exist. Default: ``<name>-<type>.gguf`` in the directory of the
        model, or in the current one if the model is not a local directory.
    **options
        The fields of `slimgpt.config.ExportConfig`, for example ``type="q8_0"``.

    Raises
    ------
    SlimGPTError
        If an option or the model is wrong, the file exists, or llama.cpp cannot compute the model.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.export("slim", to="gguf", type="q8_0")  # doctest: +SKIP
    """
    config = ExportConfig.create(**options)
    source = find_model(model)
    if find_spec("gguf") is None:
        raise MissingDependencyError("gguf", "writing a GGUF file", "pip install 'slimgpt[gguf]'")
    from slimgpt.exporting.gguf import PER_LAYER_ARCH, write_gguf

    file = Path(output) if output else _default_output(source, config.type)
    _check_new(file)
    generation = load_generation_config(source, load_config(source))
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing_alone(file):
            _check_new(file)  # which another process may have written since
            with replacing(file) as temporary:
                arch = write_gguf(source, temporary, config.type)
            if arch != PER_LAYER_ARCH:
                write_modelfile(generation, file)
    return ExportResult(file, arch, file.stat().st_size)


def _check_new(file: Path) -> None:
    if os.path.lexists(file):
        raise RunStateError(f"{file} exists", hint="choose another --output, or remove it first")


def _default_output(source: Source, kind: str) -> Path:
    directory = Path(source.name)
    if not directory.is_dir():
        return Path(f"{directory.stem if source.gguf_file else directory.name}-{kind}.gguf")
    return directory / f"{directory.resolve().name}-{kind}.gguf"
