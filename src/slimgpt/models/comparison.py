"""Check that models can be compared."""

from collections.abc import Sequence
from typing import Any

import torch

from slimgpt.errors import ConfigError
from slimgpt.models.loading import load_config
from slimgpt.models.source import Source
from slimgpt.models.tokenizer import load_tokenizer


def stored_dtype(source: Source) -> str:
    """Return the precision of a stored checkpoint; float32 for GGUF, which is dequantised."""
    stored: Any = None if source.gguf_file else load_config(source).dtype
    return str(stored or torch.float32).removeprefix("torch.")


def check_same_dtype(sources: Sequence[Source]) -> None:
    """Check that all models are stored in the same precision.

    Raises
    ------
    ConfigError
        If they differ.
    """
    dtypes = {source.name: stored_dtype(source) for source in sources}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
        raise ConfigError(
            f"the models are stored in different precisions: {found}",
            hint="choose one for both, for example --dtype float32",
        )


def check_same_vocabulary(source: Source, base: Source) -> None:
    """Check that two models have the same vocabulary.

    Raises
    ------
    ConfigError
        If they differ, so that predictions cannot be compared.
    """
    sizes = [load_config(s).get_text_config().vocab_size for s in (source, base)]
    vocabularies = [load_tokenizer(s).get_vocab() for s in (source, base)]
    if sizes[0] != sizes[1] or vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"{source.name} and {base.name} have different vocabularies ({sizes[0]} and {sizes[1]} "
            "tokens), so their predictions cannot be compared",
            hint=f"give the model that {source.name} was pruned from",
        )
