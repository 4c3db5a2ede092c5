"""slimgpt bench: what is measured, of which models, and what it says."""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from conftest import TEXT, Run

import slimgpt
from slimgpt.benchmarking import bench, results, worker
from slimgpt.benchmarking.engines.base import Subject, Timing
from slimgpt.benchmarking.engines.llama_cpp import LlamaCpp
from slimgpt.benchmarking.engines.registry import ENGINES
from slimgpt.benchmarking.engines.vllm import Vllm
from slimgpt.benchmarking.results import Cost
from slimgpt.config import BenchConfig
from slimgpt.errors import ConfigError, EngineError
from slimgpt.models.source import find_model
from slimgpt.pruning.memory import size

Checkpoint = Callable[[str], Path]
QUICK = ("--prompt-length", "16", "--new-tokens", "4", "--repeats", "2", "--threads", "1")


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bench") / "slim"
    slimgpt.prune(
        str(tiny_checkpoint("llama")), output, ratio=0.4, calibration=TEXT, nsamples=4,
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
    assert json.loads((pruned / "eval" / "speed.json").read_text())[-1] == result


def test_the_engines_of_the_options_are_those_that_can_run() -> None:
    assert get_args(BenchConfig.model_fields["engine"].annotation) == tuple(ENGINES)


def test_the_process_of_an_engine_begins_small() -> None:
    """What it imports before the model would count as the model's memory."""
    code = "import sys, slimgpt.benchmarking.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_table_of_a_single_model(run: Run, pruned: Path) -> None:
    code, out, _ = run("bench", pruned, "--dtype", "bfloat16", *QUICK)
    assert code == 0
    assert "bfloat16" in out
    assert "decode, tok/s" in out
    assert "speed-up" not in out
    assert "median (smallest–largest) of 2 rounds" in out


def test_rounds_are_interleaved_and_ratios_are_of_pairs(
    monkeypatch: pytest.MonkeyPatch, pruned: Path, tiny_checkpoint: Checkpoint
) -> None:
    """A machine that is slower in every round leaves the ratios as they are."""
    turns: list[str] = []
    prompts: list[list[list[int]]] = []

    def generate(worker: worker.Worker, given: list[list[int]]) -> Timing:
        name = worker._subject.cost.name
        turns.append(name)
        prompts.append(given)
        slowness = (len(turns) + 1) // 2 * (3 if name == base else 1)
        return Timing(first=slowness, rest=2 * slowness)

    base = str(tiny_checkpoint("llama"))
    monkeypatch.setattr(worker.Worker, "generate", generate)
    monkeypatch.setattr(worker.Worker, "_run", lambda *_: None)
    result = slimgpt.bench(
        str(pruned), against=base, prompt_length=(8,), batch_size=(2,), new_tokens=5, repeats=3
    )
    assert turns == [str(pruned), base, base, str(pruned), str(pruned), base, base, str(pruned)]
    assert all(given == prompts[0] for given in prompts)
    assert [len(prompt) for prompt in prompts[0]] == [8, 8]
    (setting,) = result.settings
    assert setting.prefill_speedup == results.Spread(3, 3, 3)
    assert setting.decode_speedup == results.Spread(3, 3, 3)
    rounds = [2, 3, 4]  # the first one is for warming up
    assert setting.model.token.median == statistics.median(rounds) * 2 / 4
    assert setting.base is not None
    assert setting.base.decode.high == 2 * 4 / (3 * 2 * min(rounds))


def test_a_later_result_takes_the_place_of_an_earlier_one_of_the_same_protocol(
    monkeypatch: pytest.MonkeyPatch, pruned: Path, tmp_path: Path
) -> None:
    slim = shutil.copytree(pruned, tmp_path / "slim", ignore=shutil.ignore_patterns("eval"))
    monkeypatch.setattr(worker.Worker, "_run", lambda *_: None)
    for length, seconds in ((8, 1.0), (8, 2.0), (16, 3.0)):
        timing = Timing(first=seconds, rest=seconds)
        monkeypatch.setattr(worker.Worker, "generate", lambda *_, timing=timing: timing)
        slimgpt.bench(str(slim), prompt_length=length, new_tokens=2)
    kept = json.loads((slim / "eval" / "speed.json").read_text())
    speeds = [setting["model"] for result in kept for setting in result["settings"]]
    assert [speed["token"]["median"] for speed in speeds] == [2.0, 3.0]


def test_gguf_files_run_as_they_are(run: Run, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "half.gguf", type="f16").output
    code, out, _ = run("bench", file, "--engine", "llamacpp", *QUICK, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["costs"][0]["disk_bytes"] == file.stat().st_size
    assert result["costs"][0]["dtype"] == "F16"
    assert result["versions"]["xllamacpp"]
    against = ("--against", tiny_checkpoint("llama"))
    code, _, err = run("bench", file, *against, "--engine", "llamacpp", *QUICK)
    assert code == 2
    assert "would run in different precisions" in err
    full = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "full.gguf", type="f32").output
    code, out, _ = run("bench", file, "--against", full, "--engine", "llamacpp", *QUICK, "--json")
    assert code == 0
    assert [cost["dtype"] for cost in json.loads(out)["costs"]] == ["F16", "F32"]
    arguments = ("--engine", "llamacpp", "--dtype", "float16", *QUICK)
    code, _, err = run("bench", file, *arguments)
    assert code == 2
    assert "a .gguf file runs in llama.cpp as it is" in err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--engine", "vllm"), "needs the package 'vllm'", "pip install 'slimgpt[vllm]'"),
        (("--engine", "vllm", "--threads", "2"), "vllm takes no --threads and no --device", ""),
        (("--engine", "vllm", "--device", "cpu"), "vllm takes no --threads and no --device", ""),
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


def test_precisions_must_be_the_same(
    run: Run, pruned: Path, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_checkpoint("llama"), half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    code, _, err = run("bench", pruned, "--against", half, *QUICK)
    assert code == 2
    assert f"{pruned} in float32, {half} in float16" in err
    assert "--dtype" in err
    sources = [find_model(str(directory)) for directory in (pruned, half)]
    chosen = BenchConfig.create(dtype="bfloat16")
    assert bench._resolve_dtype(sources, chosen) == "bfloat16"
    (half / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    code, _, err = run("bench", half, "--engine", "llamacpp", *QUICK)
    assert code == 2
    assert "stored in float64, in which llama.cpp does not run them" in err


def test_process_ends_if_its_model_does_not_load(pruned: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pruned, broken)
    (broken / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ConfigError, match=r"cannot load the file model\.safetensors"):
        slimgpt.bench(str(broken), prompt_length=(8,))
    assert not multiprocessing.active_children()


def test_process_that_dies_is_named(pruned: Path) -> None:
    config = BenchConfig.create()
    subject = Subject(Cost("mine", "float32", 0, 0, 0, None), str(pruned), 320, 128)
    with ProcessPoolExecutor(1) as pool:
        mine = worker.Worker(subject, config, pool)
        pool.submit(os._exit, 1).exception()
        with pytest.raises(
            EngineError, match="the process that ran mine in transformers ended"
        ) as error:
            mine.generate([[1]])
        assert mine.cost().peak_memory_bytes is None
    assert "__main__" in str(error.value.hint)


def test_llama_cpp_is_reached_past_a_proxy_and_its_errors_are_told(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    file = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "model.gguf").output
    config = BenchConfig.create(prompt_length=(8,), new_tokens=4, threads=1)
    engine = LlamaCpp(str(file), config)
    assert engine.generate([[5, 6, 7]], 4).rest > 0
    with pytest.raises(EngineError, match="exceeds the available context size"):
        engine.generate([[5] * 1000], 4)


def test_llama_cpp_answers_only_who_has_its_key(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "model.gguf").output
    config = BenchConfig.create(prompt_length=(8,), new_tokens=4, threads=1)
    engines_of_two_runs = [LlamaCpp(str(file), config) for _ in range(2)]
    assert len({engine._key for engine in engines_of_two_runs}) == 2
    url = f"{engines_of_two_runs[0]._server.listening_address}/completion"
    body = json.dumps({"prompt": [5, 6, 7], "n_predict": 1}).encode()
    for headers in ({}, {"Authorization": f"Bearer {engines_of_two_runs[1]._key}"}):
        with pytest.raises(HTTPError, match="401"):
            build_opener(ProxyHandler({})).open(Request(url, body, headers))
    assert engines_of_two_runs[0].generate([[5, 6, 7]], 4).rest > 0


class FakeVllm(ModuleType):
    """vLLM as far as it is used here, with a given time for each number of tokens."""

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__("vllm")
        self.seconds, self.now = seconds, 0.0
        self.LLM, self.SamplingParams = self.load, dict

    def load(self, model: str, **options: Any) -> "FakeVllm":
        if options["dtype"] == "auto":
            raise ValueError("no such precision")
        return self

    def generate(self, inputs: object, sampling: dict[str, Any], use_tqdm: bool) -> None:
        self.now += self.seconds[sampling["max_tokens"]]


def test_the_processes_of_vllm_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, ended = FakeVllm({}), []
    fake.llm_engine = SimpleNamespace(
        engine_core=SimpleNamespace(shutdown=lambda: ended.append("mine"))
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    worker.load("mine", BenchConfig.create(engine="vllm", dtype="float32"))
    worker.unload("mine")
    worker.unload("mine")
    assert ended == ["mine"]


@pytest.mark.parametrize("seconds", [3.0, 1.0])
def test_vllm_needs_longer_for_more_tokens(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm({1: 1.0, 8: seconds})
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr("time.perf_counter", lambda: fake.now)
    engine = Vllm("mine", BenchConfig.create(dtype="float32"))
    if seconds > 1:
        assert engine.generate([[5]], 8) == Timing(first=1.0, rest=2.0)
    else:
        with pytest.raises(EngineError, match=r"1\.0000 s for one token and 1\.0000 s for 8"):
            engine.generate([[5]], 8)
    with pytest.raises(EngineError, match="vLLM cannot load mine: no such precision"):
        Vllm("mine", BenchConfig.create())


@pytest.mark.parametrize("engine", ["transformers", "llamacpp"])
@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"GGUF\x03\0\0\0" + bytes(range(64))])
def test_broken_gguf_files(content: bytes, engine: str, run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    code, _, err = run("bench", broken, "--engine", engine, *QUICK)
    assert code == 2
    assert "cannot load" in err
    assert "broken.gguf" in err


def test_gguf_file_that_is_no_language_model(
    run: Run, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "model.gguf").output
    file.write_bytes(file.read_bytes().replace(b"token_embd.weight", b"token_gone.weight"))
    code, _, err = run("bench", file, "--engine", "llamacpp", *QUICK)
    assert code == 2
    assert "cannot load" in err
    assert "token_embd.weight" in err


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
    assert size(report["peak_memory_bytes"]) in out


def test_what_was_measured_outlives_a_failure(
    run: Run, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench._measure

    def fail_at_two(workers: Any, config: Any, batch_size: int, *lengths: int) -> Any:
        if batch_size == 2:
            raise EngineError("too large", hint="use a smaller one")
        return measure(workers, config, batch_size, *lengths)

    monkeypatch.setattr(bench, "_measure", fail_at_two)
    slim = shutil.copytree(pruned, tmp_path / "slim", ignore=shutil.ignore_patterns("eval"))
    lengths = ("--prompt-length", "8", "--new-tokens", "2", "--repeats", "1", "--warmup", "0")
    code, out, err = run("bench", slim, *lengths, "--batch-size", "1,2")
    assert code == 1
    assert "error: too large" in err
    assert "tok/s" in out
    (kept,) = json.loads((slim / "eval" / "speed.json").read_text())
    assert [setting["batch_size"] for setting in kept["settings"]] == [1]
    (tmp_path / "plot.svg").mkdir()
    code, out, err = run("bench", slim, *lengths, "--plot", tmp_path / "plot.svg", "--json")
    assert code == 2
    assert "cannot write to" in err
    assert json.loads(out)["settings"]
    assert len(json.loads((slim / "eval" / "speed.json").read_text())) == 1
