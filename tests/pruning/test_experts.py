"""Experts: their statistics and scores against brute force, and what is left after pruning."""

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, sample_tokens
from families import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from interruption import InterruptionError, fingerprint
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimgpt
from slimgpt.allocation.schedule import EXPERT_STEP, WidthRules
from slimgpt.allocation.shapes import SublayerShape, Width
from slimgpt.calibration.activations import Stream
from slimgpt.calibration.routing import rerouting_errors, weighted_norms
from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError, UnsupportedModelError
from slimgpt.methods.base import Decision, Method
from slimgpt.methods.registry import make_method
from slimgpt.methods.slimgpt import SlimGPT
from slimgpt.models.blocks import bind
from slimgpt.models.experts import Experts
from slimgpt.models.family import load_families
from slimgpt.models.sublayers import Sublayer
from slimgpt.pruning.experts import TOKENS_PER_CHANNEL, prune_experts
from slimgpt.pruning.slicing import slice_sublayer

MIXTURES = sorted(
    model_type
    for model_type, family in load_families().items()
    if any(spec.kind == "experts" for spec in family.sublayers)
)

OPTIONS = {"calibration": TEXT, "nsamples": 8, "seqlen": 32, "ratio": 0.3, "min_ratio": 0.25}


def make_model(model_type: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(model_type, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def experts_of(model: PreTrainedModel) -> Experts:
    return next(s for block in bind(model) for s in block.sublayers if isinstance(s, Experts))


def make_stream(num_samples: int = 8, dense: bool = False) -> Stream:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_samples, 32, 48, dtype=torch.float64, generator=generator)
    other = hidden + 0.1 * torch.randn(hidden.shape, dtype=torch.float64, generator=generator)
    return Stream(hidden, other if dense else None, 2, [{}] * 3)


def method_of(**options: Any) -> Method:
    return make_method(PruneConfig.create(**options))


def output_of(experts: Experts, stream: Stream) -> Tensor:
    return experts.forward(experts.normed(stream.hidden_NTC)).flatten(0, 1)


class Spy:
    """A method that keeps the statistics it is given, and decides like another one."""

    def __init__(self, method: Method) -> None:
        self.method, self.seen = method, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def decide(self, sublayer: Any, width: Width, activations: Any) -> Decision:
        cross = activations.cross_OI
        self.seen[sublayer.name] = (
            activations.hessian_II.clone(),
            None if cross is None else cross.clone(),
        )
        return self.method.decide(sublayer, width, activations)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_sublayer_computes_what_the_stock_class_does(model_type: str) -> None:
    model = make_model(model_type)
    model.set_experts_implementation("eager")
    experts, stream = experts_of(model), make_stream()
    normed = experts.normed(stream.hidden_NTC)
    torch.testing.assert_close(experts.forward(normed), experts.module(normed))


def test_the_statistics_of_an_expert_are_weighted_by_the_router() -> None:
    experts, stream = experts_of(make_model("mixtral")), make_stream(64)
    spy = Spy(method_of(correction=0))
    prune_experts(experts, (6, 40), stream, spy)
    normed = experts.normed(stream.hidden_NTC).flatten(0, 1)
    _, weights, index = experts.router(normed)
    num_tokens, borrowed = len(normed), 0
    for expert in range(6):
        hidden = torch.nn.functional.linear(normed, experts.weights.gate_up_proj[expert])
        gate, up = hidden.chunk(2, dim=1)
        factor = (weights * (index == expert)).sum(dim=1, keepdim=True)
        inputs = factor * experts.weights.act_fn(gate) * up
        wanted = inputs.T @ inputs / num_tokens
        own = int((index == expert).sum()) / (TOKENS_PER_CHANNEL * 64)
        if own < 1:
            borrowed += 1
            every = experts.weights.act_fn(gate) * up
            rows = torch.arange(0, num_tokens, num_tokens // (TOKENS_PER_CHANNEL * 64))
            mean_square = factor.square().sum() / (index == expert).sum()
            share = (index == expert).sum() / num_tokens
            others = every[rows].T @ every[rows] / len(rows) * mean_square * share
            wanted = own * wanted + (1 - own) * others
        found, _ = spy.seen[f"{experts.name}.experts.{expert}"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert borrowed < 6


@pytest.mark.parametrize("method", ["slimgpt", "magnitude"])
def test_to_keep_everything_changes_nothing(method: str) -> None:
    experts = experts_of(make_model("qwen3_moe"))
    plan, weight = prune_experts(experts, 6, make_stream(), method_of(method=method))
    torch.testing.assert_close(weight, experts.weights.down_proj, rtol=1e-5, atol=1e-6)
    assert plan.keep == tuple(range(6))
    assert plan.routing is not None
    assert plan.routing.rerouted == plan.routing.load_shift == 0
    assert plan.relative_error < 1e-9


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "granitemoe", "deepseek_v2", "deepseek_v3"]
)
def test_the_score_of_an_expert_is_the_error_without_it(model_type: str) -> None:
    options = {"topk_method": "group_limited_greedy", "n_group": 2} if "v2" in model_type else {}
    experts, stream = experts_of(make_model(model_type, **options)), make_stream(4)
    found, dense = rerouting_errors(experts, stream), output_of(experts, stream)
    for expert in range(experts.num_units):
        rest = torch.tensor([e for e in range(experts.num_units) if e != expert])
        without = output_of(replace(experts, routed_E=rest), stream)
        assert float(found[expert]) == pytest.approx(float((without - dense).square().sum()), 1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_an_expert_without_tokens_goes_first(model_type: str) -> None:
    experts, stream = experts_of(make_model(model_type)), make_stream()
    direction = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scales = torch.tensor([1.0, 1.01, 0.99, -1.0, -1.01, -0.99], dtype=torch.float64)
    experts.router.weight.copy_(scales[:, None] * direction / 2)  # two of each three are never best
    normed = experts.normed(stream.hidden_NTC).flatten(0, 1)
    unused = set(range(6)) - set(experts.route(normed).index_TK.unique().tolist())
    assert unused
    for score in (rerouting_errors, weighted_norms):
        assert {int(e) for e in (score(experts, stream) == 0).nonzero()} == unused
    plan, _ = prune_experts(experts, 6 - len(unused), stream, method_of())
    assert set(plan.keep) == set(range(6)) - unused


def test_reap_weighs_the_norms_of_the_outputs() -> None:
    experts, stream = experts_of(make_model("olmoe")), make_stream(4)
    normed = experts.normed(stream.hidden_NTC).flatten(0, 1)
    routing, found = experts.route(normed), weighted_norms(experts, stream)
    for expert in range(6):
        tokens, factors = routing.tokens_of(expert)
        norms = experts.expert(expert).forward(normed[tokens]).norm(dim=1)
        assert float(found[expert]) == pytest.approx(float((factors[:, 0] * norms).mean()), 1e-6)


@pytest.mark.parametrize("width", [4, (6, 40), (4, 48)])
@pytest.mark.parametrize("dense", [False, True])
def test_compensation_lowers_the_error(width: Width, dense: bool) -> None:
    """The error in the plan is that of the sliced sublayer, and below that without compensation."""
    experts = experts_of(make_model("mixtral"))
    options = {"correction": 0.5 if dense else 0.0}
    plan, weight = prune_experts(experts, width, make_stream(64, dense), method_of(**options))
    stream = make_stream(64, dense)
    target = output_of(experts, stream)
    if dense:
        assert stream.dense_NTC is not None
        moved = stream.dense_NTC + experts.forward(experts.normed(stream.dense_NTC))
        target.lerp_((moved - stream.hidden_NTC).flatten(0, 1), 0.5)
    kept = plan.kept(torch.device("cpu"))
    errors = []
    for output in (weight, experts.kept_output(kept)):
        sliced = experts_of(make_model("mixtral"))
        slice_sublayer(sliced, kept, output.clone())
        errors.append(float((output_of(sliced, stream) - target).square().sum(dim=1).mean()))
    assert plan.error == pytest.approx(errors[0], rel=1e-4)
    assert errors[0] < 0.9 * errors[1]


def test_as_many_experts_go_from_every_group() -> None:
    model = make_model("deepseek_v3")
    experts = experts_of(model)
    plan, weight = prune_experts(experts, 10, make_stream(), method_of())
    assert sorted(e // 8 for e in plan.keep) == [0] * 5 + [1] * 5
    slice_sublayer(experts, plan.kept(torch.device("cpu")), weight)
    assert experts.router.weight.shape == (10, 48)
    assert experts.router.e_score_correction_bias.shape == (10,)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 400),
    st.integers(1, 16),
    st.sampled_from(["channels", "experts", "both"]),
)
def test_widths_of_experts(
    groups: int, fewest: int, more: int, channels: int, step: int, units: str
) -> None:
    number = groups * (fewest + more)
    shape = SublayerShape(
        "experts", number, channels * 12 + 5, False, channels, 12, groups * fewest, groups
    )
    widths = WidthRules(step, expert_units=units).widths(shape)
    params = [shape.kept_params(width) for width in widths]
    assert params == sorted(set(params))
    assert widths[-1] == number
    for width in widths:
        experts, left = (width, channels) if isinstance(width, int) else width
        assert groups * fewest <= experts <= number
        assert experts % groups == 0
        assert left == channels or left % math.lcm(step, EXPERT_STEP) == 0
        assert units != "channels" or channels == 1 or experts == number
        assert units != "experts" or left == channels


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    written: dict[str, Path] = {}

    def write(model_type: str) -> Path:
        if model_type not in written:
            written[model_type] = tmp_path_factory.mktemp(model_type)
            make_model(model_type).float().save_pretrained(written[model_type])
            tokenizer.save_pretrained(written[model_type])
        return written[model_type]

    return write


@pytest.mark.parametrize("units", ["channels", "experts", "both"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_uniform_results_keep_the_original_layout(
    units: str, model_type: str, dense: Any, tmp_path: Path
) -> None:
    options = OPTIONS | {"min_ratio": None, "uniform": True, "expert_units": units}
    result = slimgpt.prune(str(dense(model_type)), tmp_path / "slim", **options)
    with (
        safe_open(result.output / "model.safetensors", "pt") as small,
        safe_open(dense(model_type) / "model.safetensors", "pt") as large,
    ):
        assert set(small.keys()) <= set(large.keys())
        assert (set(small.keys()) < set(large.keys())) == (units != "channels")
        assert any(".experts.0." in name for name in small.keys())  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert model.config.model_type == model_type
    values = json.loads((result.output / "config.json").read_text())
    key = "num_local_experts" if model_type == "mixtral" else "num_experts"  # in transformers 4
    assert values[key] == len(result.blocks[0].sublayers[1].keep)
    assert model.num_parameters() == result.plan.params_after
    assert experts_of(model).router.top_k == 2
    kept = {s.keep for block in result.blocks for s in block.sublayers if s.kind == "experts"}
    assert len({len(keep) for keep in kept}) == 1


@pytest.mark.parametrize("method", ["reap", "random", "slimgpt"])
def test_whole_experts_by_any_method(method: str, dense: Any, tmp_path: Path) -> None:
    options = OPTIONS | {"expert_units": "experts", "attention_share": 0, "method": method}
    result = slimgpt.prune(str(dense("granitemoe")), tmp_path / "slim", **options)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert model(sample_tokens(2, 16), use_cache=False).logits.isfinite().all()
    numbers = [block.num_experts for block in slimgpt.inspect(result.output).blocks]
    assert numbers == [len(block.sublayers[1].keep) for block in result.blocks]
    assert max(numbers) < 6
    assert all(number >= 2 for number in numbers)
    report = json.loads((result.output / "pruning_report.json").read_text())
    routing = [block["sublayers"][1]["routing"] for block in report["blocks"]]
    assert all(0 < change["rerouted"] < 1 for change in routing)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("taylor", {}, "taylor cannot remove channels of experts"),
        ("magnitude", {"expert_units": "experts"}, "magnitude cannot remove experts"),
        ("reap", {}, "reap cannot remove channels of experts or groups"),
    ],
)
def test_methods_say_what_they_cannot_remove(
    method: str, options: dict[str, Any], message: str, dense: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        slimgpt.prune(str(dense("mixtral")), tmp_path / "slim", **OPTIONS, method=method, **options)
    assert not (tmp_path / "slim").exists()


def test_experts_with_few_tokens_are_reported(
    dense: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = slimgpt.prune(
            str(dense("mixtral")), tmp_path / "slim", **OPTIONS | {"nsamples": 4}
        )
    routing = result.blocks[-1].sublayers[1].routing
    assert routing is not None
    assert routing.few_tokens
    assert "calibration tokens for each of their channels" in caplog.text


def test_layers_for_several_tokens_are_left_out(
    dense: Any, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("glm4_moe").float()
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file) | {"model.layers.3.eh_proj.weight": torch.zeros(48, 96)}
    save_file(tensors, file, {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        result = slimgpt.prune(str(tmp_path / "dense"), tmp_path / "slim", **OPTIONS)
    assert "no layers for multi-token prediction; 1 tensors are left out" in caplog.text
    assert not any("layers.3" in name for name in load_file(result.output / "model.safetensors"))


def test_two_processes_agree_with_one(dense: Any, tmp_path: Path) -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
    results = []
    for number in (1, 2):
        output = tmp_path / str(number)
        arguments = ["prune", dense("mixtral"), "--output", output, "--expert-units=both"]
        finished = run_ranks(number, "-m", "slimgpt", *arguments, *options, "--dtype=float32")
        assert finished.returncode == 0, finished.stderr
        report = json.loads((output / "pruning_report.json").read_text())
        kept = [s["keep"] for block in report["blocks"] for s in block["sublayers"]]
        results.append((kept, load_file(output / "model.safetensors")))
    (kept, one), (kept_by_two, two) = results
    assert kept == kept_by_two
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert float((tensor - two[name]).norm() / tensor.norm()) < 1e-4, name


@pytest.mark.parametrize("memory", [10**9, 0], ids=["in memory", "in mapped files"])
def test_a_run_that_ends_between_two_experts_goes_on(
    memory: int, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"expert_units": "both", "activation_memory": memory}
    whole = slimgpt.prune(str(dense("mixtral")), tmp_path / "whole", **options)
    decide, decided = SlimGPT.decide, list[str]()

    def ends(method: SlimGPT, sublayer: Sublayer, *args: Any) -> Decision:
        decided.append(sublayer.name)
        if sublayer.block == 2 and sum("layers.2.mlp.experts" in name for name in decided) == 2:
            raise InterruptionError
        return decide(method, sublayer, *args)

    monkeypatch.setattr(SlimGPT, "decide", ends)
    with pytest.raises(InterruptionError):
        slimgpt.prune(str(dense("mixtral")), tmp_path / "resumed", **options)
    monkeypatch.undo()
    resumed = slimgpt.prune(str(dense("mixtral")), tmp_path / "resumed", **options)
    assert fingerprint(resumed.output) == fingerprint(whole.output)


@pytest.mark.parametrize("units", ["both", "experts"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_experts_in_mapped_files_give_the_same_result(
    units: str, model_type: str, dense: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From experts that are stored singly, and, where the file is a result, from fused ones."""
    model, options = dense(model_type), OPTIONS | {"expert_units": units}
    for step in ("once", "twice"):
        outputs = []
        for memory in (10**9, 0):
            output = tmp_path / f"{step}-{memory}"
            with caplog.at_level(logging.INFO):
                caplog.clear()
                slimgpt.prune(str(model), output, **options, activation_memory=memory)
            assert ("the experts of a layer too" in caplog.text) == (memory == 0)
            outputs.append(load_file(output / "model.safetensors"))
            assert not list(output.glob(".slimgpt"))
        for name, tensor in outputs[0].items():
            assert torch.equal(tensor, outputs[1][name]), name
        model = tmp_path / "once-0"


def edit_tensors(folder: Path, source: Path, change: Any) -> Path:
    """Copy a checkpoint with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


FIRST = "model.layers.0.block_sparse_moe.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.3.w1.weight"), "3 is missing"),
        (lambda t: t.update({f"{FIRST}.7.w2.weight": t.pop(f"{FIRST}.3.w2.weight")}), "3 is"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(6, 48, 64)}),
            "are the same tensor",
        ),
    ],
)
def test_experts_must_be_whole(change: Any, message: str, dense: Any, tmp_path: Path) -> None:
    model = edit_tensors(tmp_path / "model", dense("mixtral"), change)
    with pytest.raises(UnsupportedModelError, match=message):
        slimgpt.prune(str(model), tmp_path / "slim", **OPTIONS)
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_group": None}, "n_group=None"),
        ({"n_group": 3}, "does not divide"),
        ({"n_group": 16}, "less than 2 in each group"),
        ({"topk_group": 3}, "topk_group=3 of 2 groups"),
        ({"num_experts_per_tok": 17}, "but there are 16 experts"),
    ],
)
def test_groups_of_experts_are_checked(
    values: dict[str, Any], message: str, dense: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense("deepseek_v3"), model)
    config = json.loads((model / "config.json").read_text()) | values
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        slimgpt.plan(str(model))


def test_adapters_train_attention(dense: Any, tmp_path: Path) -> None:
    slim = slimgpt.prune(str(dense("mixtral")), tmp_path / "slim", **OPTIONS).output
    options = {"data": TEXT, "eval_data": TEXT, "seqlen": 32, "max_steps": 2, "eval_tokens": 64}
    recovered = slimgpt.recover(str(slim), tmp_path / "recovered", **options).output
    before, after = (load_file(d / "model.safetensors") for d in (slim, recovered))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("self_attn" in name for name in changed)


def test_the_loss_of_routers_is_off_where_layers_differ(tmp_path: Path, tokenizer: Any) -> None:
    model = make_model("mixtral").float()
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = OPTIONS | {"expert_units": "experts"}
    result = slimgpt.prune(str(tmp_path / "dense"), tmp_path / "slim", **options)
    slim = AutoModelForCausalLM.from_pretrained(result.output)
    assert slim(sample_tokens(1, 8)).logits.isfinite().all()
