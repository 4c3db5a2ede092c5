"""Read a SentencePiece model as what it does, whatever class its checkpoint names for it."""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from slimgpt.errors import ConfigError, UnsupportedModelError
from slimgpt.models.source import Source, find_file
from slimgpt.runtime.files import read_json

SENTENCEPIECE_FILE = "tokenizer.model"

# Texts on which tokenizers can differ: spaces, digits, scripts, characters without a token.
_TEXTS = (
    "Hello world, it's 3.14 or 12345!",
    "  two  spaces,\ttabs\n\n\tand  lines \n",
    "今天天气很好，我们去北京。２０２３年",
    "ＡＢＣ ① ﬁ é e\u0301 Ⅳ ½ … ﹏ \u3000 \u00a0 x²",
    "😀👩‍👩‍👧 \U00010348 كتاب किताब 한국어",
    "def f(x):\n    return x ** 2  # __init__",
    " ",
)


def read_sentencepiece(source: Source) -> PreTrainedTokenizerFast:
    """Convert the SentencePiece model of a checkpoint to a tokenizer of the ``tokenizers`` library.

    ``LlamaTokenizer`` finds the tokens, the merges and the settings; it does not follow the model
    in how text is normalised. Where the model has a table for that (NFKC and the like), rare
    sequences such as a carriage return before a line feed may still give other tokens, because
    ``tokenizers`` looks up characters together with the marks that follow them.

    Raises
    ------
    ConfigError
        If there is none, or the settings cannot be read.
    UnsupportedModelError
        If the result gives other tokens than SentencePiece.
    """
    from sentencepiece import SentencePieceProcessor

    file = find_file(source, SENTENCEPIECE_FILE)
    if file is None:
        raise ConfigError(
            f"{source.name} has no {SENTENCEPIECE_FILE}",
            hint="take the one that came with the model; the code of its tokenizer is not needed",
        )
    settings = find_file(source, "tokenizer_config.json")
    adds_bos = (read_json(settings) if settings else {}).get("add_bos_token", True)
    loaded: Any = LlamaTokenizer.from_pretrained(source.location, add_bos_token=adds_bos)
    backend: Tokenizer = loaded.backend_tokenizer
    proto: Any = SentencePieceExtractor(str(file)).proto
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    prefix = [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, *prefix, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    stripped = [decoders.Strip(" ", left=1, right=0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    original: Any = SentencePieceProcessor(model_file=str(file))
    for text in _TEXTS:
        ids = backend.encode(text, add_special_tokens=False).ids
        if ids != original.encode(text):
            raise UnsupportedModelError(
                f"the SentencePiece model {file} cannot be converted: for the text {text!r}, the "
                "result gives other tokens",
                hint="put a tokenizer.json that gives the same tokens beside it: it goes first",
            )
    others = {key: value for key, value in loaded.init_kwargs.items() if key != "auto_map"}
    return PreTrainedTokenizerFast(**others | {"tokenizer_object": backend})
