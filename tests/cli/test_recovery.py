"""`slimgpt prune --recover`: both phases in one command, their budgets, and what ends them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT, TINY, Run
from interruption import fail_at_block, fingerprint
from transformers import AutoConfig, AutoModelForSequenceClassification

import slimgpt
from slimgpt.recovery import budget, recover, trainer
from slimgpt.recovery.budget import Costs

# Of the text of 30 windows, three are left out for the evaluation.
PRUNING = ("--ratio", "0.3", "--calibration", TEXT, "--nsamples", "4", "--seqlen", "32")

Prune = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prune(run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Prune:
    """Prune and recover into a directory with this name."""

    def call(*flags: str, output: str = "out", asked: str = "1024") -> tuple[int, str, str]:
        base, folder = tiny_checkpoint("llama"), tmp_path / output
        return run("prune", base, "--output", folder, *PRUNING, "--recover", asked, *flags)

    return call


@pytest.fixture(scope="module")
def in_two(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the two commands give, in `out-pruned` and `out`."""
    folder, base = tmp_path_factory.mktemp("two"), str(tiny_checkpoint("llama"))
    slim = folder / "out-pruned"
    slimgpt.prune(base, slim, ratio=0.3, calibration=TEXT, nsamples=4, seqlen=32)
    texts = {"data": TEXT, "eval_data": TEXT, "tokens": 1024}
    slimgpt.recover(str(slim), folder / "out", method="distill", teacher=base, **texts)
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """Every file of both products, without measured times and memory."""
    report = json.loads((folder / "out" / "recovery_report.json").read_text())
    for measured in ("seconds", "preparation_seconds", "peak_memory_bytes"):
        del report[measured]
    files = fingerprint(folder / "out") | {"recovery_report.json": report}
    return files | {f"pruned {k}": v for k, v in fingerprint(folder / "out-pruned").items()}


def test_one_command_does_what_two_do(prune: Prune, in_two: Path, tmp_path: Path) -> None:
    code, out, err = prune("--json")
    assert code == 0, err
    printed, expected = json.loads(out), contents(in_two)
    assert contents(tmp_path) == expected
    assert printed["output"] == str(tmp_path / "out")
    assert printed["pruned"] == str(tmp_path / "out-pruned")
    for file in ("pruning", "recovery"):
        report = json.loads((tmp_path / "out" / f"{file}_report.json").read_text())
        assert report.items() <= (printed if file == "pruning" else printed["recovery"]).items()
    assert printed["recovery"]["tokens"] == 1024
    assert printed["recovery"]["held_out"] == "text.txt (windows left out of the training)"


def test_a_finished_command_does_nothing(
    prune: Prune, in_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(in_two, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(slimgpt, "prune", None)
    monkeypatch.setattr(slimgpt, "recover", None)
    for flags in ((), ("--restart",)):
        code, out, err = prune(*flags)
        assert code == 0, err
        assert "out is finished" in err
        assert f"the pruned model is in {tmp_path / 'out-pruned'}" in out
        assert f"the recovered model is in {tmp_path / 'out'}" in out
    assert contents(tmp_path) == contents(in_two)
    for arguments, name in ((("--seed", "1"), "seed"), (("--nsamples", "5"), "nsamples")):
        code, _, err = prune(*arguments)
        assert code == 2
        assert f"was made with other options: {name}" in err
    code, _, err = prune(asked="30min")
    assert code == 2
    assert "was made with other options: tokens, minutes" in err


def stop_after_step(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
    if state.global_step == 3:
        raise KeyboardInterrupt


def end(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["pruning", "between", "text", "training"])
def test_an_interrupted_command_goes_on(
    place: str, prune: Prune, in_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if place == "pruning":
            fail_at_block(2, KeyboardInterrupt(), patch)
        elif place == "training":
            patch.setattr(trainer.MetricsLogger, "on_step_end", stop_after_step)
        else:
            patch.setattr(
                recover, {"between": "_identity", "text": "store_predictions"}[place], end
            )
        code, _, err = prune("--restart")
    assert code == 130
    assert "resume with:\n  slimgpt prune" in err
    assert "--restart" not in err
    assert not (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out-pruned" / "config.json").exists() == (place != "pruning")
    code, _, err = prune()
    assert code == 0, err
    assert contents(tmp_path) == contents(in_two)


def test_restart_discards_the_interrupted_runs(
    prune: Prune, in_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other options for the second phase, or the first; a finished pruned model stays."""
    with monkeypatch.context() as patch:
        fail_at_block(2, KeyboardInterrupt(), patch)
        assert prune("--seed", "1")[0] == 130
    assert "seed was 1 and is 0" in prune()[2]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.MetricsLogger, "on_step_end", stop_after_step)
        assert prune("--restart", asked="2048")[0] == 130
    assert "tokens was 2048 and is 1024" in prune()[2]
    monkeypatch.setattr(slimgpt, "prune", None)
    code, _, err = prune("--restart")
    assert code == 0, err
    assert contents(tmp_path) == contents(in_two)


COSTS = Costs(generation=0.1, prediction=0.0, step=14, evaluation=1, checkpoint=1, loading=9)


def test_a_time_becomes_tokens(
    prune: Prune, in_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred seconds: 30 for what is fixed, and five steps of two windows of 128 tokens."""
    with monkeypatch.context() as patch:
        patch.setattr(budget, "measure", lambda *_: COSTS)
        patch.setattr(trainer.MetricsLogger, "on_step_end", stop_after_step)
        code, _, err = prune(asked="1.7min")
    assert code == 130
    assert "1.7 minutes are enough for 1280 tokens" in err
    monkeypatch.setattr(budget, "measure", end)  # what was chosen stays
    assert "minutes was 1.7 and is 9.0" in prune(asked="9min")[2]
    code, out, err = prune(asked="1.7min")
    assert code == 0, err
    assert "1,280 tokens in 0.0 minutes, asked for 1.7" in out
    report = json.loads((tmp_path / "out" / "recovery_report.json").read_text())
    assert report["tokens"] == report["config"]["tokens"] == report["budget"]["tokens"] == 1280
    assert (report["budget"]["minutes"], report["steps"]) == (1.7, 5)
    taken = report["budget"]["measuring"] + report["preparation_seconds"] + report["seconds"]
    assert report["budget"]["seconds"] == pytest.approx(taken, abs=0.01)
    code, _, err = prune(asked="1.7min")
    assert code == 0
    assert "is finished" in err


def test_mistakes_are_found_before_any_work(
    prune: Prune, run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(slimgpt, "prune", None)
    taken = tmp_path / "taken" / "notes.txt"
    for folder in ("taken", "other-pruned"):
        (tmp_path / folder).mkdir()
        shutil.copy(TEXT, tmp_path / folder)
    shutil.move(tmp_path / "taken" / "text.txt", taken)
    for output in ("taken", "other"):
        code, _, err = prune(output=output)
        assert code == 2
        assert "exists and is not empty" in err
    for asked in ("1M", "100k"):
        code, _, err = prune(asked=asked)
        assert code == 2
        assert "text.txt has 3911 tokens, 30 samples of 128, but" in err
        assert "samples and 3 held-out ones need" in err
    config = AutoConfig.for_model("llama", **TINY, num_labels=2)
    model = tmp_path / "classifier"
    shutil.copytree(tiny_checkpoint("llama"), model)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(model)
    for flags in (("--output", str(tmp_path / "out")), ("--dry-run",)):
        code, _, err = run(
            "prune", model, *PRUNING, "--widths", "scheduled", "--recover", "1k", *flags
        )
        assert code == 2
        assert "which has no head for language modelling" in err
    assert taken.exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-pruned").exists()


def test_the_directory_of_another_run(
    prune: Prune, run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        fail_at_block(2, KeyboardInterrupt(), patch)
        run("prune", tiny_checkpoint("llama"), "--output", tmp_path / "out", *PRUNING)
    code, _, err = prune()
    assert code == 2
    assert "out holds an interrupted run, but" in err
    assert not (tmp_path / "out-pruned").exists()


def test_a_plan_says_the_recovery(prune: Prune, tmp_path: Path) -> None:
    code, out, err = prune("--dry-run")
    assert code == 0, err
    assert f"then: distilled on 1024 tokens of {TEXT}; held-out text: {TEXT}" in out
    prompts = tmp_path.parent / "prompts.txt"
    prompts.write_text("One thing\n")
    options = ("--calibration", "pydocs,self", "--prompts", prompts)
    code, out, _ = prune("--dry-run", "--json", *options, asked="1h")
    planned = json.loads(out)
    assert planned["recovery"]["prompts"] == str(prompts)
    assert planned["recovery"]["minutes"] == 60
    assert planned["recovery"]["data"] == ["pydocs", "self"]
    assert planned["recovery"]["eval_data"] == "pydocs"
    assert planned["params_after"] < planned["params_before"]
    assert not list(tmp_path.iterdir())
