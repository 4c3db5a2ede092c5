"""The pipeline on tiny models of every family."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    TEXT,
    VARIANTS,
    WIDTHS,
    assert_greedy,
    make_tiny_model,
    prune_blocks,
    sample_tokens,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import slimgpt
from slimgpt.calibration import activations
from slimgpt.calibration.activations import collect, embed
from slimgpt.config import PruneConfig
from slimgpt.data.samples import SampleOptions, calibration_tokens
from slimgpt.errors import ConfigError, DataError
from slimgpt.methods import slimgpt as slimgpt_method
from slimgpt.methods.registry import make_method
from slimgpt.models import device
from slimgpt.models.blocks import bind
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.units import unit_columns
from slimgpt.pruning import sequential
from slimgpt.pruning.block import prune_block
from slimgpt.pruning.decisions import BlockPlan
from slimgpt.solver import elimination, hessian

OPTIONS = {"calibration": TEXT, "nsamples": 6, "seqlen": 32}


def pruned(
    variant: str, **options: object
) -> tuple[PreTrainedModel, PreTrainedModel, list[BlockPlan]]:
    dense = make_tiny_model(variant)
    model = copy.deepcopy(dense)
    plans = prune_blocks(model, sample_tokens(), WIDTHS, PruneConfig.create(**options))
    return dense, model, plans


@pytest.mark.parametrize("variant", VARIANTS)
def test_slicing_equals_masking(variant: str) -> None:
    masked, model, plans = pruned(variant, refit_epochs=0)
    for block, small, plan in zip(bind(masked), model.model.layers, plans, strict=True):
        for sublayer, kept, new in (
            (block.sublayers[0], plan.sublayers[0].keep, small.self_attn.o_proj),
            (block.sublayers[1], plan.sublayers[1].keep, small.mlp.down_proj),
        ):
            columns = unit_columns(torch.tensor(kept), sublayer.unit_size)
            weight = torch.zeros_like(sublayer.output.weight)
            weight[:, columns] = new.weight
            sublayer.output.module.weight = nn.Parameter(weight)
            sublayer.output.module.bias = new.bias
    tokens = sample_tokens(2, 24)
    torch.testing.assert_close(model(tokens).logits, masked(tokens).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_widths_and_report_match_the_plan(variant: str) -> None:
    dense, model, plans = pruned(variant)
    for block, small, plan, width in zip(
        bind(dense), model.model.layers, plans, WIDTHS, strict=True
    ):
        assert len(plan.sublayers[1].keep) == width[1] == small.mlp.gate_proj.out_features
        assert len(plan.sublayers[0].keep) == width[0]
        assert small.self_attn.o_proj.in_features == width[0] * block.sublayers[0].unit_size
        for kept, error in (
            (width[0] == block.sublayers[0].num_units, plan.sublayers[0].error),
            (width[1] == 64, plan.sublayers[1].error),
        ):
            assert (error == 0) == kept


def test_ratio_zero_is_the_identity() -> None:
    dense = make_tiny_model("llama")
    model = copy.deepcopy(dense)
    prune_blocks(model, sample_tokens(), ((4, 64),) * 4, PruneConfig.create())
    tokens = sample_tokens(2, 24)
    assert torch.equal(model(tokens).logits, dense(tokens).logits)


@pytest.mark.usefixtures("float32_products")
def test_reported_error_is_the_change_of_the_output() -> None:
    """Run the first block by hand: E‖Δy‖² and E‖y‖² over the calibration tokens."""
    dense = make_tiny_model("llama")
    stream = embed(dense, sample_tokens(), batch_size=3)
    block = next(iter(bind(dense)))
    activations = collect(block.sublayers[1], stream, 0)
    assert activations.hessian_II.dtype == torch.float64
    widths = ((4, 32), *WIDTHS[1:])
    config = PruneConfig.create(correction=0)
    plan = prune_blocks(copy.deepcopy(dense), sample_tokens(), widths, config)[0]
    seen = {}
    handle = dense.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda _, args, out: seen.update(x=args[0], y=out)
    )
    dense(sample_tokens())
    handle.remove()
    x_TI, y_TO = (seen[key].flatten(0, 1).double() for key in "xy")
    problem = hessian.prepare(dense.model.layers[0].mlp.down_proj.weight, x_TI.T @ x_TI / len(x_TI))
    left = elimination.eliminate_channels(problem, 32)
    assert plan.sublayers[1].keep == tuple(left.kept_K.tolist())
    change = (x_TI[:, left.kept_K] @ left.weight_OK.double().T - y_TO).square().sum(1).mean()
    assert plan.sublayers[1].error == pytest.approx(float(change), rel=1e-4)
    assert plan.sublayers[1].relative_error == pytest.approx(
        float(change / y_TO.square().sum(1).mean()), rel=1e-4
    )


def test_products_in_bfloat16_change_the_statistics_by_their_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, hessians = make_tiny_model("llama"), []
    for capabilities in ({}, {"bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        stream = embed(dense, sample_tokens(), batch_size=3)
        block = next(iter(bind(dense)))
        hessians.append(collect(block.sublayers[1], stream, 0).hessian_II)
        assert stream.hidden_NTC.dtype == torch.float32
    difference = torch.linalg.norm(hessians[1] - hessians[0]) / torch.linalg.norm(hessians[0])
    assert 0 < difference < 2**-7


def test_sums_of_bfloat16_numbers_lose_no_more_than_float32() -> None:
    dense = make_tiny_model("llama").bfloat16()
    stream = embed(dense, sample_tokens(), batch_size=3)
    block = next(iter(bind(dense)))
    before = torch.backends.mkldnn.matmul.fp32_precision
    with device.exact_products(stream.hidden_NTC):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    activations = collect(block.sublayers[1], stream, 10**9)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    x_TI = torch.cat(activations.kept).flatten(0, 1).double()
    expected = x_TI.T @ x_TI / len(x_TI)
    torch.testing.assert_close(activations.hessian_II, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("float32_products")
def test_second_block_is_calibrated_on_the_pruned_first() -> None:
    dense, model, plans = pruned("llama")
    first_only = copy.deepcopy(dense)
    first_only.model.layers[0] = model.model.layers[0]
    seen = {}
    first_only.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda _, args, out: seen.update(x=args[0])
    )
    first_only(sample_tokens())
    x_TI = seen["x"].flatten(0, 1).double()
    weight = dense.model.layers[1].self_attn.o_proj.weight
    problem = hessian.prepare(weight, x_TI.T @ x_TI / len(x_TI))
    errors = elimination.unit_errors(problem.weight_OI, problem.inverse_II, 16)
    assert set(range(4)) - set(plans[1].sublayers[0].keep) == {int(errors.argmin())}


@pytest.mark.parametrize("variant", ["llama", "llama-biases"])
def test_correction_brings_the_residual_stream_nearer_to_the_dense_one(variant: str) -> None:
    errors = []
    for correction in (0, 0.5, 1):
        dense, model, _ = pruned(variant, correction=correction)
        last, last_dense = (
            m.model(sample_tokens(), output_hidden_states=True).hidden_states[-2]
            for m in (model, dense)
        )
        errors.append(float((last - last_dense).square().mean()))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize(("capabilities", "tolerance"), [({}, 1e-6), ({"amx_bf16": True}, 0.03)])
def test_the_dense_stream_is_that_of_the_dense_model(
    capabilities: dict[str, bool], tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    dense = make_tiny_model("llama")
    expected = dense.model(sample_tokens(), output_hidden_states=True).hidden_states[-2]
    config = PruneConfig.create()
    stream = embed(dense, sample_tokens(), 3, with_dense=True)
    for block, width in zip(list(bind(dense))[:-1], WIDTHS[:-1], strict=True):
        prune_block(block, width, stream, make_method(config), config.activation_memory)
    assert stream.dense_NTC is not None
    assert (stream.dense_NTC - expected).norm() < tolerance * expected.norm()
    assert (stream.hidden_NTC - expected).norm() > 0.1 * expected.norm()


def test_each_sublayer_runs_once_and_twice_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = activations.run_sublayer
    monkeypatch.setattr(activations, "run_sublayer", lambda *args: calls.append(1) or run(*args))
    _, kept, _ = pruned("llama")
    # Batches of one sample, two sublayers in each of four blocks, pruned and dense.
    # Two FFNs are refitted, and run again to give their new output.
    assert len(calls) == 6 * (8 * 2 + 2)
    calls.clear()
    _, recomputed, _ = pruned("llama", activation_memory=0)
    assert len(calls) == 6 * (8 * 2 + 5)  # five of them lose something
    for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_runs_are_deterministic() -> None:
    _, first, _ = pruned("qwen3")
    _, second, _ = pruned("qwen3")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_paper_preset_runs_its_own_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PruneConfig.create(preset="paper", min_group_size=4)
    assert (config.channel_selection, config.head_error, config.damping_mode, config.schedule) == (
        "dynamic_group",
        "diagonal",
        "mean",
        "log",
    )
    given: dict[str, set[object]] = {}

    def spy(name: str, *positions: int) -> None:
        solve = getattr(slimgpt_method, name)

        def call(*args: object, **kwargs: object) -> object:
            given.setdefault(name, set()).add(tuple(args[i] for i in positions))
            return solve(*args, **kwargs)

        monkeypatch.setattr(slimgpt_method, name, call)

    spy("prepare", 2)
    spy("eliminate_units", 3)
    spy("eliminate_channel_groups", 2, 3)
    monkeypatch.delattr(slimgpt_method, "eliminate_channels")
    prune_blocks(make_tiny_model("llama"), sample_tokens(), WIDTHS, config)
    assert given == {
        "prepare": {((0.01, "mean"),)},
        "eliminate_units": {("diagonal",)},
        "eliminate_channel_groups": {(4, 1024)},
    }


def test_the_seed_and_the_text_field_choose_the_samples(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    records = [{"text": f"Word {i}. " * 40, "body": f"{i} other things; " * 40} for i in range(40)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = OPTIONS | {"calibration": str(file), "ratio": 0.3}
    errors = set()
    for name, changed in (("a", {}), ("b", {"seed": 1}), ("c", {"text_field": "body"})):
        report = slimgpt.prune(
            str(tiny_checkpoint("llama")), tmp_path / name, **options | changed
        ).report
        errors.add(report["blocks"][-1]["sublayers"][1]["error"])
    assert len(errors) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_loads_with_the_logits_of_the_model_in_memory(
    variant: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(variant)
    output = tmp_path / "slim"
    result = slimgpt.prune(str(source), output, ratio=0.4, min_ratio=0, **OPTIONS)
    assert result.plan.block_ratio == pytest.approx(0.4, abs=0.03)

    in_memory = load_model(find_model(str(source)))
    tokenizer = AutoTokenizer.from_pretrained(output)
    samples = slimgpt.data.samples.calibration_tokens(TEXT, tokenizer, SampleOptions(6, 32))
    prune_blocks(in_memory, samples, result.plan.widths, PruneConfig.create())
    tokens = sample_tokens(2, 24)
    expected = in_memory(tokens).logits
    for remote in (True, False):
        loaded = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=remote)
        assert (loaded(tokens).logits - expected).abs().max() <= 1e-5
    assert loaded.num_parameters() == result.plan.params_after

    again = tmp_path / "again"
    loaded.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    assert torch.equal(reloaded(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_cache_padding_and_every_attention(
    variant: str, slim_checkpoint: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(slim_checkpoint(variant))
    prompt = sample_tokens(1, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    mask = torch.ones_like(prompt)
    for use_cache in (False, True):
        answer = model.generate(prompt, attention_mask=mask, use_cache=use_cache, **options)
        assert torch.equal(answer[:, :12], prompt)
        assert_greedy(model, answer, num_new=8)
    padded = torch.cat([torch.ones(1, 5, dtype=torch.long), prompt], dim=1)
    batch = torch.cat([padded, sample_tokens(1, 17)])
    batch_mask = torch.ones_like(batch)
    batch_mask[0, :5] = 0
    left_padded = model.generate(batch, attention_mask=batch_mask, **options)
    assert torch.equal(left_padded[:, :17], batch)
    assert_greedy(model, left_padded[:1, 5:], num_new=8)
    assert_greedy(model, left_padded[1:], num_new=8)
    sdpa = model(prompt).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(prompt).logits, sdpa, rtol=0, atol=1e-5)
    attentions = model(prompt, output_attentions=True).attentions
    assert [a.shape[1] for a in attentions] == [
        layer.num_attention_heads for layer in model.config.per_layer_config
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_uniform_is_a_plain_checkpoint(
    variant: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    slimgpt.prune(str(tiny_checkpoint(variant)), output, ratio=0.4, uniform=True, **OPTIONS)
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == VARIANTS[variant].model_type
    assert "auto_map" not in config
    assert "per_layer_config" not in config
    assert not (output / "modeling_slimgpt.py").exists()
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__module__.startswith("transformers.models.")


def test_a_pruned_model_can_be_pruned_again(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    once = slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "once", ratio=0.2, **OPTIONS)
    twice = slimgpt.prune(str(once.output), tmp_path / "twice", ratio=0.2, **OPTIONS)
    assert twice.plan.params_before == once.plan.params_after
    model = AutoModelForCausalLM.from_pretrained(twice.output)
    assert model.num_parameters() == twice.plan.params_after


def test_the_precision_is_that_of_the_checkpoint_or_the_given_one(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    given = slimgpt.prune(str(source), tmp_path / "given", dtype="bfloat16", ratio=0.4, **OPTIONS)
    kept = slimgpt.prune(str(given.output), tmp_path / "kept", ratio=0.1, **OPTIONS)
    for result in (given, kept):
        assert result.report["dtype"] == "bfloat16"
        assert AutoModelForCausalLM.from_pretrained(result.output).dtype == torch.bfloat16
        tensors = load_file(result.output / "model.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_calibration_on_text_sampled_from_the_model(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"calibration": "self", "nsamples": 3, "seqlen": 16}
    first, second = (
        slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / name, ratio=0.3, **options)
        for name in ("first", "second")
    )
    assert first.blocks == second.blocks


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The samples of each sequential pass."""
    samples, embed = list[torch.Tensor](), sequential.embed
    monkeypatch.setattr(sequential, "embed", lambda *args: samples.append(args[1]) or embed(*args))
    return samples


def test_texts_give_equal_numbers_of_samples(
    tiny_checkpoint: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    seen: list[torch.Tensor],
) -> None:
    options = {"calibration": "pydocs,self", "nsamples": 7, "seqlen": 16}
    options["widths"] = "scheduled"
    result = slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **options)
    pydocs = calibration_tokens("pydocs", tokenizer, SampleOptions(3, 16))
    assert torch.equal(seen[0][:3], pydocs)
    assert seen[0].shape == (7, 16)
    assert (seen[0][3:, 0] == tokenizer.bos_token_id).all()
    assert result.report["calibration"]["data"].endswith(" + self")


def test_answers_to_prompts_are_calibration_text(
    tiny_checkpoint: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    seen: list[torch.Tensor],
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One thing\n")
    options = {"calibration": "pydocs,self", "prompts": str(prompts), "widths": "scheduled"}
    model, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    result = slimgpt.prune(model, output, nsamples=6, seqlen=32, **options)
    asked = tokenizer("One thing").input_ids
    answered = seen[0][3:].flatten().tolist()
    places = [i for i in range(len(answered)) if answered[i : i + len(asked)] == asked]
    assert len(places) > 2
    assert result.report["config"]["prompts"] == "prompts.txt"
    assert result.report["calibration"]["data"].endswith(" + answers to prompts.txt")
    assert "answers to prompts.txt" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("missing.txt", ConfigError, "no data file missing.txt"),
        ("empty.txt", DataError, r"empty\.txt has no prompt of at most 16 tokens"),
    ],
)
def test_bad_prompts_are_refused(
    prompts: str,
    error: type[Exception],
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    options = {"calibration": "self", "prompts": prompts, "nsamples": 3, "seqlen": 32}
    with pytest.raises(error, match=message):
        slimgpt.prune(str(tiny_checkpoint("llama")), "slim", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "pydocs"}, "prompts are a file or data set for calibration='self'"),
        ({"prompts": "self"}, "prompts are a file or data set for calibration='self'"),
    ],
)
def test_prompts_need_text_of_the_model(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig.create(**{"prompts": "prompts.txt"} | options)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [("pydocs,self", "nsamples=1 is too few for 2 texts"), ("self,self", "has a text twice")],
)
def test_texts_that_do_not_go_together(calibration: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig.create(calibration=calibration, nsamples=1)


def test_attention_share_of_zero_leaves_attention_whole(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    source = str(tiny_checkpoint("qwen2"))
    halved, whole = (
        slimgpt.plan(source, ratio=0.3, schedule="uniform", attention_share=share)
        for share in (1, 0)
    )
    groups = [shape.sublayers[0].num_units for shape in whole.shapes]
    assert [width[0] for width in whole.widths] == groups
    assert sum(width[0] for width in halved.widths) < sum(groups)
    assert whole.block_ratio == pytest.approx(halved.block_ratio, abs=0.03)


@pytest.mark.parametrize(("variant", "share"), [("llama", 0.75), ("llama-mha", 1)])
def test_attention_has_a_smaller_share_where_queries_share_kv_heads(
    variant: str, share: float, tiny_checkpoint: Callable[[str], Path]
) -> None:
    source, options = str(tiny_checkpoint(variant)), {"ratio": 0.5, "schedule": "uniform"}
    default, given, paper = (
        slimgpt.plan(source, **options, **more).widths
        for more in ({}, {"attention_share": share}, {"preset": "paper"})
    )
    assert default == given
    assert (default == paper) is (share == 1)


def test_plan_equals_what_prune_does(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = str(tiny_checkpoint("qwen2"))
    options = {"ratio": 0.35, "schedule": "linear", "widths": "scheduled"}
    planned = slimgpt.plan(source, **options)
    result = slimgpt.prune(source, tmp_path / "slim", **OPTIONS, **options)
    assert result.plan == planned
    summary = slimgpt.inspect(str(result.output))
    assert summary.params["total"] == planned.params_after
    assert [(b.num_kv_heads, b.num_channels) for b in summary.blocks] == [
        (w[0], w[1]) for w in planned.widths
    ]
    dense = slimgpt.inspect(source)
    assert sum(v for k, v in dense.params.items() if k != "total") == dense.params["total"]
    assert dense.params["total"] == planned.params_before
