"""The formulas of benchmarks/large_models.py against counted operations, on small shapes."""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from slimgpt.calibration.activations import Stream, collect, embed, pass_through
from slimgpt.config import PruneConfig
from slimgpt.methods.slimgpt import SlimGPT
from slimgpt.models.blocks import Block, bind
from slimgpt.models.units import Kept
from slimgpt.pruning.block import prune_block
from slimgpt.pruning.refit import refit
from slimgpt.pruning.slicing import slice_sublayer
from slimgpt.solver.elimination import eliminate_channels
from slimgpt.solver.hessian import prepare

Shape = tuple[int, ...]


def product_flop(_added: Shape, left: Shape, right: Shape, **_: Any) -> int:
    """Operations of addmm_ with these shapes."""
    return 2 * left[0] * left[1] * right[1]


def attention_flop(query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Operations of the scores and of what they weight, over batch, heads, tokens and head_dim."""
    return 4 * query[0] * query[1] * query[2] * key[2] * query[3]


UNCOUNTED = {
    torch.ops.aten.addmm_: product_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
}

NUM_SAMPLES, SEQLEN = 16, 32


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "large_models.py"
    spec = importlib.util.spec_from_file_location("large_models", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shape(plan: ModuleType) -> Any:
    return plan.Model(1, 64, 320, 8, 4, 8, vocab=320)


def counted(work: Callable[[], Any]) -> int:
    """Operations of matrix products."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        work()
    return counter.get_total_flops()


def block_of(shape: Any) -> tuple[Block, Stream]:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.channels,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=shape.blocks,
        vocab_size=shape.vocab,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    samples = torch.randint(320, (NUM_SAMPLES, SEQLEN))
    return next(iter(bind(model))), embed(model, samples, 4)


def test_parameters(plan: ModuleType, shape: Any) -> None:
    block, _ = block_of(shape)
    assert sum(sub.shape.params for sub in block.sublayers) == shape.block_params
    assert plan.MODELS["7B"].params == pytest.approx(6.74e9, rel=0.01)
    assert plan.MODELS["70B"].params == pytest.approx(70.6e9, rel=0.01)


@pytest.mark.usefixtures("float32_products")
def test_forward_and_statistics(plan: ModuleType, shape: Any) -> None:
    (block, stream), run = block_of(shape), plan.Run(NUM_SAMPLES, SEQLEN)
    attention, ffn = block.sublayers
    expected = plan.attention_input(shape, run) + plan.gram(run.tokens, shape.query)
    assert counted(lambda: collect(attention, stream, 0)) == expected
    expected = plan.ffn_input(shape, run.tokens) + plan.gram(run.tokens, shape.channels)
    assert counted(lambda: collect(ffn, stream, 0)) == expected
    expected = plan.ffn_input(shape, run.tokens)
    expected += plan.linear(run.tokens, shape.channels, shape.hidden)
    assert counted(lambda: pass_through(ffn, stream)) == expected


@pytest.mark.usefixtures("float32_products")
def test_refit(plan: ModuleType, shape: Any) -> None:
    (block, stream), run = block_of(shape), plan.Run(NUM_SAMPLES, SEQLEN, 0.25, refit_epochs=3)
    ffn = block.sublayers[1]
    dense = replace(ffn, module=copy.deepcopy(ffn.module))
    kept = torch.arange(shape.channels * 3 // 4)
    slice_sublayer(ffn, Kept(kept), ffn.output.weight[:, kept])
    config = PruneConfig.create(correction=0.0, refit_epochs=3)
    # The error on a sample, here of all tokens, is measured twice.
    error = run.tokens * 2 * shape.ffn_params * (1 + 0.75)
    expected = plan.refit(shape, run) + 2 * error
    assert counted(lambda: refit(ffn, dense, stream, config)) == pytest.approx(expected)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("refit_epochs", [0, 2])
@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_a_block(plan: ModuleType, shape: Any, correction: float, refit_epochs: int) -> None:
    block, stream = block_of(shape)
    run = plan.Run(NUM_SAMPLES, SEQLEN, 0.25, correction > 0, refit_epochs)
    if run.has_dense:
        stream.dense_NTC = stream.hidden_NTC.clone()
    config = PruneConfig.create(correction=correction, refit_epochs=refit_epochs)
    expected = plan.forward(shape, run) + plan.cross(shape, run) + plan.refit(shape, run)
    expected += plan.gram(run.tokens, shape.query) + plan.gram(run.tokens, shape.channels)
    if refit_epochs:  # the error of all tokens, twice
        expected += 2 * run.tokens * 2 * shape.ffn_params * (1 + 0.75)
    solving = 0
    decide = SlimGPT.decide

    def counted_decide(*args: Any) -> Any:
        nonlocal solving
        before = counter.get_total_flops()
        decision = decide(*args)
        solving += counter.get_total_flops() - before
        return decision

    with (
        FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter,
        mock.patch.object(SlimGPT, "decide", counted_decide),
    ):
        prune_block(block, (3, 240), stream, SlimGPT(config), 0)
    assert counter.get_total_flops() - solving == pytest.approx(expected)


@pytest.mark.parametrize("removed", [200, 500])
def test_elimination(plan: ModuleType, removed: int) -> None:
    num_out, num_in = 768, 1024
    generator = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(2048, num_in, generator=generator)
    problem = prepare(
        torch.randn(num_out, num_in, generator=generator), inputs_TI.T @ inputs_TI / 2048
    )
    # What is done again for discarded pivots is not in the formula.
    found = counted(lambda: eliminate_channels(problem, removed, panel_size=16))
    assert 1 <= found / sum(plan.elimination(num_out, num_in, removed, panel=16)) < 1.4


def test_several_gpus_share_what_depends_on_the_samples(plan: ModuleType) -> None:
    phases = plan.seconds_by_phase(plan.MODELS["70B"], plan.Run(), plan.Machine())
    alone = plan.on_gpus(phases, 1)
    assert alone == pytest.approx(sum(phases.values()))
    rest = phases["solve"] + phases["read"] + phases["write"]
    assert plan.on_gpus(phases, 8) == pytest.approx(rest + (alone - rest) / 8)
