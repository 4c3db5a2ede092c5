"""Dropped layers and attention that is gone: choice, patch, config, files."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, Run, make_tiny_model, prune_blocks, sample_tokens
from families import MODEL_TYPES, tiny_config, tiny_options
from interruption import InterruptionError, fail_at_block, fingerprint
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import slimgpt
from slimgpt.allocation.shapes import BlockWidths, whole_widths
from slimgpt.calibration.activations import embed
from slimgpt.checkpoint import writer
from slimgpt.checkpoint.depth import first_droppable, without_layers
from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError, UnsupportedModelError
from slimgpt.methods.registry import make_method
from slimgpt.models.blocks import Block, bind, blocks_of
from slimgpt.models.layout import family_in
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import find_model
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weights import open_weights
from slimgpt.pruning import depth
from slimgpt.pruning import prune as prune_module
from slimgpt.pruning.block import Gap, prune_block
from slimgpt.pruning.decisions import SublayerPlan
from slimgpt.pruning.depth import check_same_layers, divergences
from slimgpt.pruning.plan import config_without

OPTIONS: dict[str, Any] = {"calibration": TEXT, "nsamples": 6, "seqlen": 32}

NUM_LAYERS = 5

# What has an entry for each layer, or names layers, in a tiny model of five.
_BY_LAYER: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0]},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]
    },
    "qwen2_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 2},
    "qwen3_moe": {"mlp_only_layers": [2]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "deepseek_v3": {"first_k_dense_replace": 2},
}

_SLIDES = ["sliding_attention", "full_attention", "full_attention"] * 2


def deep_config(model_type: str) -> Any:
    options = _BY_LAYER.get(model_type, {})
    if "layer_types" in tiny_options(model_type) and not options:
        options = {"layer_types": _SLIDES[:NUM_LAYERS]}
    return tiny_config(model_type, num_hidden_layers=NUM_LAYERS, **options)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = make_tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    return save(model, tokenizer, tmp_path_factory.mktemp("llama"))


@torch.no_grad()
def skipped_logits(model: Any, dropped: Sequence[int], tokens_NT: Tensor) -> Tensor:
    """Logits of a model of which some blocks return what they get."""
    returns_tuple = family_in(model.config).returns_tuple
    for index in dropped:
        blocks_of(model)[index].forward = lambda hidden_states, *args, **kwargs: (
            (hidden_states,) if returns_tuple else hidden_states
        )
    return model(tokens_NT, use_cache=False).logits


def load_exact(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    )


# Types whose layers are of several kinds, and some others; `-m slow` has the rest.
VARIED = {
    "llama", "gemma3_text", "cohere2", "exaone4", "smollm3", "olmo3", "qwen2", "qwen3_5_text",
    "qwen2_moe", "glm4_moe", "deepseek_v3", "falcon", "gpt_neox",
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if name in VARIED else pytest.mark.slow) for name in MODEL_TYPES],
)
def test_without_two_layers_the_stock_class_computes_the_same(
    model_type: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deep_config(model_type))
    dense = save(model, tokenizer, tmp_path / "dense")
    options = OPTIONS | {"method": "random", "drop_layers": 2}
    result = slimgpt.prune(str(dense), tmp_path / "slim", **options)
    dropped = result.plan.dropped
    assert len(dropped) == 2
    assert 0 not in dropped
    small = load_exact(result.output)
    assert small.config.model_type == model_type
    assert not hasattr(small.config, "auto_map")
    assert small.num_parameters() == result.plan.params_after
    tokens_NT = sample_tokens(2, 16)
    with torch.no_grad():
        logits = small(tokens_NT, use_cache=False).logits
    expected = skipped_logits(load_exact(dense), dropped, tokens_NT)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


class InMemory:
    """A model whose blocks are all in memory, in place of a `StreamedModel`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def blocks(self, indices: Sequence[int]) -> list[Block]:
        blocks = list(bind(self.model))
        return [blocks[index] for index in indices]


def patched(
    model_type: str, config: PruneConfig, widths: Sequence[BlockWidths] | None = None
) -> tuple[PreTrainedModel, PreTrainedModel, list[SublayerPlan]]:
    """A dense model, and one in which block 1 replaces blocks 2 and 3; its plan."""
    torch.manual_seed(0)
    dense: Any = AutoModelForCausalLM.from_config(deep_config(model_type)).eval()
    dense.requires_grad_(False)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.2)
    model, method = copy.deepcopy(dense), make_method(config)
    stream = embed(model, sample_tokens(12), 3, method.needs_dense)
    first, second = list(bind(model))[:2]
    widths = widths or [whole_widths(block.shape) for block in (first, second)]
    prune_block(first, widths[0], stream, method, 10**9)
    gap: Any = Gap((2, 3), InMemory(copy.deepcopy(dense)))  # pyright: ignore[reportArgumentType]
    plan = prune_block(second, widths[1], stream, method, 10**9, gap)
    return dense, model, list(plan.sublayers)


@torch.no_grad()
def ffn_of(model: Any, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output of an FFN's output projection for the samples, and the hidden states."""
    seen = {}
    projection = list(bind(model))[index].sublayers[1].output.module
    handle = projection.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    states = model(sample_tokens(12), output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return seen["x"].double(), seen["y"].double(), torch.stack(states[:-1]).double()


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("model_type", ["llama", "granite", "gpt2", "phi", "gpt_neox"])
def test_the_patch_is_the_least_squares_solution(model_type: str) -> None:
    """Plain blocks, with biases, with a multiplier, and parallel ones."""
    config = PruneConfig.create(drop_layers=2, damping=1e-9, refit_epochs=0)
    dense, model, plans = patched(model_type, config)
    assert plans[1].replaces == (2, 3)
    assert not plans[0].replaces
    x_NTI, y_NTC, states = ffn_of(dense, 1)
    multiplier = float(getattr(dense.config, "residual_multiplier", 1.0))
    output = list(bind(model))[1].sublayers[1].output
    target_TC = ((states[4] - states[2]) / multiplier + y_NTC).flatten(0, 1)
    x_TI = x_NTI.flatten(0, 1)
    if output.bias is not None:
        x_TI = torch.cat([x_TI, torch.ones_like(x_TI[:, :1])], dim=1)
    solution = torch.linalg.lstsq(x_TI, target_TC).solution.T
    found = (
        output.weight
        if output.bias is None
        else torch.cat([output.weight, output.bias[:, None]], dim=1)
    )
    least = (x_TI @ solution.T - target_TC).norm()
    reached = (x_TI @ found.double().T - target_TC).norm()
    assert reached == pytest.approx(float(least), rel=1e-4)
    torch.testing.assert_close(found.double(), solution, rtol=2e-3, atol=2e-3)
    assert least < 0.97 * target_TC.norm()


@pytest.mark.usefixtures("float32_products")
def test_the_patch_of_a_pruned_ffn_is_the_solution_on_its_channels() -> None:
    config = PruneConfig.create(drop_layers=2, damping=1e-9, refit_epochs=0, correction=0)
    dense, model, plans = patched("mistral", config, [(4, 64), (4, 40)])
    x_NTI, y_NTC, states = ffn_of(dense, 1)
    x_TK = x_NTI.flatten(0, 1)[:, list(plans[1].keep)]
    target_TC = (states[4] - states[2] + y_NTC).flatten(0, 1)
    solution = torch.linalg.lstsq(x_TK, target_TC).solution.T
    found = list(bind(model))[1].sublayers[1].output.weight.double()
    torch.testing.assert_close(found, solution, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("model_type", "replaces"), [("mistral", (2, 3)), ("gemma2", (2, 3)), ("mixtral", ())]
)
def test_the_refit_goes_on_from_the_patch(model_type: str, replaces: tuple[int, ...]) -> None:
    """A norm after the FFN leaves it to the refit; experts have no patch."""
    distances = []
    for epochs in (0, 4):
        config = PruneConfig.create(drop_layers=2, refit_epochs=epochs)
        dense, model, plans = patched(model_type, config)
        after = model(sample_tokens(12), output_hidden_states=True).hidden_states[2]
        states = dense(sample_tokens(12), output_hidden_states=True).hidden_states
        distances.append(float((after - states[4]).norm() / (states[2] - states[4]).norm()))
        assert plans[1].replaces == (replaces if epochs or model_type != "gemma2" else ())
    if model_type == "mistral":
        assert distances[0] < 0.95
    if replaces:
        assert distances[1] < 0.99 * distances[0]
    else:
        assert distances == [1, 1]


def streamed_model(directory: Path) -> StreamedModel:
    source = find_model(str(directory))
    config = load_config(source)
    weights = open_weights(source, config)
    skeleton = build_skeleton(config, weights.dtype)
    weights.check(skeleton)
    return StreamedModel(skeleton, weights, torch.device("cpu"))


@torch.no_grad()
def assembled_divergence(directory: Path, dropped: Sequence[int], tokens_NT: Tensor) -> float:
    """KL(dense ‖ model without some blocks), in nats per token."""
    dense = load_exact(directory)(tokens_NT, use_cache=False).logits.log_softmax(-1)
    other = skipped_logits(load_exact(directory), dropped, tokens_NT).log_softmax(-1)
    return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "mixtral"])
def test_candidates_are_scored_as_if_assembled(
    model_type: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deep_config(model_type))
    directory, tokens_NT = save(model, tokenizer, tmp_path / "dense"), sample_tokens(3, 32)
    streamed = streamed_model(directory)
    for dropped in ([], [3]):
        candidates = [index for index in range(1, NUM_LAYERS) if index not in dropped]
        for index, found in divergences(streamed, tokens_NT, dropped, candidates).items():
            expected = assembled_divergence(directory, [*dropped, index], tokens_NT)
            assert found == pytest.approx(expected, rel=1e-3)


def test_the_choice_is_greedy_on_held_out_samples(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = []

    def recorded(streamed: Any, samples_NT: Tensor, dropped: Any, candidates: Any) -> Any:
        losses = divergences(streamed, samples_NT, dropped, candidates)
        rounds.append((samples_NT, list(dropped), losses))
        return losses

    monkeypatch.setattr(depth, "divergences", recorded)
    result = slimgpt.prune(str(llama), tmp_path / "slim", **OPTIONS, drop_layers=2)
    chosen = [min(losses, key=losses.__getitem__) for _, _, losses in rounds]
    assert [dropped for _, dropped, _ in rounds] == [[], chosen[:1]]
    assert result.plan.dropped == tuple(sorted(chosen))
    assert sorted(rounds[0][2]) == [1, 2, 3, 4]
    assert len(rounds[0][0]) < OPTIONS["nsamples"]
    for _, dropped, losses in rounds:
        for index, loss in losses.items():
            expected = assembled_divergence(llama, [*dropped, index], rounds[0][0])
            assert loss == pytest.approx(expected, rel=0.05)  # products may be in bfloat16


@pytest.mark.parametrize("method", ["slimgpt", "flap"])
def test_layers_and_widths_share_the_ratio(method: str, llama: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"ratio": 0.5, "drop_layers": 1, "method": method}
    plan = slimgpt.prune(str(llama), tmp_path / "slim", **options).plan
    (dropped,) = plan.dropped
    assert plan.widths[dropped] == (0, 0)
    assert plan.layer_ratios[dropped] == 1
    assert plan.block_ratio == pytest.approx(0.5, abs=0.02)
    assert all(any(width) for index, width in enumerate(plan.widths) if index != dropped)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert model.num_parameters() == plan.params_after
    assert slimgpt.plan(str(llama), **options).params_after == pytest.approx(
        plan.params_after, rel=0.02
    )


@pytest.mark.parametrize("method", ["slimgpt", "wanda_sp", "taylor"])
def test_any_method_meets_a_target_without_the_layers(
    method: str, llama: Path, tmp_path: Path
) -> None:
    asked = 80_000
    options = OPTIONS | {"target_params": asked, "drop_layers": 2, "method": method}
    result = slimgpt.prune(str(llama), tmp_path / "slim", **options)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert asked - 8 * 3 * 48 < model.num_parameters() <= asked
    assert result.plan.target
    assert result.plan.target.reached == model.num_parameters()
    replaced = [s.replaces for block in result.blocks for s in block.sublayers if s.replaces]
    assert bool(replaced) == (method == "slimgpt")


def test_a_fraction_is_one_of_the_dense_model(llama: Path) -> None:
    plan = slimgpt.plan(str(llama), target_kv_cache=0.5, drop_layers=2)
    assert sum(width[0] for width in plan.widths) == 0.5 * NUM_LAYERS * 4
    assert plan.target
    assert plan.target.reached == 0.5


def test_measured_widths_around_dropped_layers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_tiny_model("llama", num_hidden_layers=6)
    dense = save(model, tokenizer, tmp_path / "dense")
    options = OPTIONS | {"nsamples": 24, "ratio": 0.5, "drop_layers": 2}
    plan = slimgpt.prune(str(dense), tmp_path / "slim", **options).plan
    assert plan.is_measured
    assert len(plan.dropped) == 2
    assert plan.block_ratio == pytest.approx(0.5, abs=0.02)
    scheduled = slimgpt.prune(
        str(dense), tmp_path / "scheduled", **options, widths="scheduled"
    ).plan
    assert scheduled.dropped == plan.dropped
    assert scheduled.widths != plan.widths


@pytest.mark.parametrize("index", range(4))
def test_a_resumed_run_gives_the_same_files(
    index: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first block, each patched block, and the one after a gap."""
    options = OPTIONS | {"nsamples": 24, "ratio": 0.5, "drop_layers": 2}
    whole = slimgpt.prune(str(llama), tmp_path / "whole", **options)
    kept = [i for i in range(NUM_LAYERS) if i not in whole.plan.dropped]
    places = [(kept[-1], True), *((i, False) for i in kept)]
    fail_at_block(places[index][0], InterruptionError(), monkeypatch, places[index][1])
    with pytest.raises(InterruptionError):
        slimgpt.prune(str(llama), tmp_path / "resumed", **options)
    monkeypatch.undo()
    monkeypatch.setattr(depth, "divergences", None)  # the choice is saved
    resumed = slimgpt.prune(str(llama), tmp_path / "resumed", **options).output
    assert fingerprint(resumed) == fingerprint(whole.output)


def test_the_choice_is_resumed_after_each_layer(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"drop_layers": 2}
    whole = slimgpt.prune(str(llama), tmp_path / "whole", **options).output
    calls = []

    def failing(*args: Any) -> dict[int, float]:
        calls.append(args[2])
        if len(calls) == 2:
            raise InterruptionError
        return divergences(*args)

    monkeypatch.setattr(depth, "divergences", failing)
    with pytest.raises(InterruptionError):
        slimgpt.prune(str(llama), tmp_path / "resumed", **options)
    resumed = slimgpt.prune(str(llama), tmp_path / "resumed", **options).output
    assert fingerprint(resumed) == fingerprint(whole)
    assert len(calls) == 3  # the first layer was not chosen again


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_choose_and_fit_as_one(llama: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"nsamples": 16, "drop_layers": 2, "ratio": 0.5, "refit_epochs": 0}
    alone = slimgpt.prune(str(llama), tmp_path / "alone", **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    output = tmp_path / "together"
    command = ["-m", "slimgpt", "prune", str(llama), "--output", str(output), *flags, "--json"]
    finished = run_ranks(2, *command)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert tuple(report["dropped"]) == alone.plan.dropped
    assert [tuple(width) for width in report["widths"]] == list(alone.plan.widths)
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    for name, tensor in load_file(output / "model.safetensors").items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@torch.no_grad()
def test_a_pruned_model_loses_layers_too(llama: Path, tmp_path: Path) -> None:
    first = slimgpt.prune(str(llama), tmp_path / "first", **OPTIONS, ratio=0.3)
    options = OPTIONS | {"method": "random", "drop_layers": 2}
    second = slimgpt.prune(str(first.output), tmp_path / "second", **options)
    tokens_NT = sample_tokens(2, 16)
    logits = load_exact(second.output)(tokens_NT, use_cache=False).logits
    expected = skipped_logits(load_exact(first.output), second.plan.dropped, tokens_NT)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    third = slimgpt.prune(str(second.output), tmp_path / "third", **OPTIONS, ratio=0.2)
    assert len(third.plan.widths) == NUM_LAYERS - 2


def attention_gone(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Have the allocator take the whole attention of a block, and leave all else."""

    def allocate(job: Any) -> list[BlockWidths]:
        widths = [whole_widths(shape) for shape in job.shapes]
        widths[index] = (0, *widths[index][1:])
        return widths

    monkeypatch.setattr(prune_module, "allocate", allocate)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "phi", "falcon", "mixtral"])
def test_attention_that_is_gone_adds_nothing_but_its_bias(
    model_type: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deep_config(model_type))
    dense = save(model, tokenizer, tmp_path / "dense")
    attention_gone(monkeypatch, 2)
    result = slimgpt.prune(str(dense), tmp_path / "slim", **OPTIONS, ratio=0, method="wanda_sp")
    assert result.blocks[2].sublayers[0].keep == ()
    assert result.blocks[2].sublayers[0].relative_error == pytest.approx(1)
    assert result.plan.widths[2][0] == 0
    assert not result.plan.dropped
    small, reference = load_exact(result.output), load_exact(dense)
    assert small.num_parameters() == result.plan.params_after
    list(bind(reference))[2].sublayers[0].output.weight.zero_()
    tokens_NT = sample_tokens(2, 16)
    logits, expected = (m(tokens_NT, use_cache=False).logits for m in (small, reference))
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    attention, summary = result.plan.shapes[2].sublayers[0], slimgpt.inspect(result.output)
    assert attention.is_fixed or summary.blocks[2].num_kv_heads == 1


@pytest.mark.usefixtures("float32_products")
def test_the_bias_of_attention_that_is_gone_keeps_the_mean() -> None:
    dense = make_tiny_model("llama-biases")
    model = copy.deepcopy(dense)
    config = PruneConfig.create(correction=0)
    prune_blocks(model, sample_tokens(), [(4, 64), (0, 64), (4, 64), (4, 64)], config)
    seen: dict[int, Tensor] = {}
    for index, source in enumerate((dense, model)):
        projection: Any = source.model.layers[1].self_attn.o_proj
        projection.register_forward_hook(lambda _, __, out, i=index: seen.update({i: out}))
        source(sample_tokens())
    mean = seen[0].flatten(0, 1).mean(dim=0)
    torch.testing.assert_close(seen[1], mean.expand_as(seen[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["slimgpt", "wanda_sp"])
def test_a_run_without_an_attention_resumes(
    method: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention_gone(monkeypatch, 1)
    options = OPTIONS | {"ratio": 0, "method": method}
    whole = slimgpt.prune(str(llama), tmp_path / "whole", **options).output
    fail_at_block(2, InterruptionError(), monkeypatch)
    with pytest.raises(InterruptionError):
        slimgpt.prune(str(llama), tmp_path / "resumed", **options)
    monkeypatch.undo()
    attention_gone(monkeypatch, 1)
    resumed = slimgpt.prune(str(llama), tmp_path / "resumed", **options).output
    assert fingerprint(resumed) == fingerprint(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_layers": 5}, "drop_layers=5, but of the 5 layers at most 4 can be dropped"),
        ({"drop_layers": 2, "ratio": 0.3}, r"the 2 dropped layers alone have .* \(40.00%\)"),
        ({"drop_layers": 1, "layer_ratios": (0.5,)}, "nothing to decide to drop_layers"),
        ({"drop_layers": 1, "target_params": 10**7}, "leaves nothing to remove"),
        ({"drop_layers": -1}, "drop_layers=-1"),
    ],
)
def test_impossible_drops(options: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        slimgpt.plan(str(llama), **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "values", "key"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("llama", {"of_each_layer": [1] * NUM_LAYERS}, "of_each_layer"),
    ],
)
def test_configs_that_depend_on_the_index_are_refused(
    model_type: str, values: dict[str, Any], key: str
) -> None:
    config = tiny_config(model_type, num_hidden_layers=NUM_LAYERS, **values)
    with pytest.raises(UnsupportedModelError, match=key) as caught:
        config_without(config, [2])
    assert caught.value.hint


def test_a_classifier_keeps_its_layers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny_config("llama", num_labels=2)
    model = AutoModelForSequenceClassification.from_config(config)
    dense = save(model, tokenizer, tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="no tokens, which --drop-layers needs"):
        slimgpt.prune(str(dense), tmp_path / "slim", **OPTIONS, drop_layers=1, widths="scheduled")


def test_periods_without_a_list_are_refused() -> None:
    config = tiny_config("exaone4", num_hidden_layers=4, layer_types=None)
    values = config.to_dict() | {"layer_types": None}
    with pytest.raises(UnsupportedModelError, match="sliding_window_pattern=4"):
        without_layers(config, values, [2])


def test_a_layer_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deep_config("gemma3_text")
    check_same_layers(config, [1])
    monkeypatch.setattr(
        writer,
        "without_layers",
        lambda config, values, dropped: (
            without_layers(config, values, dropped)
            | {"layer_types": list(config.layer_types[: NUM_LAYERS - 1])}
        ),
    )
    with pytest.raises(UnsupportedModelError, match=r"layer \d would be of another kind"):
        check_same_layers(config, [1])


def test_layers_that_get_image_features_stay() -> None:
    config = CONFIG_MAPPING["qwen3_vl"]()
    assert first_droppable(config) == len(config.vision_config.deepstack_visual_indexes) > 1
    assert first_droppable(deep_config("llama")) == 1


def test_reports_name_the_dropped_layers(llama: Path, tmp_path: Path, run: Run) -> None:
    options = ["--calibration", TEXT, "--nsamples", "6", "--seqlen", "32", "--drop-layers", "2"]
    code, out, _ = run("prune", llama, *options, "--dry-run")
    assert code == 0
    assert "Dropped layers: 3, 4" in out
    assert "assumes the last" in out
    code, out, err = run("prune", llama, *options, "--output", tmp_path / "slim")
    assert code == 0, err
    report = json.loads((tmp_path / "slim" / "pruning_report.json").read_text())
    names = ", ".join(map(str, report["dropped"]))
    assert f"Dropped layers: {names}" in out
    assert report["target_ratio"] == report["block_ratio"] == pytest.approx(0.4)
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "pruned by 40 %" in card
    assert f"| {names} |" in card
    assert "trust_remote" not in card
    code, out, _ = run("inspect", tmp_path / "slim")
    assert f"dropped layers of the base: {names}" in out
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    page = slimgpt.report(tmp_path / "slim").read_text()
    assert "Dropped layers" in page
    assert "Whole layers were removed" in page


def test_gguf_without_layers_has_the_stock_graph(llama: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    options = OPTIONS | {"method": "random", "drop_layers": 2}
    result = slimgpt.prune(str(llama), tmp_path / "slim", **options)
    slimgpt.export(str(result.output), tmp_path / "model.gguf", to="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["llama.block_count"].contents() == NUM_LAYERS - 2
    assert reader.fields["llama.feed_forward_length"].contents() == 64
