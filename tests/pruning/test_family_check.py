"""A description that is wrong is refused before any work, with the tensor or the difference."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT, Run
from families import MODEL_TYPES, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import slimgpt
from slimgpt.errors import UnsupportedModelError
from slimgpt.models import family as module
from slimgpt.models.family import (
    TESTED_VERSIONS,
    WRAPPER_TYPES,
    Family,
    load_families,
    load_unsupported,
)
from slimgpt.models.loading import load_config
from slimgpt.models.source import Source
from slimgpt.pruning.family_check import check_family

ROOT = Path(__file__).parents[2]


def changed(family: Family, kind: str = "", **values: Any) -> Family:
    """Another description: other values of the family, or of its first sublayer of a kind."""
    if not kind:
        return family.model_copy(update=values)
    sublayers = list(family.sublayers)
    index = next(i for i, spec in enumerate(sublayers) if spec.kind == kind)
    sublayers[index] = sublayers[index].model_copy(update=values)
    return family.model_copy(update={"sublayers": tuple(sublayers)})


Describe = Callable[..., None]


@pytest.fixture
def describe(monkeypatch: pytest.MonkeyPatch) -> Describe:
    def replace(model_type: str, *args: Any, **values: Any) -> None:
        families = dict(load_families())
        families[model_type] = changed(families[model_type], *args, **values)
        monkeypatch.setattr(module, "load_families", lambda: families)

    return replace


WRONG = {
    "no norm after": ("gemma2", "attention", {"post_norm": ()}, "differ by"),
    "no norm before": ("llama", "ffn", {"norm": ()}, "differ by"),
    "no multiplier": ("granite", "", {"multiplier": None}, "differ by"),
    "one after the other": ("cohere", "", {"parallel": False}, "differ by"),
    "all at once": ("llama", "", {"parallel": True}, "differ by"),
    "no tuple": ("falcon", "", {"returns_tuple": False}, "without its blocks"),
    "q and k swapped": (
        "phi3",
        "attention",
        {"inputs": {"qkv_proj": ("group", "head", "group")}},
        "something else than the dense",
    ),
    "gate and up as one": (
        "phi3",
        "ffn",
        {"inputs": {"gate_up_proj": ("channel",)}},
        "something else than the dense",
    ),
    "a norm left out": (
        "olmo2",
        "attention",
        {"vectors": {"k_norm": ("group",)}},
        "self_attn.q_norm.weight",
    ),
    "a projection left out": (
        "llama",
        "ffn",
        {"inputs": {"up_proj": ("channel",)}},
        "mlp.gate_proj",
    ),
    "units that depend on each other": (
        "olmo2",
        "attention",
        {"couples_units": False},
        "something else than the dense",
    ),
    "heads of another size": ("gpt2", "attention", {"rebuilt": False}, "block 0, attention"),
    "rows of a group one after the other": (
        "gpt_neox",
        "attention",
        {"interleaved": False},
        "something else than the dense",
    ),
    "rows of heads one after the other": (
        "falcon",
        "attention",
        {"interleaved": False},
        "something else than the dense",
    ),
    "rows of all heads group by group": (
        "phi3",
        "attention",
        {"interleaved": True},
        "something else than the dense",
    ),
    "heads that are no groups": (
        "gpt_neox",
        "attention",
        {"inputs": {"query_key_value": ("head", "head", "head")}, "interleaved": False},
        "something else than the dense",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(case: str, describe: Describe) -> None:
    model_type, kind, values, message = WRONG[case]
    config = tiny_config(model_type, initializer_range=0.01)
    describe(model_type, kind, **values)
    with pytest.raises(UnsupportedModelError, match=message):
        check_family(config)


def test_nothing_is_done_before(describe: Describe, tmp_path: Path, tokenizer: Any) -> None:
    AutoModelForCausalLM.from_config(tiny_config("gemma2")).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    describe("gemma2", "ffn", post_norm=())
    with pytest.raises(UnsupportedModelError, match="block 0 computes something else"):
        slimgpt.prune(str(tmp_path / "dense"), tmp_path / "slim", calibration=TEXT)
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_descriptions_hold(model_type: str) -> None:
    found = check_family(tiny_config(model_type))
    assert max(found.differences.values()) < 1e-6
    kinds = {(s.block, s.kind): s for s in found.sublayers}
    assert {"attention"} < {kind for _, kind in kinds} <= {"attention", "ffn", "experts"}
    assert all(s.difference is None or s.difference < 1e-6 for s in found.sublayers)
    assert any(s.difference is not None for s in found.sublayers)


FALCONS = {
    "groups": ({"new_decoder_architecture": True}, 2),
    "query heads of one group": ({"new_decoder_architecture": False, "multi_query": True}, 1),
    "heads": (
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 8},
        1,
    ),
    "with ALiBi": ({"new_decoder_architecture": True, "alibi": True}, 0),
}


def test_modules_of_another_form_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise IndexError("too many values")

    monkeypatch.setattr("slimgpt.pruning.family_check.pass_block", fail)
    with pytest.raises(UnsupportedModelError, match=r"block 0 does not run .* too many") as error:
        check_family(tiny_config("llama", vocab_size=321))  # not checked before
    assert "version of transformers" in str(error.value.hint)


@pytest.mark.parametrize("form", FALCONS)
def test_the_attention_of_all_forms_of_falcon(form: str) -> None:
    options, removals = FALCONS[form]
    found = check_family(tiny_config("falcon", **options)).sublayers
    differences = [s.difference for s in found if s.kind == "attention" and s.tensors]
    assert len(differences) == removals
    assert all(difference < 1e-6 for difference in differences)


def test_norms_of_single_heads_keep_attention_whole() -> None:
    found = check_family(tiny_config("stablelm", qk_layernorm=True)).sublayers
    assert [s.kind for s in found if s.tensors] == ["ffn"]


@settings(derandomize=True, deadline=None, database=None, max_examples=12)
@given(
    st.sampled_from(["llama", "phi3", "cohere", "gemma3_text"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(3, 40),
)
def test_any_widths(model_type: str, groups: int, per_group: int, size: int, channels: int) -> None:
    config = tiny_config(
        model_type,
        num_key_value_heads=groups,
        num_attention_heads=groups * per_group,
        hidden_size=24 * groups * per_group,
        head_dim=4 * size,
        intermediate_size=channels,
    )
    assert max(check_family(config).differences.values()) < 1e-6


@pytest.mark.parametrize("used", [1, 4, 5, 6])
def test_tokens_that_use_most_experts(used: int) -> None:
    found = check_family(tiny_config("mixtral", num_experts_per_tok=used))
    differences = [s.difference for s in found.sublayers if s.kind == "experts"]
    assert (differences[0] is None) == (used == 6)
    assert differences[1] is not None


def test_every_kind_of_layer_is_checked() -> None:
    assert list(check_family(tiny_config("gemma3_text")).differences) == [0, 1]
    assert list(check_family(tiny_config("smollm3")).differences) == [0, 2]
    assert list(check_family(tiny_config("llama")).differences) == [0]


def test_command_line(run: Run, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("phi3")).save_pretrained(tmp_path)
    code, out, _ = run("inspect", tmp_path, "--check")
    assert code == 0
    assert "qkv_proj.weight" in out
    code, out, _ = run("families")
    assert code == 0
    assert all(model_type in out for model_type in MODEL_TYPES)
    assert "Gemma 3 270M" in out
    assert "all tested with random weights on transformers 5.16.0 and 5.23.0" in out
    rebuilt = "falcon, gpt2, gpt_neox, helium, opt, qwen2_5_vl_text, qwen2_vl_text, stablelm"
    assert f"the attention of {rebuilt} stays whole with --uniform" in " ".join(out.split())
    for reason, types in load_unsupported().items():
        assert f"{', '.join(types)}: {reason}" in " ".join(out.split())


def test_the_tested_versions_are_those_that_are_allowed_and_used() -> None:
    oldest, newest = TESTED_VERSIONS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"transformers>={oldest.removesuffix('.0')}" in project["dependencies"]
    assert f"transformers=={newest}" in (ROOT / "constraints.txt").read_text().splitlines()


UNSUPPORTED = [(t, reason) for reason, types in load_unsupported().items() for t in types]


@pytest.mark.parametrize(("model_type", "reason"), UNSUPPORTED)
def test_types_that_are_refused_with_a_reason(model_type: str, reason: str, tmp_path: Path) -> None:
    assert model_type in CONFIG_MAPPING
    assert model_type not in (*load_families(), *WRAPPER_TYPES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModelError) as error:
        load_config(Source("m", str(tmp_path)))
    assert str(error.value) == f"models of type {model_type!r} are not supported: {reason}"
    assert "supported model types: apertus" in str(error.value.hint)
