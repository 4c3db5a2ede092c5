"""The program that runs the steps on a GPU: what is written, and when it ends."""

import json
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SPAWNING = """
import subprocess, sys
print('{"number": 1}', flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
"""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/gpu/run.py."""
    for path in (BENCHMARKS, BENCHMARKS / "gpu"):
        monkeypatch.syspath_prepend(path)
    return pkgutil.resolve_name("run")


def run(steps: Any, monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device=cpu", f"--output={output}", *arguments])
    return steps.main()


def test_results_before_a_failure_are_written(
    steps: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    programs = {"good": "print('{\"number\": 1}')", "bad": "raise SystemExit(3)", "last": "pass"}
    made = [steps.Step(name, ["-c", program], 60) for name, program in programs.items()]
    monkeypatch.setattr(steps, "make_steps", lambda *args: made)
    assert run(steps, monkeypatch, tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed: bad"
    written = json.loads((tmp_path / "results.json").read_text())["steps"]
    statuses = {step["name"]: step["status"] for step in written}
    assert statuses == {"good": "passed", "bad": "failed: exit code 3", "last": "passed"}
    assert written[0]["rows"] == [{"number": 1}]
    assert "    number 1\nbad      failed" in (tmp_path / "table.txt").read_text()


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(steps: Any) -> None:
    step, reported = steps.Step("slow", ["-c", SPAWNING], 60), []
    start = time.monotonic()
    step.run(2, lambda: reported.append(list(step.rows)))
    assert time.monotonic() - start < 30
    assert step.status == "failed: not finished after 2 s"
    assert reported == [[{"number": 1}]]


def test_without_time_nothing_starts(
    steps: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(steps, monkeypatch, tmp_path, "--minutes=8", "--spent=476") == 0
    written = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {step["status"] for step in written} == {"skipped: no time is left"}


def test_the_whole_model_is_pruned_only_if_there_is_time(steps: Any) -> None:
    made = {step.name: step for step in steps.make_steps("cuda", False)}
    made["blocks"].rows = [{"seconds": 200.0}]
    reasons = [
        steps.why_skipped(made["whole"], list(made.values()), False, left) for left in (250, 270)
    ]
    assert reasons == ["takes about 200 s, and 250 s are left", None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu(
    steps: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device=cuda"])
    with pytest.raises(SystemExit, match="2"):
        steps.main()
    assert "device 'cuda' is not available: 0 CUDA devices" in capsys.readouterr().err
