"""Runs that are killed at any point, and go on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import TEXT
from interruption import fingerprint

KILLS = 20


def test_killed_runs_end_with_the_same_files(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {
        "model": str(tiny_checkpoint("llama")),
        "calibration": TEXT,
        "nsamples": 6,
        "seqlen": 32,
        "ratio": 0.4,
        "max_shard_size": 50_000,
    }
    program = Path(__file__).parents[1] / "killing.py"
    finished = subprocess.run(
        [sys.executable, program, tmp_path, str(KILLS), "0", json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    outcomes = json.loads(finished.stdout)
    assert len(outcomes) == KILLS
    phases = {"prune_block", "_measured", "replay_block", "write_file", "replacing", "result"}
    assert {outcome["phase"] for outcome in outcomes} == phases | {"publish", "other"}
    assert sum(outcome["codes"][1] == -9 for outcome in outcomes) > 2  # in a replay
    expected = fingerprint(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) > 2
    for index, outcome in enumerate(outcomes):
        first, second, last = outcome["codes"]
        assert first == -9, outcome
        assert second in (-9, 0), outcome
        assert last == 0, outcome
        assert fingerprint(tmp_path / str(index)) == expected, outcome
