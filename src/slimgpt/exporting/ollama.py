"""Write an Ollama Modelfile."""

import logging
import os
from pathlib import Path

from transformers import GenerationConfig

from slimgpt.runtime.files import write_atomically

log = logging.getLogger(__name__)

# What Ollama calls the fields of a generation config.
_OLLAMA_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repeat_penalty",
}


def write_modelfile(generation: GenerationConfig, file: Path) -> None:
    """Describe the model to Ollama."""
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
