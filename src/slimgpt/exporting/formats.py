"""The export formats, by name."""

from pathlib import Path
from typing import Protocol

from slimgpt.config import ExportConfig
from slimgpt.exporting.gguf_format import GgufFormat
from slimgpt.models.source import Source


class Format(Protocol):
    """An export format.

    Attributes
    ----------
    packages : tuple of str
        Packages that it needs for writing. The extra that installs them has the format's name.
    """

    packages: tuple[str, ...]

    def default_name(self, stem: str, config: ExportConfig) -> str:
        """Default file name for a model with the name `stem`."""
        ...

    def write(
        self, source: Source, output: Path, config: ExportConfig
    ) -> tuple[str, dict[str, int]]:
        """Write a model atomically; return the architecture, and how many tensors have each type.

        Parameters
        ----------
        source : Source
            The model, dense or pruned.
        output : Path
            The file to write, in an existing directory. It must not exist.
        config : ExportConfig
            The options.
        """
        ...


FORMATS: dict[str, Format] = {"gguf": GgufFormat()}
