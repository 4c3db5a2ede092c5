"""Write the tokenizer of a GGUF file so that llama.cpp gives the same ids as transformers."""

import json
import logging
import tempfile
from collections.abc import Mapping
from itertools import groupby, product
from pathlib import Path
from typing import Any, cast

from gguf import GGUFValueType, GGUFWriter, ReaderField, SpecialVocab, TokenType
from gguf.constants import Keys
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from slimgpt.checkpoint.results import REPORT_FILE, PruningReport, read_report
from slimgpt.errors import ExportError, MissingDependencyError
from slimgpt.models.gguf_reading import open_gguf
from slimgpt.models.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_name
from slimgpt.models.source import EMBEDDED_MODELS, Source, embedded_model, find_file
from slimgpt.models.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def add_tokenizer(writer: GGUFWriter, source: Source, config: PreTrainedConfig) -> None:
    """Add the tokenizer of a checkpoint to a GGUF file.

    If the model is a GGUF file, or was pruned from an embedded one, and has the same tokens, the
    entries of that file are copied. Otherwise the checkpoint's tokenizer is converted.

    Parameters
    ----------
    writer : GGUFWriter
        Writer whose header is not yet written.
    source : Source
        The checkpoint.
    config : PreTrainedConfig
        Its config. The vocabulary is padded to ``vocab_size``.

    Raises
    ------
    ExportError
        If llama.cpp does not support the tokenizer.
    """
    tokenizer = load_tokenizer(source)
    original = _original_gguf(source)
    fields = open_gguf(original).fields if original else {}
    tokens = fields[Keys.Tokenizer.LIST].contents() if fields else []
    names = cast(list[str], tokenizer.convert_ids_to_tokens(list(range(len(tokens)))))
    if tokens and _with_spaces(tokens) == _with_spaces(names):
        log.info("the tokenizer is copied from %s", original)
        _copy(writer, fields)
    else:
        log.info("the tokenizer is made from that of %s", source.name)
        _convert(writer, tokenizer, config)
    # Always written, because llama.cpp's defaults depend on the pre-tokenizer.
    adds_bos, adds_eos = _surroundings(tokenizer)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)


def _with_spaces(tokens: list[str]) -> list[str]:
    """Spell spaces in one way: Gemma's files have plain ones where its tokenizer has "▁"."""
    return [token.replace("▁", " ") for token in tokens]


def _copy(writer: GGUFWriter, fields: Mapping[str, ReaderField]) -> None:
    for name, field in fields.items():
        if name.startswith("tokenizer.") and name not in (
            Keys.Tokenizer.ADD_BOS,
            Keys.Tokenizer.ADD_EOS,
        ):
            kind, *inner = field.types
            sub_type = inner[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type)


def _original_gguf(source: Source) -> Path | None:
    """The GGUF file of a checkpoint, or the embedded one that it was pruned from."""
    if not source.gguf_file:
        report = find_file(source, REPORT_FILE)
        if report is None:
            return None
        base = read_report(report, PruningReport)["base_model"]
        if base not in EMBEDDED_MODELS:
            return None
        try:
            source = embedded_model(base)
        except MissingDependencyError:
            return None
    return Path(source.location) / str(source.gguf_file)


def _convert(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> None:
    backend: Any = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"llama.cpp's BPE cannot compute a {model['type']} tokenizer",
            hint="tokenizers that can be written are byte-level BPE and SentencePiece BPE",
        )
    is_byte_level = not model["byte_fallback"]
    _check_normalizer(state["normalizer"], is_byte_level)
    tokens, types = _tokens(state, config.vocab_size)
    writer.add_tokenizer_model("gpt2" if is_byte_level else "llama")
    if is_byte_level:
        name = pre_tokenizer_name(backend)
        if name is None:
            raise ExportError(
                "llama.cpp has no known name for the way in which this tokenizer splits text: "
                f"{state['pre_tokenizer']}",
                hint=f"names that are known: {', '.join(PRE_TOKENIZERS)}",
            )
        writer.add_tokenizer_pre(name)
    else:
        scores = _sentencepiece_scores(state)
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(_adds_space(state))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        config.save_pretrained(directory)
        special = SpecialVocab(directory, load_merges=is_byte_level, n_vocab=config.vocab_size)
    special.add_special_token = {}
    special.add_to_gguf(writer, quiet=True)


def _check_normalizer(normalizer: dict[str, Any] | None, is_byte_level: bool) -> None:
    """Refuse normalizers that change text in a way that llama.cpp does not support."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kinds = {step["type"] for step in steps}
    known = {"NFC"} if is_byte_level else {"Prepend", "Replace"}
    if kinds - known:
        raise ExportError(
            f"this tokenizer changes text in a way that llama.cpp does not: {normalizer}",
            hint=f"normalizers that can be written: none, {', '.join(sorted(known))}",
        )
    if "NFC" in kinds:
        log.warning("llama.cpp does not normalise Unicode (NFC) as this tokenizer does")


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer adds BOS before a prompt, and EOS after it."""
    ids = tokenizer("a", add_special_tokens=False).input_ids
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, after in product((False, True), repeat=2):
        if tokenizer("a").input_ids == bos * before + ids + eos * after:
            return before, after
    raise ExportError(
        "this tokenizer puts tokens other than BOS and EOS around a prompt",
        hint="remove them from the post_processor in its tokenizer.json",
    )


def _tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types of all ids; ids without a token get placeholders."""
    texts = {index: text for text, index in state["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    if state["model"]["byte_fallback"]:
        unknown = state["model"]["unk_token"]
        for index, text in texts.items():
            if text == unknown:
                types[index] = TokenType.UNKNOWN
            elif len(text) == 6 and text.startswith("<0x"):
                types[index] = TokenType.BYTE
    for added in state["added_tokens"]:
        index = added["id"]
        texts[index] = added["content"]
        if types.get(index) != TokenType.UNKNOWN:
            types[index] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(texts) >= vocab_size:
        raise ExportError(
            f"the tokenizer has ids up to {max(texts)}, but the model only {vocab_size} embeddings",
            hint="remove the tokens that were added from tokenizer.json, or add embeddings for "
            "them: model.resize_token_embeddings(...)",
        )
    ids = range(vocab_size)
    return (
        [texts.get(index, f"[PAD{index}]") for index in ids],
        [types.get(index, TokenType.UNUSED) for index in ids],
    )


def _sentencepiece_scores(state: dict[str, Any]) -> dict[str, float]:
    """Compute scores with which llama.cpp merges in the order of the tokenizer's merges.

    llama.cpp merges any two neighbours that form a known piece, best score first. This equals
    merging by rank if the merges contain every way to form a piece and are grouped by piece, as in
    tokenizers converted from a SentencePiece model. Merges that make an added token are left out:
    both find added tokens before they merge.
    """
    vocab = state["model"]["vocab"].keys() - {token["content"] for token in state["added_tokens"]}
    merges = [
        (left, right)
        for left, right in state["model"]["merges"]
        if {left, right, left + right} <= vocab
    ]
    pieces = [piece for piece, _ in groupby(left + right for left, right in merges)]
    ways = sum(
        piece[:cut] in vocab and piece[cut:] in vocab
        for piece in vocab
        for cut in range(1, len(piece))
    )
    if len(set(pieces)) != len(pieces) or ways != len(set(merges)):
        raise ExportError(
            "this tokenizer merges characters in a way that llama.cpp does not: "
            f"{len(merges)} merges for {ways} ways to make a piece from two others",
            hint="export a model with the tokenizer that its SentencePiece model gave",
        )
    return {piece: -float(rank) for rank, piece in enumerate(pieces)}


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether the normalizer or the pre-tokenizer adds a space before the text."""
    text = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"always"' in text
