"""The formats that models are exported to, by name."""

from pathlib import Path
from typing import Protocol

from slimgpt.config import ExportConfig
from slimgpt.exporting.gguf_format import GgufFormat
from slimgpt.models.source import Source


class Format(Protocol):
    """A format of another engine.

    Attributes
    ----------
    packages : tuple of str
        What it imports when it writes; the extra that installs them has the format's name.
    """

    packages: tuple[str, ...]

    def default_name(self, stem: str, config: ExportConfig) -> str:
        """Name of the output for a model with this name."""
        ...

    def write(self, source: Source, output: Path, config: ExportConfig) -> str:
        """Write a model, whole or not at all; return the name of its architecture.

        Parameters
        ----------
        source : Source
            The model, dense or pruned.
        output : Path
            Does not exist, but its directory does.
        config : ExportConfig
            The options.
        """
        ...


FORMATS: dict[str, Format] = {"gguf": GgufFormat()}
