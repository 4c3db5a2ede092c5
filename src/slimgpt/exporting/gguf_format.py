"""The format ``gguf``: a GGUF file for llama.cpp, and a Modelfile if Ollama has the graph."""

import logging
import os
from pathlib import Path

from transformers import GenerationConfig

from slimgpt.config import ExportConfig
from slimgpt.models.loading import load_config, load_generation_config
from slimgpt.models.source import Source
from slimgpt.runtime.files import replacing, write_atomically

log = logging.getLogger(__name__)

# Ollama's names for the fields of a generation config.
_OLLAMA_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repeat_penalty",
}


class GgufFormat:
    """Writes ``NAME-TYPE.gguf`` and ``Modelfile``."""

    packages: tuple[str, ...] = ("gguf",)

    def default_name(self, stem: str, config: ExportConfig) -> str:
        """Default file name for a model with the name `stem`."""
        return f"{stem}-{config.type}.gguf"

    def write(
        self, source: Source, output: Path, config: ExportConfig
    ) -> tuple[str, dict[str, int]]:
        """Write the file; return llama.cpp's graph, and how many tensors have each type."""
        from slimgpt.exporting.gguf import write_gguf
        from slimgpt.exporting.gguf_graphs import graph_of

        generation = load_generation_config(source, load_config(source))
        with replacing(output) as temporary:
            arch, types = write_gguf(source, temporary, config.type)
        if not graph_of(arch).per_layer:
            _write_modelfile(generation, output)
        return arch, types


def _write_modelfile(generation: GenerationConfig, file: Path) -> None:
    modelfile = file.with_name("Modelfile")
    if os.path.lexists(modelfile):
        log.info("%s stays as it is", modelfile)
        return
    values = generation.to_diff_dict()
    lines = [f"FROM ./{file.name}"]
    lines += [
        f"PARAMETER {name} {values[key]}"
        for key, name in _OLLAMA_PARAMETERS.items()
        if values.get(key) is not None
    ]
    write_atomically(modelfile, "\n".join(lines) + "\n")
