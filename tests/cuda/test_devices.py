"""Every phase on a device against the same phase on the CPU.

In float32 the removed units must be the same, and weights and statistics may differ by 1e-3
relative (Frobenius norm). In bfloat16, 99 % of the units must be the same, and errors may differ by
1 %. On the CPU, the tests compare it with itself, with other rounding errors in every product.
"""

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, TINY, assert_greedy, make_tiny_model, prune_blocks, sample_tokens
from devices import SLOW_ON_CPU, on_both
from interruption import fingerprint
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import slimgpt
from slimgpt.calibration.activations import Activations, Stream, collect, embed
from slimgpt.config import PruneConfig
from slimgpt.data.samples import SampleOptions
from slimgpt.data.self_generated import sample_from_model
from slimgpt.models.blocks import bind
from slimgpt.models.loading import build_skeleton
from slimgpt.models.source import find_model
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.units import Kept
from slimgpt.models.weights import open_weights
from slimgpt.pruning import estimate
from slimgpt.pruning.decisions import SavedBlock
from slimgpt.pruning.memory import Activations as Placed
from slimgpt.pruning.refit import refit
from slimgpt.pruning.sensitivity import sensitivities
from slimgpt.pruning.slicing import slice_sublayer
from slimgpt.solver.elimination import (
    Elimination,
    HeadCounts,
    eliminate_channel_groups,
    eliminate_channels,
    eliminate_heads,
    eliminate_units,
)
from slimgpt.solver.hessian import Problem, Target, prepare

# What is left of the units, and of what the CPU found.
UNITS = {torch.float32: 1.0, torch.bfloat16: 0.99}
RELATIVE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}

DTYPES = pytest.mark.parametrize("dtype", list(UNITS), ids=["float32", "bfloat16"])

OPTIONS: dict[str, Any] = {"calibration": TEXT, "nsamples": 12, "seqlen": 32, "ratio": 0.3}


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The difference is small in the Frobenius norm."""
    found, expected = found.cpu().double(), expected.cpu().double()
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def assert_same_units(found: Tensor, expected: Tensor, share: float) -> None:
    common = set(found.tolist()) & set(expected.tolist())
    assert len(found) == len(expected)
    assert len(common) >= share * len(expected)


def test_the_cpu_is_compared_with_other_rounding_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(64, 64, generator=generator)
    expected, found = on_both(torch.device("cpu"), lambda _: factor @ factor)
    assert not torch.equal(found, expected)
    assert_near(found, expected, torch.finfo(torch.float32).eps)


# Solver


ELIMINATIONS: dict[str, Callable[[Problem], Elimination]] = {
    "channels": lambda problem: eliminate_channels(problem, 300, panel_size=64),
    "channel groups": lambda problem: eliminate_channel_groups(problem, 300),
    "units": lambda problem: eliminate_units(problem, 8, 32),
    "diagonal units": lambda problem: eliminate_units(problem, 8, 32, "diagonal"),
    "heads": lambda problem: eliminate_heads(problem, HeadCounts(4, 4), HeadCounts(3, 3)),
}


def layer(dtype: torch.dtype, device: torch.device) -> Problem:
    """A layer of 128 × 512, with statistics of inputs of very different scale."""
    generator = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(2048, 512, generator=generator) * torch.logspace(-1, 1, 512)
    inputs_TI += torch.randn(2048, 1, generator=generator)
    inputs_TI = inputs_TI.to(dtype).double().to(device)
    weight_OI = torch.randn(128, 512, generator=generator).to(dtype).to(device)
    hessian_II = inputs_TI.T @ inputs_TI / len(inputs_TI)
    target = Target(1.1 * weight_OI.double() @ hessian_II, 0.5)
    return prepare(weight_OI, hessian_II, target=target)


@DTYPES
@pytest.mark.parametrize("name", ELIMINATIONS)
def test_solver(name: str, dtype: torch.dtype, device: torch.device) -> None:
    expected, found = on_both(device, lambda d: ELIMINATIONS[name](layer(dtype, d)))
    assert found.weight_OK.device.type == device.type
    assert_same_units(found.order, expected.order, UNITS[dtype])
    if found.kept_K.tolist() == expected.kept_K.tolist():
        assert_near(found.weight_OK, expected.weight_OK, 1e-3)
    assert found.error == pytest.approx(expected.error, rel=RELATIVE[dtype])


# Calibration


def stream_of(model: PreTrainedModel, place: torch.device | None = None) -> Stream:
    """The stream of a model, in host memory or on a device; the dense one is somewhere else."""
    stream = embed(model, sample_tokens(64, 64), 8, with_dense=True, place=place)
    noise = torch.randn(stream.hidden_NTC.shape, generator=torch.Generator().manual_seed(2))
    assert stream.dense_NTC is not None
    stream.dense_NTC += (0.1 * noise).to(stream.dense_NTC)
    return stream


def statistics(dtype: torch.dtype, device: torch.device, position: int) -> Activations:
    model = make_tiny_model("llama-biases").to(dtype).to(device)
    return collect(next(iter(bind(model))).sublayers[position], stream_of(model, device), 2**20)


@DTYPES
@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("position", [0, 1], ids=["attention", "ffn"])
def test_statistics(position: int, dtype: torch.dtype, device: torch.device) -> None:
    expected, found = on_both(device, lambda d: statistics(dtype, d, position))
    assert found.hessian_II.device.type == device.type
    for name in ("hessian_II", "mean_I", "cross_OI", "target_O"):
        assert_near(getattr(found, name), getattr(expected, name), RELATIVE[dtype])


def refitted(dtype: torch.dtype, device: torch.device) -> tuple[float, Tensor]:
    """Error ratio of a refit, and the new output projection."""
    model = make_tiny_model("llama").to(dtype).to(device)
    ffn = next(iter(bind(model))).sublayers[1]
    dense = replace(ffn, module=copy.deepcopy(ffn.module))
    kept = torch.arange(48, device=device)
    slice_sublayer(ffn, Kept(kept), ffn.output.weight[:, kept])
    options = PruneConfig.create(correction=0.5, refit_epochs=4)
    return refit(ffn, dense, stream_of(model), options), ffn.output.weight


@DTYPES
@pytest.mark.usefixtures("float32_products")
def test_refit(dtype: torch.dtype, device: torch.device) -> None:
    expected, found = on_both(device, lambda d: refitted(dtype, d))
    assert found[0] < 0.95
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    assert_near(found[1], expected[1], RELATIVE[dtype])


# Streaming


def streamed(dtype: torch.dtype, device: torch.device, directory: Path) -> StreamedModel:
    """The tiny model, read block by block from its checkpoint."""
    config = make_tiny_model("llama").config
    weights = open_weights(find_model(str(directory)), config, str(dtype).removeprefix("torch."))
    skeleton = build_skeleton(config, dtype)
    weights.check(skeleton)
    return StreamedModel(skeleton, weights, device)


@DTYPES
def test_streaming(
    dtype: torch.dtype, device: torch.device, tiny_checkpoint: Callable[[str], Path]
) -> None:
    model = make_tiny_model("llama").to(dtype)
    num_blocks = 0
    for block in streamed(dtype, device, tiny_checkpoint("llama")).blocks():
        num_blocks += 1
        for name, tensor in block.module.state_dict().items():
            assert tensor.device.type == device.type
            assert torch.equal(tensor.cpu(), model.get_parameter(f"{block.name}.{name}"))
    assert num_blocks == TINY["num_hidden_layers"]


@DTYPES
@pytest.mark.usefixtures("float32_products")
def test_sensitivities(
    dtype: torch.dtype, device: torch.device, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """With the same pruned blocks on both."""
    pruned, samples = make_tiny_model("llama"), sample_tokens(24, 32)
    options = PruneConfig.create(refit_epochs=0)
    plans = prune_blocks(pruned, samples, [(3, 40), (4, 48)] * 2, options)
    saved = [SavedBlock(plan, lambda n: pruned.get_parameter(n).to(dtype)) for plan in plans]
    model = tiny_checkpoint("llama")
    expected, found = on_both(
        device, lambda d: sensitivities(streamed(dtype, d, model), saved, samples)
    )
    assert found[0] == pytest.approx(expected[0], rel=RELATIVE[dtype])
    assert_near(torch.tensor(found[1]), torch.tensor(expected[1]), RELATIVE[dtype])


# Whole runs


@pytest.fixture(scope="module")
def distinct_checkpoint(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Units of very different scale, as in trained models: few errors are nearly the same."""
    directory, generator = tmp_path_factory.mktemp("distinct"), torch.Generator().manual_seed(7)
    model = make_tiny_model("llama", num_hidden_layers=3, intermediate_size=256)
    for layer in model.model.layers:
        for projection, num_units in (
            (layer.mlp.up_proj, 256),
            (layer.self_attn.v_proj, TINY["num_key_value_heads"]),
        ):
            scales = torch.logspace(-0.5, 0.5, num_units)
            order = torch.randperm(num_units, generator=generator)
            projection.weight.unflatten(0, (num_units, -1)).mul_(scales[order][:, None, None])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def kept_units(report: dict[str, Any]) -> Tensor:
    """A number for each kept unit of the model."""
    sublayers = [sub for block in report["blocks"] for sub in block["sublayers"]]
    return torch.tensor([1000 * i + u for i, sub in enumerate(sublayers) for u in sub["keep"]])


def error_of(report: dict[str, Any]) -> float:
    """The errors of all sublayers together."""
    return sum(sub["error"] or 0 for block in report["blocks"] for sub in block["sublayers"])


@DTYPES
@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_run(
    preset: str, dtype: torch.dtype, device: torch.device, distinct_checkpoint: Path, tmp_path: Path
) -> None:
    """The error is that of the run: where a unit differs, the error of its sublayer does too.

    Without this unit the other weights are not comparable, so they are compared in float32 only.
    """
    options = OPTIONS | {"preset": preset, "dtype": str(dtype).removeprefix("torch.")}
    options |= {"nsamples": 16, "seqlen": 64}
    outputs = iter([tmp_path / "expected", tmp_path / "found"])
    expected, found = on_both(
        device,
        lambda d: slimgpt.prune(str(distinct_checkpoint), next(outputs), device=d.type, **options),
    )
    if preset == "default":
        assert found.report["is_measured"]  # with the sensitivity pass
    assert_same_units(kept_units(found.report), kept_units(expected.report), UNITS[dtype])
    error = error_of(expected.report)
    assert error_of(found.report) == pytest.approx(error, rel=RELATIVE[dtype])
    if dtype == torch.float32:
        weights = load_file(found.output / "model.safetensors")
        for name, tensor in load_file(expected.output / "model.safetensors").items():
            assert_near(weights[name], tensor, 1e-3)


PLACES = [Placed(2**30, on_gpu=True), Placed(2**14), Placed(0, is_mapped=True)]


def test_the_place_of_the_activations_does_not_change_a_byte(
    device: torch.device,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does it change from run to run, with a sensitivity pass."""
    results = []
    for index, place in enumerate(PLACES):
        monkeypatch.setattr(estimate, "place_activations", lambda *_, place=place: place)
        output = tmp_path / str(index)
        slimgpt.prune(str(tiny_checkpoint("llama")), output, device=device.type, **OPTIONS)
        results.append(fingerprint(output))
    assert results[0] == results[1] == results[2]


KILLED = """
import json, os, signal, sys, slimgpt
def kill(stage, done, total):
    if stage == "block" and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
model, output, options = sys.argv[1:]
slimgpt.prune(model, output, progress=kill, **json.loads(options))
"""


@SLOW_ON_CPU
def test_resume_after_a_kill(
    device: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    options = OPTIONS | {"device": device}
    model = str(tiny_checkpoint("llama"))
    arguments = [model, str(tmp_path / "killed"), json.dumps(options)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], check=False, env=os.environ | threads
    ).returncode
    assert code == -signal.SIGKILL
    for name in ("killed", "whole"):
        slimgpt.prune(model, tmp_path / name, **options)
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")


@pytest.mark.usefixtures("float32_products")
def test_generation_of_calibration_text(device: torch.device, tokenizer: Any) -> None:
    model, options = make_tiny_model("llama").to(device), SampleOptions(4, 32)
    first, again = (sample_from_model(model, tokenizer, options) for _ in range(2))
    assert first.device.type == "cpu"
    assert first.shape == (4, 32)
    assert first.tolist() == again.tolist()


@torch.no_grad()
def test_generation_of_the_result(
    device: torch.device, slim_checkpoint: Callable[[str], Path]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(slim_checkpoint("llama")).to(device)
    tokens = model.generate(
        sample_tokens(2, 8).to(device),
        attention_mask=torch.ones(2, 8, dtype=torch.long, device=device),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
    )
    assert_greedy(model.cpu(), tokens.cpu(), 8)


def test_evaluation(
    device: torch.device,
    tiny_checkpoint: Callable[[str], Path],
    slim_checkpoint: Callable[[str], Path],
) -> None:
    options = {"data": (TEXT,), "seqlen": (32,), "max_tokens": 256}
    slim, base = (str(checkpoint("llama")) for checkpoint in (slim_checkpoint, tiny_checkpoint))
    expected, found = on_both(
        device,
        lambda d: slimgpt.evaluate(slim, against=base, device=d.type, **options).perplexity[0],
    )
    for name in ("perplexity", "base_perplexity", "kl_divergence", "layer_errors"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3), name


@pytest.mark.parametrize("method", ["lora", "distill"])
def test_recovery(
    method: str,
    device: torch.device,
    tiny_checkpoint: Callable[[str], Path],
    slim_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    records = [{"instruction": f"Count to {i}.", "output": " ".join("12345"[:i])} for i in range(9)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records), encoding="utf-8")
    options: dict[str, Any] = {
        "method": method,
        "data": str(data),
        "eval_data": TEXT,
        "eval_tokens": 128,
        "max_steps": 3,
        "batch_size": 4,
        "micro_batch_size": 4,
        "seqlen": 128,
        "warmup_steps": 1,
        "dtype": "float32",
    }
    if method == "distill":
        options |= {"teacher": str(tiny_checkpoint("llama")), "data": TEXT, "tokens": 1024}
    else:
        options |= {"rank": 4, "dropout": 0}
    slim = str(slim_checkpoint("llama"))
    outputs = iter([tmp_path / "expected", tmp_path / "found"])
    expected, found = on_both(
        device, lambda d: slimgpt.recover(slim, next(outputs), device=d.type, **options).report
    )
    for name in ("train_loss", "held_out_perplexity"):
        assert found[name][-1] == pytest.approx(expected[name][-1], rel=0.01), name
