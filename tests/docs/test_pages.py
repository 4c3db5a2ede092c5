"""The pages of the documentation that are code: options, Python examples, the notebook."""

import doctest
import importlib.util
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import slimgpt

DOCS = Path(__file__).parents[2] / "docs"

QUICK = '"nsamples": 2, "seqlen": 32, "refit_epochs": 0, "correction": 0'


def test_page_of_options_is_current() -> None:
    file = DOCS.parent / "tools" / "options_page.py"
    spec = importlib.util.spec_from_file_location("options_page", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    current = (DOCS / "options.md").read_text(encoding="utf-8")
    assert module.page() == current, "python tools/options_page.py > docs/options.md"


@pytest.mark.real_model
def test_python_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = DOCS / "python.md"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, run = doctest.testfile(str(file), module_relative=False, optionflags=flags)
    assert run > 20
    assert failed == 0


@pytest.mark.real_model
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook: Any = nbformat.read(DOCS / "first-steps.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (pruning,) = [cell for cell in notebook.cells if cell.source.startswith("SETTINGS")]
    pruning.source = pruning.source.replace('"nsamples": 16, "seqlen": 128', QUICK)
    assert QUICK in pruning.source
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("text/html" in output.get("data", ()) for output in outputs) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "KL divergence to the base" in printed
    assert list(tmp_path.glob("*/slim/slim-q8_0.gguf"))


def test_every_public_name_has_a_docstring_on_the_site() -> None:
    public = {f"slimgpt.{home}.{name}" for name, home in slimgpt._HOMES.items()}
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = {line.removeprefix("::: ") for line in text.splitlines() if line.startswith(":::")}
    assert listed == public - {"slimgpt.checkpoint.registration.register"}
