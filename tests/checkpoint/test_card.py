"""The metadata of the model card: what the hub reads, and what others have written there."""

import json
import shutil
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from slimgpt.checkpoint import card
from slimgpt.evaluation.evaluate import TaskResult
from slimgpt.evaluation.perplexity import EvalResult


@pytest.fixture
def slim(slim_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(
        slim_checkpoint("llama"), tmp_path / "slim", ignore=shutil.ignore_patterns("eval")
    )


def keep_perplexity(slim: Path, seqlen: int, perplexity: float) -> None:
    theirs = (None, None, None)
    data = "wikitext2 (Salesforce/wikitext, test)"
    result = EvalResult("slim", None, "float32", data, "0", seqlen, 100, perplexity, *theirs)
    card.keep_results(slim, "eval/perplexity.json", [result], itemgetter("data", "seqlen"))


def keep_task(slim: Path, metric: str, value: float) -> None:
    options = (metric, value, 0.1, True, 2, 0, "piqa.jsonl", "0.4, version 1")
    result = TaskResult("piqa", *options, "slim", None, "float32", None, None)
    card.keep_results(slim, "eval/tasks.json", [result], itemgetter("task", "metric"))


def test_results_are_in_the_metadata(slim: Path) -> None:
    keep_perplexity(slim, 512, 30.5)
    keep_perplexity(slim, 2048, 20.25)
    keep_perplexity(slim, 512, 10.125)  # in place of the first
    keep_task(slim, "acc", 0.5)
    keep_task(slim, "acc_norm", 0.75)
    data: Any = ModelCard.load(slim / "README.md").data
    assert data.model_name == "slim"
    assert [
        (r.dataset_type, r.dataset_config, r.metric_type, r.metric_value) for r in data.eval_results
    ] == [
        ("wikitext2", "windows of 512 tokens, float32", "perplexity", 10.125),
        ("wikitext2", "windows of 2048 tokens, float32", "perplexity", 20.25),
        ("piqa", "0-shot, 2 questions of piqa.jsonl, float32", "acc", 0.5),
        ("piqa", "0-shot, 2 questions of piqa.jsonl, float32", "acc_norm", 0.75),
    ]


def test_metadata_of_others_stays(slim: Path) -> None:
    file = slim / "README.md"
    mine = """language: en
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {name: MMLU, type: mmlu}
    metrics: [{type: acc, value: 0.3}]
"""
    file.write_text(file.read_text().replace("---\n", f"---\n{mine}", 1))
    keep_perplexity(slim, 512, 30.5)
    data: Any = ModelCard.load(file).data
    assert data.language == "en"
    assert data.model_name == "mine"
    assert [result.dataset_type for result in data.eval_results] == ["mmlu", "wikitext2"]


@pytest.mark.parametrize(
    "metadata",
    [
        "tags: [",
        "- a\n- list",
        "tags: 3",
        "model-index: 3",
        "model-index: [{name: x, results: [{task: 3}]}]",
        "eval_results: 3",
        "3: a key that is not a text",
        "[" * 2000,
    ],
    ids=lambda text: text[:20],
)
def test_metadata_that_cannot_be_read(
    metadata: str, slim: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = f"---\n{metadata}\n---\n<!-- perplexity -->\n<!-- end of perplexity -->\n"
    (slim / "README.md").write_text(content)
    keep_perplexity(slim, 512, 30.5)
    assert (slim / "README.md").read_text() == content
    assert "README.md, which cannot be read: " in caplog.text
    assert len(json.loads((slim / "eval" / "perplexity.json").read_text())) == 1


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("license: other\nlicense_name: x", {"license": "other", "license_name": "x"}),
        ("language: en", {}),
        ("license: [", {}),
        (None, {}),
    ],
)
def test_license_of_a_base_in_the_cache(
    metadata: str | None,
    expected: dict[str, str],
    slim: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if metadata:
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    cached = str(tmp_path / "README.md") if metadata else None
    asked = []
    monkeypatch.setattr(card, "try_to_load_from_cache", lambda *args: asked.append(args) or cached)
    report = json.loads((slim / "pruning_report.json").read_text())
    (slim / "pruning_report.json").write_text(json.dumps(report | {"base_model": "owner/name"}))
    card.write_card(slim)
    data = ModelCard.load(slim / "README.md").data.to_dict()
    assert data["base_model"] == "owner/name"
    assert {key: value for key, value in data.items() if "license" in key} == expected
    assert asked == [("owner/name", "README.md")]


def test_metadata_names_the_base_and_how_it_is_related(slim: Path) -> None:
    edited = json.loads((slim / "pruning_report.json").read_text()) | {"base_model": "owner/base"}
    (slim / "pruning_report.json").write_text(json.dumps(edited))
    card.write_card(slim)
    data = ModelCard.load(slim / "README.md").data.to_dict()
    assert data["base_model"] == "owner/base"
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "text-generation"
