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


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": _pieces(r"\p{N}{1,3}"),
    "qwen2": _pieces(r"\p{N}"),
}
# With these, llama.cpp looks a piece up in the vocabulary as a whole before it merges.
_IGNORE_MERGES = {"llama-bpe"}


def pre_tokenizer_name(tokenizer: Tokenizer) -> str | None:
    """Name of the pre-tokenizer of a byte-level BPE tokenizer; None if it is not known here."""
    steps = _steps(tokenizer.pre_tokenizer)
    for name, known in PRE_TOKENIZERS.items():
        if steps == _steps(known) and tokenizer.model.ignore_merges == (name in _IGNORE_MERGES):
            return name
    return None


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """What a pre-tokenizer does, less what does not change the ids."""
    if pre_tokenizer is None:
        return []
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    return [{key: value for key, value in s.items() if key != "trim_offsets"} for s in steps]
