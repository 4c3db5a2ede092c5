"""slimgpt bench: what is measured, of which models, and what it says."""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run

import slimgpt
from slimgpt import benchmarking
from slimgpt.config import BenchConfig
from slimgpt.engines import Timing
from slimgpt.errors import EngineError

Checkpoint = Callable[[str], Path]
QUICK = ("--prompt-length", "16", "--new-tokens", "4", "--repeats", "2", "--threads", "1")


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bench") / "slim"
    slimgpt.prune(
        str(tiny_checkpoint("llama")), output, ratio=0.4, calibration="pydocs", nsamples=4,
        seqlen=32,
    )  # fmt: skip
    return output


@pytest.mark.parametrize("engine", ["transformers", "llamacpp"])
def test_engines_measure_both_models(
    engine: str, run: Run, pruned: Path, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base, plot = tiny_checkpoint("llama"), tmp_path / "speed.svg"
    arguments = ("--engine", engine, "--batch-size", "1,2", "--plot", plot, *QUICK)
    code, out, err = run("bench", pruned, "--against", base, *arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [setting["batch_size"] for setting in result["settings"]] == [1, 2]
    for setting in result["settings"]:
        for speed in (setting["model"], setting["base"]):
            for spread in speed.values():
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]
            tokens = setting["batch_size"] * 16 / speed["first_token"]["low"]
            assert speed["prefill"]["high"] == pytest.approx(tokens)
    ours, dense = result["costs"]
    report = json.loads((pruned / "pruning_report.json").read_text())
    removed = report["params_before"] - report["params_after"]
    assert dense["step_bytes"] - ours["step_bytes"] == 4 * removed
    assert dense["block_bytes"] - ours["block_bytes"] == 4 * removed
    assert result["ideal_decode"] == dense["step_bytes"] / ours["step_bytes"]
    assert abs(dense["disk_bytes"] - ours["disk_bytes"] - 4 * removed) < 1000  # headers differ
    assert ours["peak_memory_bytes"] > 2**20
    assert "<svg" in plot.read_text()


def test_table_of_a_single_model(run: Run, pruned: Path) -> None:
    code, out, _ = run("bench", pruned, *QUICK)
    assert code == 0
    assert "decode, tok/s" in out
    assert "speed-up" not in out
    assert "median (smallest–largest) of 2 rounds" in out


def test_rounds_are_interleaved_and_ratios_are_of_pairs(
    monkeypatch: pytest.MonkeyPatch, pruned: Path, tiny_checkpoint: Checkpoint
) -> None:
    """A machine that is slower in every round leaves the ratios as they are."""
    turns: list[str] = []
    prompts: list[list[list[int]]] = []

    def generate(worker: benchmarking._Worker, given: list[list[int]]) -> Timing:
        name = worker._contestant.name
        turns.append(name)
        prompts.append(given)
        slowness = (len(turns) + 1) // 2 * (3 if name == base else 1)
        return Timing(first=slowness, rest=2 * slowness)

    base = str(tiny_checkpoint("llama"))
    monkeypatch.setattr(benchmarking._Worker, "generate", generate)
    monkeypatch.setattr(benchmarking._Worker, "_run", lambda *_: None)
    result = slimgpt.bench(
        str(pruned), against=base, prompt_length=(8,), batch_size=(2,), new_tokens=5, repeats=3
    )
    assert turns == [str(pruned), base, base, str(pruned), str(pruned), base, base, str(pruned)]
    assert all(given == prompts[0] for given in prompts)
    assert [len(prompt) for prompt in prompts[0]] == [8, 8]
    (setting,) = result.settings
    assert setting.prefill_speedup == benchmarking.Spread(3, 3, 3)
    assert setting.decode_speedup == benchmarking.Spread(3, 3, 3)
    rounds = [2, 3, 4]  # the first one is for warming up
    assert setting.model.token.median == statistics.median(rounds) * 2 / 4
    assert setting.base is not None
    assert setting.base.decode.high == 2 * 4 / (3 * 2 * min(rounds))


def test_gguf_files_run_as_they_are(run: Run, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "half.gguf", type="f16").output
    code, out, _ = run("bench", file, "--engine", "llamacpp", *QUICK, "--json")
    assert code == 0
    assert json.loads(out)["costs"][0]["disk_bytes"] == file.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--engine", "vllm"), "needs the package 'vllm'", "pip install 'slimgpt[vllm]'"),
        (("--engine", "tgi"), "engine='tgi': available: transformers", ""),
        (("--batch-size", "0"), "batch_size", ""),
        (("--plot", "speed.txt"), "plot='speed.txt'", ""),
        (("--plot", "no/speed.png"), "the directory of --plot no/speed.png does not exist", ""),
        (("--prompt-length", "128"), "are 192 tokens, but", "smaller --prompt-length"),
        (("--against", "nothing"), "no model 'nothing'", ""),
    ],
)
def test_wrong_options(
    arguments: tuple[str, ...], message: str, hint: str, run: Run, tiny_checkpoint: Checkpoint
) -> None:
    code, out, err = run("bench", tiny_checkpoint("llama"), *arguments)
    assert code == 2
    assert message in err
    assert hint in err
    assert not out


def test_process_that_dies_is_named(pruned: Path) -> None:
    config = BenchConfig.create()
    contestant = benchmarking._Contestant("mine", str(pruned), 0, 0, 0, 320, 128)
    worker = benchmarking._Worker(contestant, config)
    worker._pool.submit(os._exit, 1).exception()
    with pytest.raises(EngineError, match="the process that ran mine in transformers ended"):
        worker.cost()


def test_engine_that_cannot_load_is_named(
    run: Run, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    whole = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "whole.gguf").output
    content = whole.read_bytes()
    broken.write_bytes(content.replace(b"output_norm.weight", b"output_gone.weight"))
    code, _, err = run("bench", broken, "--engine", "llamacpp", *QUICK)
    assert code == 1
    assert "llama.cpp cannot load" in err
    assert "Traceback" not in err


def test_time_and_memory_of_pruning(run: Run, pruned: Path) -> None:
    report = json.loads((pruned / "pruning_report.json").read_text())
    cost = json.loads(run("inspect", pruned, "--json")[1])["pruning"]
    assert cost["seconds"] == report["seconds"]
    assert cost["peak_memory_bytes"] == report["peak_memory_bytes"]
    _, out, _ = run("inspect", pruned)
    assert f"{report['peak_memory_bytes'] / 2**30:.2f} GiB" in out
