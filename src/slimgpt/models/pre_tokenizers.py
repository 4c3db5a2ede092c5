"""Pre-tokenizers of byte-level BPE, by their names in GGUF files.

A GGUF file only names its pre-tokenizer (``tokenizer.ggml.pre``); a ``tokenizer.json`` defines it.
The list contains only those whose ids the tests compare with llama.cpp.
"""

import json
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

# Words that end where a capital letter begins another one.
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"


def _pieces(numbers: str, words: str = _WORDS, after_symbols: str = r"\r\n") -> PreTokenizer:
    pattern = (
        f"{words}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[{after_symbols}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = Split(Regex(pattern), behavior="isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


# For each name: the pre-tokenizer, and whether llama.cpp first looks up a whole piece in the
# vocabulary (ignore_merges).
PRE_TOKENIZERS: dict[str, tuple[PreTokenizer, bool]] = {
    "gpt-2": (ByteLevel(add_prefix_space=False), False),
    "smollm": (
        Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        False,
    ),
    "llama-bpe": (_pieces(r"\p{N}{1,3}"), True),
    "gpt-4o": (
        _pieces(r"\p{N}{1,3}", _CASED % ((f"{_CONTRACTIONS}?",) * 2), r"\r\n/"),
        False,
    ),
    "tekken": (_pieces(r"\p{N}", _CASED % ("", ""), r"\r\n/"), True),
    "dbrx": (_pieces(r"\p{N}{1,3}"), False),
    "qwen2": (_pieces(r"\p{N}"), False),
}


def pre_tokenizer_name(tokenizer: Tokenizer) -> str | None:
    """Return the GGUF name of a tokenizer's pre-tokenizer; None if it is unknown."""
    steps = _steps(tokenizer.pre_tokenizer)
    for name, (splitter, ignore_merges) in PRE_TOKENIZERS.items():
        if steps == _steps(splitter) and tokenizer.model.ignore_merges == ignore_merges:
            return name
    return None


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """List the steps of a pre-tokenizer, without settings that do not change the ids."""
    if pre_tokenizer is None:
        return []
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    # To remove what is between the pieces changes nothing where they are the whole text.
    alike = {("Removed", True): {"behavior": "Isolated", "invert": False}}
    return [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        | alike.get((step.get("behavior"), step.get("invert")), {})
        for step in steps
    ]
