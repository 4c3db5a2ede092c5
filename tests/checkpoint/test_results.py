"""Reports are read as they were written, and those of earlier versions too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slimgpt
from slimgpt.checkpoint.results import REPORT_FILE, PruningReport, read_report
from slimgpt.errors import ConfigError

UNITS = {"attention": ("num_groups", "group_params"), "ffn": ("num_channels", "channel_params")}


def as_in_0_1(report: dict[str, Any]) -> dict[str, Any]:
    """Write a report as version 0.1 did: blocks are pairs of attention and FFN."""

    def shape(new: dict[str, Any]) -> dict[str, int]:
        return {
            name: sublayer[key]
            for sublayer in new["sublayers"]
            for name, key in zip(UNITS[sublayer["kind"]], ("num_units", "unit_params"), strict=True)
        }

    def block(new: dict[str, Any]) -> dict[str, Any]:
        parts = {s["kind"]: {k: v for k, v in s.items() if k != "kind"} for s in new["sublayers"]}
        return {"block": new["block"], **parts}

    widths = [{"num_groups": width[0], "num_channels": width[1]} for width in report["widths"]]
    changed = {
        "shapes": list(map(shape, report["shapes"])),
        "widths": widths,
        "blocks": list(map(block, report["blocks"])),
    }
    return report | changed


@pytest.fixture
def slim(slim_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(slim_checkpoint("llama"), tmp_path / "slim")


def test_reports_of_0_1_are_read(slim: Path) -> None:
    file = slim / REPORT_FILE
    new = read_report(file, PruningReport)
    old = as_in_0_1(json.loads(file.read_text()))
    assert old["blocks"][0].keys() == {"block", "attention", "ffn"}
    file.write_text(json.dumps(old))
    for shape in new["shapes"]:
        for sublayer in shape["sublayers"]:
            for name in ("unit_params", "is_fixed", "parts", "part_params", "fewest", "multiple"):
                del sublayer[name]
    assert read_report(file, PruningReport) == new


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks: blocks[1].pop("ffn"), "sublayers"),
        (lambda blocks: blocks[1].update(ffn=3), "another form"),
        (lambda blocks: blocks[1].pop("block"), "lack 'block'"),
        (lambda blocks: blocks[1]["ffn"].pop("keep"), "keep"),
    ],
)
def test_broken_reports_of_0_1(
    change: Callable[[list[dict[str, Any]]], None], message: str, slim: Path
) -> None:
    file = slim / REPORT_FILE
    old = as_in_0_1(json.loads(file.read_text()))
    change(old["blocks"])
    file.write_text(json.dumps(old))
    with pytest.raises(ConfigError, match=message):
        read_report(file, PruningReport)


def test_a_block_without_an_ffn(slim: Path) -> None:
    file = slim / REPORT_FILE
    report = json.loads(file.read_text())
    report["blocks"][1]["sublayers"].pop()
    file.write_text(json.dumps(report))
    with pytest.raises(ConfigError, match="not attention and ffn"):
        read_report(file, PruningReport)


def test_what_reads_a_report_of_0_1(slim: Path) -> None:
    file = slim / REPORT_FILE
    file.write_text(json.dumps(as_in_0_1(json.loads(file.read_text()))))
    assert slimgpt.inspect(slim).pruning is not None
