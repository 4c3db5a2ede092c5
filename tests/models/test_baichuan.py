"""Checkpoints of Baichuan are read as the LLaMA that they compute, without their code."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from conftest import TEXT, assert_greedy, make_tiny_model, sample_tokens
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import slimgpt
from slimgpt.errors import ConfigError, SlimGPTError, UnsupportedModelError
from slimgpt.models.baichuan import llama_config
from slimgpt.models.loading import load_config, load_model, weight_files
from slimgpt.models.source import Source, find_model
from slimgpt.models.tokenizer import load_tokenizer

BAICHUAN1, OTHERS = "BaiChuanForCausalLM", "BaichuanForCausalLM"

CODE = "raise SystemExit('the code of a checkpoint was run')\n"

TOKENIZER_CONFIG = {
    "tokenizer_class": "BaichuanTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "single_word": True},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "single_word": True},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "single_word": True},
    "pad_token": None,
    "model_max_length": 4096,
    "sp_model_kwargs": {},
    "use_fast": False,
}

CONFIG_13B = {
    "architectures": [OTHERS],
    "model_type": "baichuan",
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "model_max_length": 4096,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64000,
}

PRUNE: Any = {"ratio": 0.3, "calibration": TEXT, "nsamples": 4, "seqlen": 32}

TRAINED = [*"".join(topics.values())[:100_000].split("\n"), "今天天气很好，你好世界", "ＡＢＣ"]


def train_sentencepiece(file: Path, **options: Any) -> None:
    with file.open("wb") as writer:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TRAINED),
            model_writer=writer,
            **{"vocab_size": 480, "model_type": "bpe", "byte_fallback": True} | options,
            split_digits=True,
            minloglevel=2,
        )


def tiny_llama() -> PreTrainedModel:
    """LLaMA without grouped heads, whose heads follow from its hidden size."""
    return make_tiny_model("llama-mha", hidden_size=64, vocab_size=512)


def write_baichuan(directory: Path, model: PreTrainedModel, architecture: str) -> Path:
    """Write a tiny LLaMA in the layout of Baichuan."""
    directory.mkdir()
    state = model.state_dict()
    for prefix in [name.removesuffix("q_proj.weight") for name in state if "q_proj" in name]:
        parts = [state.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
        state[f"{prefix}W_pack.weight"] = torch.cat(parts)
        state[f"{prefix}rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    own = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
    )
    values = {key: getattr(model.config, key) for key in own} | {
        "architectures": [architecture],
        "model_type": "baichuan",
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaiChuanConfig",
            "AutoModelForCausalLM": f"modeling_baichuan.{architecture}",
        },
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    for name in ("configuration", "modeling", "tokenization"):
        (directory / f"{name}_baichuan.py").write_text(CODE)
    return directory


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    train_sentencepiece(file, normalization_rule_name="nmt_nfkc")
    return file


@pytest.fixture
def baichuan(tmp_path: Path, sentencepiece: Path) -> Path:
    directory = write_baichuan(tmp_path / "baichuan", tiny_llama(), BAICHUAN1)
    (directory / "tokenizer.model").write_bytes(sentencepiece.read_bytes())
    return directory


def normalised(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head.weight.copy_(normalize(model.lm_head.weight))
    return model


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "computes"),
    [(BAICHUAN1, lambda model: model), (OTHERS, normalised)],
    ids=["baichuan", "baichuan2"],
)
def test_it_computes_what_it_was_made_from(
    architecture: str,
    computes: Callable[[PreTrainedModel], PreTrainedModel],
    dtype: str,
    tmp_path: Path,
) -> None:
    source = find_model(write_baichuan(tmp_path / "baichuan", tiny_llama(), architecture))
    assert load_config(source).model_type == "llama"
    computes(tiny_llama()).save_pretrained(tmp_path / "llama")
    loaded, expected = load_model(source, dtype), load_model(find_model(tmp_path / "llama"), dtype)
    assert loaded.dtype == expected.dtype
    tokens = sample_tokens()
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("options", [{}, {"method": "taylor"}], ids=["slimgpt", "gradients"])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per-layer"])
def test_pruning_gives_a_plain_llama(
    uniform: bool, options: Mapping[str, Any], baichuan: Path, tmp_path: Path
) -> None:
    llama = tmp_path / "llama"
    tiny_llama().save_pretrained(llama)
    load_tokenizer(find_model(baichuan)).save_pretrained(llama)
    for source in (baichuan, llama):
        output = tmp_path / f"slim-{source.name}"
        slimgpt.prune(str(source), output, uniform=uniform, **PRUNE, **options)
    slim, other = tmp_path / "slim-baichuan", tmp_path / "slim-llama"
    weights, expected = (load_file(path / "model.safetensors") for path in (slim, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)

    config = json.loads((slim / "config.json").read_text())
    assert config["model_type"] == ("llama" if uniform else "slimgpt_llama")
    assert "baichuan" not in json.dumps(config).lower()
    assert "# baichuan, pruned by 30 %" in (slim / "README.md").read_text()
    assert not list(slim.glob("*_baichuan.py"))
    model = AutoModelForCausalLM.from_pretrained(slim).eval()
    generated = model.generate(sample_tokens(2, 8), max_new_tokens=6, do_sample=False)
    assert_greedy(model, generated, generated.shape[1] - 8)

    settings = (slim / "tokenizer_config.json").read_text().lower()
    assert "auto_map" not in settings
    assert "baichuan" not in settings
    original: Any = SentencePieceProcessor(model_file=str(baichuan / "tokenizer.model"))
    text = "  Ｈello,  world\n今天 12345"
    assert AutoTokenizer.from_pretrained(slim)(text)["input_ids"] == original.encode(text)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({}, "a 13B model of Baichuan (num_hidden_layers=40, hidden_size=5120)", "Baichuan-7B"),
        ({"max_position_embeddings": 4096}, "ALiBi biases, not RoPE", "Baichuan2-7B"),
        ({"vocab_size": 125696}, "ALiBi biases, not RoPE", "Baichuan2-7B"),
        ({"hidden_size": 64, "num_hidden_layers": 2}, "ALiBi biases", "Baichuan2-7B"),
        ({"architectures": None}, "architectures=None, so it is unknown", f'["{BAICHUAN1}"]'),
        ({"architectures": ["OtherForCausalLM"]}, "it is unknown which", f'["{OTHERS}"]'),
        ({"architectures": "BaichuanForCausalLM"}, "it is unknown which", f'["{OTHERS}"]'),
    ],
)
def test_what_is_not_llama_is_refused(
    changes: Mapping[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_13B | changes))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedModelError) as error:
        load_config(find_model(tmp_path))
    assert message in str(error.value)
    assert hint in str(error.value.hint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "has rope_scaling, which the code"),
        ({"rope_theta": 1e6}, "has rope_theta, which the code of Baichuan does not know"),
        ({"num_key_value_heads": 4}, "has num_key_value_heads, which the code"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"hidden_act": "softest"}, "hidden_act='softest' is unknown"),
        ({"num_attention_heads": 7}, "hidden_size=64 is no multiple of num_attention_heads=7"),
        ({"num_hidden_layers": 5}, "num_hidden_layers=5, but its files hold 4 blocks"),
        ({"hidden_size": 128}, "lacks 39 weights or has them in another shape"),
        ({"hidden_size": None}, "hidden_size=None"),
    ],
)
def test_wrong_configs(changes: Mapping[str, Any], message: str, baichuan: Path) -> None:
    edit(baichuan / "config.json", **changes)
    with pytest.raises(SlimGPTError) as error:
        load_model(find_model(baichuan))
    assert message in str(error.value)
    assert error.value.hint


def test_the_context_may_have_its_other_name() -> None:
    values = {"architectures": [BAICHUAN1], "model_max_length": 2048}
    assert llama_config("it", values)["max_position_embeddings"] == 2048
    values["max_position_embeddings"] = 1024
    assert llama_config("it", values)["max_position_embeddings"] == 1024


def test_a_normalised_head_is_never_that_of_the_embedding(tmp_path: Path) -> None:
    directory = write_baichuan(tmp_path / "baichuan2", tiny_llama(), OTHERS)
    edit(directory / "config.json", tie_word_embeddings=True)
    state = load_file(directory / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks lm_head\.weight"):
        load_model(find_model(directory))


@pytest.mark.parametrize("shape", [(), (191, 64), (0, 64)])
def test_packed_rows_that_cannot_be_split(shape: tuple[int, ...], baichuan: Path) -> None:
    name = "model.layers.1.self_attn.W_pack.weight"
    state = load_file(baichuan / "model.safetensors") | {name: torch.ones(shape)}
    save_file(state, baichuan / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=rf"{name} has {(*shape, 0)[0]} rows"):
        load_config(find_model(baichuan))


def test_pickles_are_refused_and_the_hint_converts_them(baichuan: Path) -> None:
    weights = baichuan / "model.safetensors"
    state = load_file(weights)
    names = list(state)
    for number, part in enumerate((names[:9], names[9:])):
        shard = {name: state[name] for name in part}
        torch.save(shard, baichuan / f"pytorch_model-0000{number + 1}-of-00002.bin")
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match="only pickled weights") as error:
        find_model(baichuan)
    # A model on the hub is not searched for pickles: they would be downloaded.
    with pytest.raises(ConfigError, match=r"has no model\.safetensors") as on_hub:
        weight_files(Source("owner/name", str(baichuan)))
    command = shlex.split(str(error.value.hint).partition("directory: ")[2])
    assert shlex.join(command[1:]) in shlex.join(
        shlex.split(str(on_hub.value.hint).partition("directory: ")[2])
    )
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=baichuan, check=True, timeout=60)
    tokens = sample_tokens()
    loaded = load_model(find_model(baichuan))
    assert torch.equal(loaded(tokens).logits, tiny_llama()(tokens).logits)


TEXTS = (
    "Hello world",
    "  two  spaces ",
    "a\n\n  b\t\tc",
    "今天天气很好 12345 ２０２３",
    "ＡＢＣ①",
    "",
    " ",
    "é 😀 e\u0301",
)


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("squeezes", [True, False], ids=["squeezes", "keeps-spaces"])
def test_tokens_are_those_of_sentencepiece(
    rule: str, prefix: bool, squeezes: bool, baichuan: Path
) -> None:
    file = baichuan / "tokenizer.model"
    train_sentencepiece(
        file,
        normalization_rule_name=rule,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=squeezes,
    )
    tokenizer, original = load_tokenizer(find_model(baichuan)), SentencePieceProcessor()
    original.Load(str(file))
    for text in TEXTS:
        ids = original.encode(text)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == original.decode(ids)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.model_max_length == 4096


@pytest.mark.parametrize(
    ("settings", "starts"), [({}, True), ({"add_bos_token": True}, True), (TOKENIZER_CONFIG, False)]
)
def test_the_first_token(settings: Mapping[str, Any], starts: bool, baichuan: Path) -> None:
    (baichuan / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = load_tokenizer(find_model(baichuan))("Hello")["input_ids"]
    assert (ids[0] == 1) == starts


def test_tokenizers_that_cannot_be_read(baichuan: Path) -> None:
    source, file = find_model(baichuan), baichuan / "tokenizer.model"
    fast = load_tokenizer(source)
    train_sentencepiece(file, model_type="unigram", byte_fallback=False)
    with pytest.raises(UnsupportedModelError, match="the result gives other tokens") as error:
        load_tokenizer(source)
    assert "put a tokenizer.json" in str(error.value.hint)
    file.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.model"):
        load_tokenizer(source)
    file.write_text("not a model")
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        load_tokenizer(source)
    fast.backend_tokenizer.save(str(baichuan / "tokenizer.json"))
    assert load_tokenizer(source).get_vocab() == fast.get_vocab()
    assert load_tokenizer(source)(TEXTS[1]).input_ids == fast(TEXTS[1]).input_ids

    output = baichuan.parent / "slim"
    slimgpt.prune(str(baichuan), output, **PRUNE)
    assert "auto_map" not in (output / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(output)(TEXTS[1]).input_ids == fast(TEXTS[1]).input_ids
