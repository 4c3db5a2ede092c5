"""Reports are read as they were written, and those of earlier versions too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slimgpt
from slimgpt.checkpoint.results import REPORT_FILE, PruningReport, read_report

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


def test_reports_of_0_1_are_read(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"calibration": "pydocs", "nsamples": 6, "seqlen": 32, "ratio": 0.4}
    output = slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **options).output
    file = output / REPORT_FILE
    new = read_report(file, PruningReport)
    old = as_in_0_1(json.loads(file.read_text()))
    assert old["blocks"][0].keys() == {"block", "attention", "ffn"}
    file.write_text(json.dumps(old))
    assert read_report(file, PruningReport) == new
    assert slimgpt.inspect(output).pruning is not None
