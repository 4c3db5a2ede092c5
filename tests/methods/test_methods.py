"""The rival methods: their scores by hand, and the same way through the pipeline for all."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import TEXT, WIDTHS, make_tiny_model, prune_blocks, sample_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from interruption import InterruptionError, fail_at_block, fingerprint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import slimgpt
from slimgpt.calibration.activations import Activations
from slimgpt.config import Method, PruneConfig
from slimgpt.data.samples import SampleOptions, calibration_tokens
from slimgpt.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from slimgpt.methods import base, compresso, loraprune
from slimgpt.methods.registry import METHODS as REGISTRY
from slimgpt.methods.registry import make_method
from slimgpt.models.blocks import bind
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import unit_columns
from slimgpt.pruning import inputs

OPTIONS = {"calibration": TEXT, "nsamples": 6, "seqlen": 32}
METHODS = [method for method in get_args(Method) if method not in ("slimgpt", "reap")]
COLUMN_METHODS = ("wanda_sp", "flap")


def make(method: str) -> base.Method:
    return make_method(PruneConfig.create(method=method))


def score_model(
    method: str, model: PreTrainedModel, samples: Tensor, widths: Sequence[tuple[int, ...]] = WIDTHS
) -> list[Tensor]:
    return list(make(method).score_model(model, samples, widths).values())


def one_by_one(sublayer: Sublayer, score: Callable[[str, Tensor], float]) -> list[float]:
    """Sum over the weights of each unit, which are found by their indices."""
    sums = []
    for unit in range(sublayer.num_units):
        rows_and_columns = []
        for name, linear in sublayer.inputs.items():
            size = linear.out_features // sublayer.num_units
            rows_and_columns.append((name, slice(unit * size, (unit + 1) * size), slice(None)))
        size = sublayer.unit_size
        output = (sublayer.spec.output, slice(None), slice(unit * size, (unit + 1) * size))
        rows_and_columns.append(output)
        sums.append(sum(score(name, (rows, cols)) for name, rows, cols in rows_and_columns))
    return sums


@pytest.fixture(params=[0, 1], ids=["attention", "ffn"])
def sublayer(request: pytest.FixtureRequest) -> Sublayer:
    return next(bind(make_tiny_model("llama"))).sublayers[request.param]


def test_magnitude_is_the_squared_norm(sublayer: Sublayer) -> None:
    def score(name: str, place: Any) -> float:
        return float(sublayer.module.get_submodule(name).weight[place].double().square().sum())

    activations = Activations(*[torch.empty(0)] * 2, [])
    scores = make("magnitude").score(sublayer, activations)
    assert scores.tolist() == pytest.approx(one_by_one(sublayer, score))


@pytest.mark.parametrize("method", COLUMN_METHODS)
def test_scores_of_columns(method: str, sublayer: Sublayer) -> None:
    x_TI = torch.randn(100, sublayer.output.in_features, dtype=torch.float64).add_(0.5)
    activations = Activations(x_TI.T @ x_TI / len(x_TI), x_TI.mean(dim=0), [])
    weight_OI = sublayer.output.weight.double()
    if method == "flap":
        columns_I = x_TI.var(dim=0, correction=0) * weight_OI.square().sum(dim=0)
    else:
        columns_I = x_TI.square().mean(dim=0).sqrt() * weight_OI.abs().sum(dim=0)
    expected = [
        float(columns_I[unit * sublayer.unit_size :][: sublayer.unit_size].sum())
        for unit in range(sublayer.num_units)
    ]
    scores = make(method).score(sublayer, activations)
    assert scores.tolist() == pytest.approx(expected)


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    model, samples = make_tiny_model("llama"), sample_tokens()
    scores = score_model("taylor", copy.deepcopy(model), samples)
    model.requires_grad_()
    model(samples, labels=samples).loss.backward()  # the mean over the samples
    sublayers = [sublayer for block in bind(model) for sublayer in block.sublayers]
    assert len(scores) == len(sublayers)
    for found, sublayer in zip(scores, sublayers, strict=True):

        def score(name: str, place: Any, module: Any = sublayer.module) -> float:
            weight = module.get_submodule(name).weight
            return float((weight.detach()[place] * weight.grad[place]).abs().sum())

        expected = [6 * value for value in one_by_one(sublayer, score)]
        assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_lora_gradient_masks_what_goes() -> None:
    runs = [score_model("loraprune", make_tiny_model("llama"), sample_tokens(16)) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    keep = [n for width in WIDTHS for n in width]
    assert [int(scores_U.isfinite().sum()) for scores_U in runs[0]] == keep
    assert all((scores_U[scores_U.isfinite()] > 0).all() for scores_U in runs[0])


def test_first_lora_gradient_is_that_of_the_adapters() -> None:
    """Before the first step B is zero, so ĝ = ∂B A, which is the gradient of W times Aᵀ A."""
    model, samples = make_tiny_model("llama"), sample_tokens(1)
    adapted = copy.deepcopy(model)
    dense_widths = [(4, 64)] * 4
    scores = score_model("loraprune", adapted, samples, dense_widths)
    model.requires_grad_()
    model(samples, labels=samples).loss.backward()
    sublayer, projection = list(bind(model))[1].sublayers[1], adapted.model.layers[1].mlp
    total = torch.zeros(sublayer.num_units, dtype=torch.float64)
    for name in (*sublayer.spec.inputs, sublayer.spec.output):
        linear, a = sublayer.module.get_submodule(name), projection.get_submodule(name).lora_A
        a_RI = a["default"].weight.detach()
        gradient_OI = 2 * linear.weight.grad @ a_RI.T @ a_RI  # scale alpha / rank
        squares_OI = (linear.weight * gradient_OI).square().double()
        total += squares_OI.sum(dim=0 if name == sublayer.spec.output else 1).detach()
    found = scores[3] / (1 - loraprune.MOVING_AVERAGE)
    # The optimizer has moved A by its learning rate since.
    torch.testing.assert_close(found, total, rtol=0.01, atol=0)


@given(log_alpha=st.floats(-4, 4))
@settings(max_examples=20, deadline=None)
def test_gates_are_open_as_often_as_they_say(log_alpha: float) -> None:
    gates, generator = compresso.Gates(20_000), torch.Generator().manual_seed(0)
    gates.log_alpha_U = torch.full((20_000,), log_alpha)
    gates.draw(generator)
    (open_U,) = gates(torch.nn.Identity(), (torch.ones(1, 1, 20_000),))
    assert 0 <= open_U.min() <= open_U.max() <= 1
    share = float((open_U > 0).float().mean())
    assert share == pytest.approx(float(gates.open_probability()[0]), abs=0.015)


def test_learnt_gates_keep_the_units_that_matter() -> None:
    """Units whose columns are zero change no loss: only the constraint moves their gates."""
    samples = sample_tokens(24)

    def scores() -> list[Tensor]:
        model = make_tiny_model("llama")
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
            for block in bind(model):
                attention, ffn = block.sublayers
                attention.output.weight[:, : attention.unit_size].zero_()
                ffn.output.weight[:, :32].zero_()
                ffn.output.weight[:, 32:].mul_(20)
        return score_model("compresso", model, samples, [(2, 32)] * 4)

    first, second = scores(), scores()
    assert all(map(torch.equal, first, second))
    assert all((scores_U < compresso.LOG_ALPHA).any() for scores_U in first)
    for scores_U in first[1::2]:
        assert scores_U[:32].mean() < scores_U[32:].mean()


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("method", METHODS)
def test_reported_error_is_the_change_of_the_output(method: str) -> None:
    dense, samples = make_tiny_model("llama"), sample_tokens(8)
    model = copy.deepcopy(dense)
    plans = prune_blocks(model, samples, WIDTHS, PruneConfig.create(method=method))
    # Of the last block, on the stream of the pruned model.
    for place, kind in enumerate(("attention", "ffn")):
        seen: dict[str, Tensor] = {}
        old, new = (list(bind(m))[3].sublayers[place] if m is dense else m for m in (dense, model))
        small = new.model.layers[3]
        output = small.self_attn.o_proj if kind == "attention" else small.mlp.down_proj
        output.register_forward_hook(lambda _, args, out, s=seen: s.update(x=args[0], y=out))
        model(samples)
        keep = plans[3].sublayers[place].keep
        columns = unit_columns(torch.tensor(keep), old.unit_size)
        bias = output.bias if output.bias is not None else torch.zeros(1)
        assert torch.equal(output.weight, old.output.weight[:, columns])
        torch.testing.assert_close(seen["y"], seen["x"] @ output.weight.T + bias)
        # What the dense sublayer would put out on the same stream.
        whole: dict[str, Tensor] = {}
        mixed = copy.deepcopy(model)
        dense_block = copy.deepcopy(dense.model.layers[3])
        if kind == "ffn":
            dense_block.self_attn = mixed.model.layers[3].self_attn
        mixed.model.layers[3] = dense_block
        target = dense_block.self_attn.o_proj if kind == "attention" else dense_block.mlp.down_proj
        target.register_forward_hook(lambda _, args, out, s=whole: s.update(y=out))
        mixed(samples)
        change = (seen["y"] - whole["y"]).double().square().sum(-1).mean()
        assert plans[3].sublayers[place].error == pytest.approx(float(change), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_of_each_method_loads(
    method: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    result = slimgpt.prune(source, output, ratio=0.4, min_ratio=0, method=method, **OPTIONS)
    in_memory = load_model(find_model(source))
    samples = calibration_tokens(TEXT, AutoTokenizer.from_pretrained(output), SampleOptions(6, 32))
    config = PruneConfig.create(method=method)
    prune_blocks(in_memory, samples, result.plan.widths, config)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    tokens = sample_tokens(2, 24)
    assert (loaded(tokens).logits - in_memory(tokens).logits).abs().max() <= 1e-5
    assert loaded.num_parameters() == result.plan.params_after
    assert load_model(find_model(source)).num_parameters() == result.plan.params_before
    assert method in (output / "README.md").read_text()
    assert loaded.config.attention_bias == (method == "flap")


@pytest.mark.parametrize("method", ["flap", "taylor"])
def test_interrupted_runs_end_with_the_same_files(
    method: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, options = str(tiny_checkpoint("llama")), OPTIONS | {"ratio": 0.4, "method": method}
    slimgpt.prune(model, tmp_path / "whole", **options)
    fail_at_block(2, InterruptionError(), monkeypatch)
    with pytest.raises(InterruptionError):
        slimgpt.prune(model, tmp_path / "parts", **options)
    monkeypatch.undo()
    if REGISTRY[method].score_model is not base.Method.score_model:
        monkeypatch.setattr(REGISTRY[method], "score_model", None)
    slimgpt.prune(model, tmp_path / "parts", **options)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_flap_needs_biases(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no biases in their output projections"):
        slimgpt.prune(str(tiny_checkpoint("qwen2")), tmp_path / "slim", method="flap", **OPTIONS)
    assert not (tmp_path / "slim").exists()


def test_methods_have_no_options_of_the_solver() -> None:
    with pytest.raises(ConfigError, match="method='magnitude' has no damping"):
        PruneConfig.create(method="magnitude", damping=0.1)
    with pytest.raises(ConfigError, match="'wanda_sp' has no preset"):
        PruneConfig.create(method="wanda-sp", preset="paper")


@pytest.mark.parametrize("method", ["loraprune", "compresso"])
def test_adapters_need_peft(
    method: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputs, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=f"'{method}' needs the package 'peft'"):
        slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", method=method)
