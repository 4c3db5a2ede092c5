"""Gemma 3 as a GGUF file: tiny random models, and the one that is embedded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, TINY, assert_greedy
from gguf import GGUFValueType, GGUFWriter
from llama_cpp import TEXTS, LlamaCpp, check_agreement
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import slimgpt
from slimgpt.errors import ExportError, UnsupportedModelError
from slimgpt.exporting.gguf_tokenizer import add_tokenizer
from slimgpt.models.loading import load_config, load_model
from slimgpt.models.source import Source, find_model
from slimgpt.models.tokenizer import load_tokenizer

IDS = torch.arange(10, 70)[None]
LAYERS = 7
TINY_GEMMA = {
    **TINY,
    "num_hidden_layers": LAYERS,
    "sliding_window": 8,
    "rms_norm_eps": 1e-5,
    "query_pre_attn_scalar": 8,
    "tie_word_embeddings": True,
}
FULL = {"rope_type": "default", "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}
EVERY = {
    period: [("full_attention", "sliding_attention")[layer % period > 0] for layer in range(1, 8)]
    for period in (1, 3, 6)
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def make_model(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", **TINY_GEMMA | options)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(std=0.2)
    return model


def write(
    directory: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, **values: Any
) -> Path:
    """Write a model as llama.cpp's converter does, with other metadata; None leaves out."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    file, config = directory / "model.gguf", model.config
    writer = GGUFWriter(file, "gemma3")
    add_tokenizer(writer, Source("tiny", str(directory)), config)
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base": 1e6,
    }
    kinds = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
    for key, value in (metadata | values).items():
        if isinstance(value, list):
            writer.add_array(f"gemma3.{key}", value)
        elif value is not None:
            writer.add_key_value(f"gemma3.{key}", value, kinds[type(value)])
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            shifted = tensor + 1 if name.endswith("norm.weight") else tensor
            writer.add_tensor(gguf_name(name), shifted.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


VARIANTS = [
    ("as usual", {}, {}),
    ("untied", {}, {"tie_word_embeddings": False}),
    ("one kv head", {}, {"num_key_value_heads": 1, "num_attention_heads": 4}),
    (
        "linear",  # 4B and larger
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {
            "rope_parameters": {
                "full_attention": FULL | {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": SLIDING,
            }
        },
    ),
    (
        "frequencies",
        {"rope.freq_base": 5e5, "rope.freq_base_swa": 2e4},
        {
            "rope_parameters": {
                "full_attention": FULL | {"rope_theta": 5e5},
                "sliding_attention": SLIDING | {"rope_theta": 2e4},
            }
        },
    ),
    ("pattern", {"attention.sliding_window_pattern": 3}, {"layer_types": EVERY[3]}),
    ("no window", {"attention.sliding_window": None}, {"layer_types": EVERY[1]}),
    ("soft cap", {"final_logit_softcapping": 5.0}, {"final_logit_softcapping": 5.0}),
]


@pytest.mark.parametrize(
    ("values", "options"), [case[1:] for case in VARIANTS], ids=[case[0] for case in VARIANTS]
)
def test_a_file_computes_what_its_checkpoint_and_llama_cpp_do(
    values: dict[str, Any],
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = make_model(**options)
    file = write(tmp_path, tokenizer, model, **values)
    read = load_model(find_model(str(file)))
    assert read.config.rope_parameters == model.config.rope_parameters
    assert read.config.layer_types == model.config.layer_types
    torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    # llama.cpp takes GELU from a table of float16 values.
    check_agreement(file, read, IDS[0].tolist(), 2, tolerance=1e-2)


def test_attention_of_27b_is_scaled_by_the_hidden_size(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Metadata has no scale: llama.cpp knows it by the number of blocks."""
    options = {"num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 62}
    model = make_model(**options, query_pre_attn_scalar=48 // 4, intermediate_size=32)
    file = write(tmp_path, tokenizer, model)
    assert load_config(find_model(str(file))).query_pre_attn_scalar == 12
    check_agreement(file, model, IDS[0].tolist(), 1, tolerance=1e-2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention.sliding_window_pattern": [True, False] * 4}, "sliding_window_pattern"),
        ({"attention.sliding_window_pattern": "six"}, "sliding_window_pattern"),
        ({"feed_forward_length": [64] * LAYERS}, r"feed_forward_length \[64, 64, .*has 64 rows"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "scales its rotary"),
    ],
)
def test_metadata_that_is_not_understood_is_refused(
    values: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write(tmp_path, tokenizer, make_model(), **values)
    with pytest.raises(UnsupportedModelError, match=message) as error:
        load_config(find_model(str(file)))
    assert error.value.hint


# Of the embedded model. Runs of more than 31 spaces are two tokens.
MORE_TEXTS = [
    *TEXTS,
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "<div>\t\t<b></b></div> <unused5>[multimodal]",
    *(" " * length + "x" + " " * length for length in (2, 31, 32, 33, 62, 63, 70)),
    *("\n" * length + "x\t" * length for length in (2, 31, 32, 40)),
    "\x00\x07 � 𓀀 \U0010ffff",
]


@pytest.fixture(scope="module")
def engine(gemma3: str) -> LlamaCpp:
    source = find_model(gemma3)
    return LlamaCpp(Path(source.location, str(source.gguf_file)))


@pytest.fixture(scope="module")
def own_tokenizer(gemma3: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(find_model(gemma3))


@pytest.fixture(scope="module")
def dense(gemma3: str) -> PreTrainedModel:
    return load_model(find_model(gemma3))


@pytest.fixture(scope="module")
def directory(
    dense: PreTrainedModel,
    own_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    path = tmp_path_factory.mktemp("gemma3")
    dense.save_pretrained(path)
    own_tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.real_model
class TestEmbedded:
    def test_ids_are_those_of_llama_cpp(
        self, own_tokenizer: PreTrainedTokenizerBase, engine: LlamaCpp, tmp_path: Path
    ) -> None:
        own_tokenizer.save_pretrained(tmp_path)
        saved = AutoTokenizer.from_pretrained(tmp_path)
        assert (own_tokenizer.bos_token, own_tokenizer.eos_token) == ("<bos>", "<eos>")
        assert len(own_tokenizer) == 262_144
        for text in MORE_TEXTS:
            ids = engine.tokenize(text)
            assert own_tokenizer(text).input_ids == ids
            assert saved(text).input_ids == ids
            assert own_tokenizer.decode(ids[1:]) == text

    def test_tokenizer_entries_are_copied(
        self, gemma3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr("slimgpt.exporting.gguf_tokenizer._convert")
        writer, config = GGUFWriter(tmp_path / "x.gguf", "gemma3"), AutoConfig.for_model("llama")
        add_tokenizer(writer, find_model(gemma3), config)
        assert len(writer.kv_data[0]["tokenizer.ggml.tokens"].value) == 262_144

    def test_model_is_that_of_llama_cpp(
        self, dense: PreTrainedModel, own_tokenizer: PreTrainedTokenizerBase, engine: LlamaCpp
    ) -> None:
        """llama.cpp also quantises activations, which alone changes log-probabilities by 0.4.

        With the weights in float32 it differs by less than 0.01.
        """
        model: Any = dense
        assert model.num_parameters() == 268_098_176
        for text in ("The capital of France is", "def f(x):\n    return", TEXTS[5]):
            ids = own_tokenizer(text).input_ids
            top, log_probs = engine.top_log_probs(ids, 20)
            with torch.no_grad():
                ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert ours.argmax() == top[0]
            assert (ours[top] - log_probs).abs().max() < 0.8
            assert (ours[top] - log_probs).abs().mean() < 0.2
        prompt = own_tokenizer("The capital of France is", return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=7, do_sample=False)
        assert own_tokenizer.decode(generated[0, -7:]) == " the capital of the country of France"

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"ratio": 0.2}, marks=pytest.mark.slow),
            {"ratio": 0.33, "uniform": True},
        ],
    )
    def test_pruned(
        self,
        options: dict[str, Any],
        directory: str,
        own_tokenizer: PreTrainedTokenizerBase,
        tmp_path: Path,
    ) -> None:
        result = slimgpt.prune(
            directory, tmp_path / "slim", calibration=TEXT, nsamples=8, seqlen=64,
            widths="scheduled", refit_epochs=0, **options,
        )  # fmt: skip
        assert abs(result.plan.block_ratio - options["ratio"]) < 0.005
        model: Any = AutoModelForCausalLM.from_pretrained(result.output)
        assert model.num_parameters() == result.plan.params_after
        prompt = own_tokenizer("import os", return_tensors="pt").input_ids
        assert_greedy(model, model.generate(prompt, max_new_tokens=4, do_sample=False), 4)
        (measured,) = slimgpt.evaluate(
            result.output, data="pydocs", seqlen=128, max_tokens=256
        ).perplexity
        assert measured.perplexity < 1000  # of 262,144 tokens
        if not options.get("uniform"):
            with pytest.raises(ExportError, match="differ in width"):
                slimgpt.export(str(result.output), tmp_path / "slim.gguf")
            return
        file = slimgpt.export(str(result.output), tmp_path / "slim.gguf", type="f16").output
        top, log_probs = LlamaCpp(file).top_log_probs(prompt[0].tolist(), 5)
        ours = model(prompt).logits[0, -1].log_softmax(-1)
        assert (ours[top] - log_probs).abs().max() < 0.05
