"""What a notebook shows: well-formed, escaped, and readable without Matplotlib."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import TEXT

import slimgpt
from slimgpt.presentation import html


@pytest.fixture(scope="module")
def shown(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: Any) -> dict[str, Any]:
    """Values with a view of their own, of a model with an awkward name."""
    directory = tmp_path_factory.mktemp("models")
    model = str(shutil.copytree(tiny_checkpoint("llama"), directory / "a<b>&c"))
    small: dict[str, Any] = {"calibration": TEXT, "nsamples": 2, "seqlen": 16}
    return {
        "plan": slimgpt.plan(model, ratio=0.3),
        "dropped": slimgpt.plan(model, drop_layers=1),
        "summary": slimgpt.inspect(model),
        "result": slimgpt.prune(model, directory / "slim<i>", ratio=0.3, **small),
    }


def tree(value: Any) -> ElementTree.Element:
    return ElementTree.fromstring(f"<all xmlns:xlink='xlink'>{value._repr_html_()}</all>")


@pytest.mark.parametrize(
    ("name", "charts", "tables"),
    [("plan", 1, 2), ("dropped", 1, 2), ("summary", 0, 2), ("result", 2, 3)],
)
def test_tables_and_charts(
    name: str, charts: int, tables: int, shown: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tree(shown[name])
    assert len(found.findall(".//table")) == tables
    assert len(found.findall('.//div[@role="img"]')) == charts
    (body,) = found.findall(".//tbody")
    assert len(body) == 4  # a row for each block
    assert "i" not in {element.tag for element in found.iter()}
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    without = tree(shown[name])
    assert len(without.findall(".//table")) == tables
    assert not without.findall('.//div[@role="img"]')


def test_numbers(shown: dict[str, Any]) -> None:
    text = "".join(tree(shown["result"]).itertext())
    plan = shown["result"].plan
    for number in (f"{plan.params_after:,}", f"{plan.block_ratio:.2%}", f"{plan.total_ratio:.2%}"):
        assert number in text
    assert "slim<i>" in text
    summary = "".join(tree(shown["summary"]).itertext())
    assert f"{shown['summary'].params['total']:,}" in summary
    assert "a<b>&c" in summary
