"""Training of pruned models: what is trained on, merged, resumed and written."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import TEXT, make_tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import slimgpt
from slimgpt.config import RECOVERY_OPTIONS, RecoverConfig, RecoverMethod
from slimgpt.data.examples import IGNORED
from slimgpt.errors import ConfigError, MissingDependencyError, NumericalError, RunStateError
from slimgpt.recovery import recover, trainer
from slimgpt.recovery.methods.registry import RECOVERY_METHODS
from slimgpt.runtime.run_directory import CHECKSUMS_FILE, STATE_DIR

pytest.importorskip("peft")

OPTIONS: dict[str, Any] = {
    "eval_data": "pydocs",
    "eval_tokens": 256,
    "eval_steps": 2,
    "save_steps": 2,
    "max_steps": 4,
    "batch_size": 4,
    "micro_batch_size": 2,
    "seqlen": 64,
    "warmup_steps": 1,
    "learning_rate": 3e-3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def slim(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "slim"
    base = str(tiny_checkpoint("llama"))
    slimgpt.prune(base, output, ratio=0.4, calibration=TEXT, nsamples=4, seqlen=32)
    report = output / "pruning_report.json"  # which names a model of the hub so that it is found
    values = json.loads(report.read_text(encoding="utf-8")) | {"base_model": base}
    report.write_text(json.dumps(values), encoding="utf-8")
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    records = [
        {"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i + 1)))}
        for i in range(24)
    ]
    file = tmp_path_factory.mktemp("data") / "instructions.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return str(file)


def run(slim: Path, output: Path, data: str, **options: Any) -> dict[str, Any]:
    adapters = {} if options.get("method") == "full" else {"rank": 4, "alpha": 12}
    given = OPTIONS | adapters | {"data": data, "seqlen": 128} | options
    return slimgpt.recover(str(slim), output, **given).report


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def test_options_and_registry_have_the_same_methods() -> None:
    assert set(RECOVERY_METHODS) == set(RECOVERY_OPTIONS) == set(get_args(RecoverMethod))


def test_adapters_are_merged_exactly(
    slim: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = recover._write

    def keep_adapters(opened: Any, *args: Any) -> None:
        shutil.copytree(opened.state / "checkpoint-4", tmp_path / "adapters")
        write(opened, *args)

    monkeypatch.setattr(recover, "_write", keep_adapters)
    report = run(slim, tmp_path / "out", data)
    before, after = weights(slim), weights(tmp_path / "out")
    adapters = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    adapted = {
        key.removeprefix("base_model.model.").replace("lora_A.", ""): key
        for key in adapters
        if "lora_A" in key
    }
    assert len(adapted) == 4 * 7
    assert set(before) == set(after)
    for name, weight in before.items():
        expected = weight
        if name in adapted:
            a_RI = adapters[adapted[name]]
            b_OR = adapters[adapted[name].replace("lora_A", "lora_B")]
            assert b_OR.abs().max() > 0
            expected = weight + 12 / 4 * b_OR @ a_RI
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "SlimLlamaForCausalLM"
    assert (tmp_path / "out" / "modeling_slimgpt.py").is_file()
    for name in ("config.json", "pruning_report.json"):
        assert (tmp_path / "out" / name).read_text() == (slim / name).read_text()
    assert report == json.loads((tmp_path / "out" / "recovery_report.json").read_text())
    assert f"4 steps of 4 examples on {Path(data).name}" in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out" / STATE_DIR).exists()


def test_curves(slim: Path, data: str, tmp_path: Path) -> None:
    """Held-out perplexity is that of the model before and after; the loss falls."""
    report = run(slim, tmp_path / "out", data, max_steps=9)
    curve = report["held_out_perplexity"]
    assert [step for step, _ in curve] == [0, 2, 4, 6, 8, 9]
    for directory, (_, perplexity) in ((slim, curve[0]), (tmp_path / "out", curve[-1])):
        (measured,) = slimgpt.evaluate(
            str(directory), data="pydocs", max_tokens=256, seqlen=128
        ).perplexity
        assert perplexity == pytest.approx(measured.perplexity, rel=1e-4)
    losses = dict(report["train_loss"])
    assert list(losses) == list(range(1, 10))
    assert losses[9] < losses[1]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [[m["step"], m["loss"]] for m in metrics if "loss" in m] == report["train_loss"]
    assert [m["step"] for m in metrics if "perplexity" in m] == [0, 2, 4, 6, 8, 9]
    rates = [m["learning_rate"] for m in metrics if "loss" in m]
    peak, cosine = OPTIONS["learning_rate"], [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates == pytest.approx([0, *(peak * part for part in cosine)])


def test_defaults_are_those_of_the_paper(slim: Path, data: str, tmp_path: Path) -> None:
    """24 examples in steps of 4, half an epoch: 3 steps."""
    seen: list[dict[str, Any]] = []
    write = recover._write

    def look(opened: Any, *args: Any) -> None:
        (file,) = opened.state.glob("checkpoint-*/adapter_config.json")
        seen.append(json.loads(file.read_text()))
        write(opened, *args)

    few = {"eval_data": "pydocs", "eval_tokens": 256, "batch_size": 4, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover, "_write", look)
        report = slimgpt.recover(str(slim), tmp_path / "out", data=data, epochs=0.5, **few).report
    assert report["steps"] == 3
    (adapters,) = seen
    assert (adapters["r"], adapters["lora_alpha"], adapters["lora_dropout"]) == (8, 16, 0.05)
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} == set(
        adapters["target_modules"]
    )
    defaults = RecoverConfig.create()
    assert (defaults.learning_rate, defaults.warmup_steps, defaults.epochs) == (1e-4, 10, 1)
    assert (defaults.batch_size, defaults.seqlen) == (64, 256)


def test_micro_batches_do_not_change_the_result(slim: Path, data: str, tmp_path: Path) -> None:
    """The loss of a step is the mean over its answer tokens, however it is accumulated."""
    for size in (1, 4):
        run(slim, tmp_path / str(size), data, micro_batch_size=size, dropout=0)
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    assert any(not torch.equal(one[name], weight) for name, weight in weights(slim).items())
    for name, weight in one.items():
        torch.testing.assert_close(weight, four[name], rtol=0, atol=2e-4)


def test_all_weights_are_trained_and_saved_in_their_precision(
    tiny_checkpoint: Callable[[str], Path], data: str, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_checkpoint("llama"), half)
    make_tiny_model("llama").bfloat16().save_pretrained(half)
    run(half, tmp_path / "out", data, method="full")
    before, after = weights(half), weights(tmp_path / "out")
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "out" / "pruning_report.json").exists()


class InterruptedError_(BaseException):
    """Ends a run as abruptly as a signal does, as far as its files are concerned."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    on_log = trainer.MetricsLogger.on_log

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_log(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise InterruptedError_

    monkeypatch.setattr(trainer.MetricsLogger, "on_log", stop)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumed_run_equals_an_uninterrupted_one(
    slim: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options = {"method": method, "max_steps": 7}
    whole = run(slim, tmp_path / "whole", data, **options)
    with monkeypatch.context() as patch:
        interrupt(patch, step=5)
        patch.setattr(trainer, "peak_memory", lambda: 10**15)
        with pytest.raises(InterruptedError_):
            run(slim, tmp_path / "out", data, **options)
    state = tmp_path / "out" / STATE_DIR
    assert [path.name for path in state.parent.iterdir()] == [STATE_DIR]
    assert (state / "checkpoint-4").is_dir()
    shutil.copytree(state / "checkpoint-4", state / "checkpoint-6")  # killed while it was written
    (state / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1')
    (state / "checkpoint-6" / CHECKSUMS_FILE).unlink()
    (state / "runs").mkdir()  # of TensorBoard
    (state / "runs" / "events").write_text("curves")
    resumed = run(slim, tmp_path / "out", data, **options)
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weight, weights(tmp_path / "out")[name])
    for curve in ("train_loss", "held_out_perplexity"):
        assert resumed[curve] == whole[curve]
    assert resumed["peak_memory_bytes"] == 10**15 > whole["peak_memory_bytes"]
    one, other = (tmp_path / name / "metrics.jsonl" for name in ("whole", "out"))
    assert one.read_text() == other.read_text()
    assert (tmp_path / "out" / "runs" / "events").read_text() == "curves"
    assert not state.exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_run_killed_after_the_last_step_is_only_written(
    slim: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def stop(*_: Any) -> None:
        raise InterruptedError_

    whole = run(slim, tmp_path / "whole", data, method=method)
    with monkeypatch.context() as patch:
        patch.setattr(recover, "_write", stop)
        with pytest.raises(InterruptedError_):
            run(slim, tmp_path / "out", data, method=method)
    resumed = run(slim, tmp_path / "out", data, method=method)
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weight, weights(tmp_path / "out")[name])
    for key in ("train_loss", "held_out_perplexity", "steps"):
        assert resumed[key] == whole[key]
    one, other = (tmp_path / name / "metrics.jsonl" for name in ("whole", "out"))
    assert one.read_text() == other.read_text()


def test_a_training_that_diverges_ends_without_a_result(
    slim: Path, data: str, tmp_path: Path
) -> None:
    with pytest.raises(NumericalError, match=r"at step [23]") as diverged:
        run(slim, tmp_path / "out", data, learning_rate=1e25)
    assert "--learning-rate" in str(diverged.value.hint)
    assert not (tmp_path / "out" / "config.json").exists()


def test_other_options_do_not_resume(
    slim: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, step=3)
        with pytest.raises(InterruptedError_):
            run(slim, tmp_path / "out", data)
    with pytest.raises(RunStateError, match="rank was 4 and is 2") as refused:
        run(slim, tmp_path / "out", data, rank=2)
    assert "--restart" in str(refused.value.hint)
    shorter = tmp_path / Path(data).name
    shorter.write_text(json.dumps(json.loads(Path(data).read_text())[:12]), encoding="utf-8")
    with pytest.raises(RunStateError, match="examples_sha256"):
        run(slim, tmp_path / "out", str(shorter))
    weights_file = slim / "model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunStateError, match=r"model's model\.safetensors was"):
        run(slim, tmp_path / "out", data)
    weights_file.write_bytes(content)
    config_file = slim / "config.json"
    config = config_file.read_text()
    config_file.write_text(json.dumps(json.loads(config) | {"rms_norm_eps": 0.5}))
    with pytest.raises(RunStateError, match="model config was"):
        run(slim, tmp_path / "out", data)
    config_file.write_text(config)
    report = run(slim, tmp_path / "out", data, rank=2, restart=True)
    assert [step for step, _ in report["train_loss"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named(
    name: str, slim: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, step=3)
        with pytest.raises(InterruptedError_):
            run(slim, tmp_path / "out", data)
    (checkpoint,) = (tmp_path / "out" / STATE_DIR).glob("checkpoint-*")
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunStateError, match=f"{name} of the interrupted run is damaged"):
        run(slim, tmp_path / "out", data)
    (checkpoint / name).write_bytes(content)
    run(slim, tmp_path / "out", data)


def test_mistakes(
    slim: Path,
    data: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    distill = {"method": "distill", "adapters": True, "tokens": "1k"}
    with pytest.raises(ConfigError, match="no pruning report") as no_report:
        run(tiny_checkpoint("llama"), output, data, **distill)
    assert "--teacher" in str(no_report.value.hint)
    local = tmp_path / "local"  # of a base model that was local, too
    shutil.copytree(slim, local)
    pruning_report = json.loads((local / "pruning_report.json").read_text())
    pruning_report["base_model"] = Path(pruning_report["base_model"]).name
    (local / "pruning_report.json").write_text(json.dumps(pruning_report))
    monkeypatch.chdir(tiny_checkpoint("llama").parent)
    with pytest.raises(ConfigError, match="where on the hub its base model is"):
        run(local, output, data, **distill)
    with pytest.raises(ConfigError, match="no multiple of micro_batch_size=3"):
        run(slim, output, data, micro_batch_size=3)
    with pytest.raises(ConfigError, match=r"has no top_k; did you mean 'distill'\?"):
        run(slim, output, data, top_k=3)
    with pytest.raises(MissingDependencyError, match="'clearml'"):
        run(slim, output, data, report_to="clearml")
    with pytest.raises(ConfigError, match="no tracker 'tensorbord'") as unknown:
        run(slim, output, data, report_to="tensorbord")
    assert "did you mean 'tensorboard'?" in str(unknown.value.hint)
    (local / "recovery_report.json").touch()
    with pytest.raises(ConfigError, match="recovered already"):
        run(local, output, data)
    with monkeypatch.context() as patch:
        patch.setattr(recover, "find_spec", lambda _: None)
        with pytest.raises(MissingDependencyError, match="'peft'"):
            run(slim, output, data)
    assert not output.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit for the size of a file")
@pytest.mark.parametrize("limit", [20_000, 80_000, 200_000])  # adapters, optimizer, merged model
def test_disk_is_full(slim: Path, data: str, tmp_path: Path, limit: int) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RunStateError, match="cannot write to") as full:
            run(slim, tmp_path / "out", data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path / "out:") in str(full.value)
    assert "free some space" in str(full.value.hint)
    assert run(slim, tmp_path / "out", data)["steps"] == 4


def test_mistakes_are_found_before_data_is_read(
    slim: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(recover, "training_examples")
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match="float16 cannot be trained on a CPU"):
        run(slim, output, data, dtype="float16")
    with pytest.raises(ConfigError, match="cuda:99"):
        run(slim, output, data, device="cuda:99")
    assert not output.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RunStateError, match="not empty"):
        run(slim, tmp_path / "full", data)


def test_batches_of_examples_are_padded() -> None:
    examples = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, IGNORED, 7, 8, 9]},
        {"input_ids": [10, 11, 12], "labels": [IGNORED, 11, 12]},
    ]
    batch = trainer.pad_batch(examples, pad_token=1)
    assert batch["labels"][1].tolist() == [IGNORED, 11, 12] + 29 * [IGNORED]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]


def test_windows_are_not_longer_than_the_context(
    slim: Path, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = run(slim, tmp_path / "out", data, seqlen=200, max_steps=1)
    assert "seqlen 200 is beyond the model's context: 128 is used" in caplog.text
    assert report["config"]["seqlen"] == 128


def test_text_field_holds_for_both_texts(slim: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"body": "All is well that ends well. " * 100}), encoding="utf-8")
    options = {"eval_data": str(text), "text_field": "body", "max_steps": 1}
    assert run(slim, tmp_path / "out", str(text), **options)["held_out"] == "text.jsonl"
