"""How byte-level BPE tokenizers split text before they merge, by the names that GGUF files use.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``), a ``tokenizer.json`` spells it out.
Only those are listed whose ids are compared with llama.cpp's in the tests.
"""

import json
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split


def _pieces(numbers: str) -> PreTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = Split(Regex(pattern), behavior="isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


# For each name how text is split, and whether llama.cpp looks a piece up in the vocabulary as a
# whole before it merges.
PRE_TOKENIZERS: dict[str, tuple[PreTokenizer, bool]] = {
    "gpt-2": (ByteLevel(add_prefix_space=False), False),
    "smollm": (
        Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        False,
    ),
    "llama-bpe": (_pieces(r"\p{N}{1,3}"), True),
    "qwen2": (_pieces(r"\p{N}"), False),
}


def pre_tokenizer_name(tokenizer: Tokenizer) -> str | None:
    """Name of the pre-tokenizer of a byte-level BPE tokenizer; None if it is not known here."""
    steps = _steps(tokenizer.pre_tokenizer)
    for name, (splitter, ignore_merges) in PRE_TOKENIZERS.items():
        if steps == _steps(splitter) and tokenizer.model.ignore_merges == ignore_merges:
            return name
    return None


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """What a pre-tokenizer does, less what does not change the ids."""
    if pre_tokenizer is None:
        return []
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    return [{key: value for key, value in s.items() if key != "trim_offsets"} for s in steps]
