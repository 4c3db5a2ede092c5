"""Recipes: what a grid stands for, that work is done once, and what is shown of it."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import TEXT, Run
from hypothesis import given
from hypothesis import strategies as st
from interruption import is_measuring

import slimgpt
from slimgpt.errors import ConfigError, NumericalError, ResourceError, RunStateError
from slimgpt.experiments import runner
from slimgpt.experiments.recipe import SHIPPED, Cell, RecipeConfig, expand, read_recipe
from slimgpt.experiments.tables import draw, to_markdown
from slimgpt.models.source import EMBEDDED_MODELS
from slimgpt.pruning import inputs, sequential

ANY: dict[str, Any] = {"title": "A title", "reproduces": "Table 0", "table": ["perplexity"]}
Edit = Callable[..., Path]


@pytest.fixture
def recipe(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Edit:
    """Write a recipe on a tiny model, with these changes."""
    values = ANY | {
        "model": str(tiny_checkpoint("llama")),
        "prune": {"calibration": TEXT, "nsamples": 2, "seqlen": 16},
        "evaluate": {"data": ["pydocs"], "seqlen": [16], "max_tokens": 64},
        "grid": {"ratio": [0, 0.3, 0.45], "schedule": ["log", "uniform"]},
        "table": ["parameters", "pruning", "perplexity"],
    }

    def write(**changes: Any) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values | changes, sort_keys=False))
        return file

    return write


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each verb has been called."""
    counter: Counter[str] = Counter()

    def counted(verb: str) -> Callable[..., Any]:
        original = getattr(runner, verb)

        def call(*args: Any, **options: Any) -> Any:
            counter[verb] += 1
            return original(*args, **options)

        return call

    for verb in ("prune", "recover", "evaluate", "bench"):
        monkeypatch.setattr(runner, verb, counted(verb))
    return counter


def test_a_run_makes_the_table(run: Run, recipe: Edit, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, out, err = run("run", recipe(), "--output", output)
    assert code == 0
    assert "cell 5/5: ratio 45 %, schedule uniform" in err
    assert str(output) in out
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (output / "recipe.md").read_text().splitlines()
        if line.startswith("|")
    ]
    names = ["ratio", "schedule", "parameters", "pruning, s", "peak memory, GiB"]
    assert header == [*names, "perplexity, pydocs × 16"]
    assert [row[:2] for row in rows] == [
        ["0 %", ""], ["30 %", "log"], ["30 %", "uniform"], ["45 %", "log"], ["45 %", "uniform"]
    ]  # fmt: skip
    assert rows[0][3:5] == ["", ""]
    report = json.loads((output / "recipe.json").read_text())
    perplexities = [cell["evaluate"]["perplexity"][0]["perplexity"] for cell in report["cells"]]
    assert [row[-1].strip("*") for row in rows] == [f"{value:.2f}" for value in perplexities]
    bold = [row[-1].startswith("**") for row in rows]
    best = {min(perplexities[1:3]), min(perplexities[3:])}
    assert bold == [value in best for value in perplexities]
    assert report["cells"][0]["prune"]["params_after"] > report["cells"][1]["prune"]["params_after"]
    assert not (output / "models").exists()
    assert str(output) not in json.dumps(report)


def test_the_numbers_are_those_of_the_verbs(
    recipe: Edit, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    grid = {"ratio": [0.3]}
    result = slimgpt.run_recipe(recipe(grid=grid), tmp_path / "out", keep_models=True)
    (model,) = (tmp_path / "out" / "models").iterdir()
    options = {"data": "pydocs", "seqlen": 16, "max_tokens": 64}
    direct = tmp_path / "direct"
    slimgpt.prune(
        str(tiny_checkpoint("llama")),
        direct,
        ratio=0.3,
        calibration=TEXT,
        nsamples=2,
        seqlen=16,
    )
    expected = slimgpt.evaluate(str(direct), **options).perplexity[0].perplexity
    assert result.report["cells"][0]["evaluate"]["perplexity"][0]["perplexity"] == expected
    assert slimgpt.evaluate(str(model), **options).perplexity[0].perplexity == expected


def test_shared_work_is_done_once(recipe: Edit, calls: Counter[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    training = {"data": TEXT, "eval_data": TEXT, "eval_tokens": 64, "seqlen": 32}
    training |= {"max_steps": 2, "max_examples": 4, "batch_size": 2, "micro_batch_size": 2}
    grid = {"ratio": [0, 0.3], "recovery": {"none": {}, "LoRA": {"recover": training}}}
    columns = ["parameters", "perplexity"]
    file = recipe(grid=grid, table=columns, figure=["train_loss", "held_out_perplexity"])
    result = slimgpt.run_recipe(file, tmp_path / "out")
    assert calls == {"prune": 1, "recover": 1, "evaluate": 3}
    assert [cell["labels"] for cell in result.report["cells"]] == [
        {"ratio": 0, "recovery": None},
        {"ratio": 0.3, "recovery": "none"},
        {"ratio": 0.3, "recovery": "LoRA"},
    ]
    assert "2 steps, lora, 2 examples a step" in result.markdown
    drawn = ElementTree.parse(tmp_path / "out" / "recipe.svg").getroot()
    assert drawn.tag.endswith("svg")
    slimgpt.run_recipe(file, tmp_path / "out")
    assert calls == {"prune": 1, "recover": 1, "evaluate": 3}


def test_interrupted_runs_go_on(
    recipe: Edit, calls: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = runner.evaluate

    def interrupted(*args: Any, **options: Any) -> Any:
        if calls["prune"] == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slimgpt.run_recipe(recipe(), tmp_path / "out")
    before = calls.copy()
    assert before == {"prune": 2, "evaluate": 2}
    slimgpt.run_recipe(recipe(), tmp_path / "out")
    assert calls - before == {"prune": 2, "evaluate": 3}


def test_a_changed_recipe_redoes_what_has_changed(
    recipe: Edit, calls: Counter[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    grid = {"ratio": [0, 0.3]}
    slimgpt.run_recipe(recipe(grid=grid), output, keep_models=True)
    assert calls == {"prune": 1, "evaluate": 2}
    evaluate = {"data": ["pydocs"], "seqlen": [32], "max_tokens": 64}
    slimgpt.run_recipe(recipe(grid=grid, evaluate=evaluate), output)
    assert calls == {"prune": 1, "evaluate": 4}
    slimgpt.run_recipe(recipe(grid={"ratio": [0, 0.3, 0.4]}, evaluate=evaluate), output)
    assert calls == {"prune": 2, "evaluate": 5}


def test_a_changed_file_counts_as_changed(
    recipe: Edit, calls: Counter[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven eight " * 20)
    evaluate = {"data": ["{data}/text.txt"], "seqlen": [16]}
    file = recipe(grid={"ratio": [0]}, evaluate=evaluate)
    for words in ("nine ten ", "nine ten eleven "):
        slimgpt.run_recipe(file, tmp_path / "out", data_dir=tmp_path)
        (tmp_path / "text.txt").write_text(words * 100)
    assert calls == {"evaluate": 2}


def test_a_changed_model_counts_as_changed(
    recipe: Edit,
    calls: Counter[str],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), model)
    file = recipe(model=str(model), grid={"ratio": [0.3]})
    for _ in range(2):
        slimgpt.run_recipe(file, tmp_path / "out")
    assert calls == {"prune": 1, "evaluate": 1}
    weights = model / "model.safetensors"
    os.utime(weights, (0, 0))
    slimgpt.run_recipe(file, tmp_path / "out")
    assert calls == {"prune": 1, "evaluate": 1}
    content = bytearray(weights.read_bytes())
    content[-4:] = bytes(4)
    weights.write_bytes(content)
    os.utime(weights, (0, 0))
    slimgpt.run_recipe(file, tmp_path / "out")
    assert calls == {"prune": 2, "evaluate": 2}


def test_a_model_of_slimgpt_is_not_changed_by_its_results(
    recipe: Edit,
    calls: Counter[str],
    slim_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = shutil.copytree(slim_checkpoint("llama"), tmp_path / "model")
    file = recipe(model=str(model), grid={"ratio": [0]})
    for _ in range(2):
        slimgpt.run_recipe(file, tmp_path / "out")
    assert (model / "eval" / "perplexity.json").exists()
    assert calls == {"evaluate": 1}


def test_a_folder_with_the_name_of_a_schedule_makes_no_difference(
    recipe: Edit, calls: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").mkdir()
    for name in ("first.out", "second.out"):
        (tmp_path / "log" / name).touch()
        slimgpt.run_recipe(recipe(grid={"ratio": [0.3]}), tmp_path / "out")
    assert calls == {"prune": 1, "evaluate": 1}


def test_a_second_run_in_the_same_directory_is_refused(
    recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = recipe(grid={"ratio": [0.3]}), tmp_path / "out"
    evaluate = runner.evaluate

    def second(*args: Any, **options: Any) -> Any:
        with pytest.raises(RunStateError, match="another process is working on"):
            slimgpt.run_recipe(file, output)
        return evaluate(*args, **options)

    monkeypatch.setattr(runner, "evaluate", second)
    assert not slimgpt.run_recipe(file, output).errors
    assert not (output / runner.LOCK_FILE).exists()


def test_a_model_that_was_begun_from_other_files_is_begun_anew(
    recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(block: Any, *args: Any) -> Any:
        if block.index == 2 and not is_measuring(args):
            raise KeyboardInterrupt
        return prune_block(block, *args)

    file, output = recipe(grid={"ratio": [0.3]}), tmp_path / "out"
    prune_block = sequential.prune_block
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "prune_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slimgpt.run_recipe(file, output)
    assert list(output.glob("models/*/.slimgpt/block-*"))
    monkeypatch.setattr(inputs, "describe_file", lambda path: "downloaded again")
    assert not slimgpt.run_recipe(file, output).errors


def test_dense_models_that_are_measured_in_two_ways(recipe: Edit) -> None:
    half = {"evaluate": {"dtype": "bfloat16"}}
    cells = expand(
        read_recipe(
            recipe(grid={"ratio": [0], "seed": [0, 1], "precision": {"as is": {}, "half": half}})
        )
    )
    assert [cell.labels for cell in cells] == [
        {"ratio": 0, "seed": None, "precision": name} for name in ("as is", "half")
    ]


def test_a_failed_cell_is_shown_and_tried_again(
    run: Run, recipe: Edit, calls: Counter[str], tmp_path: Path
) -> None:
    file = recipe(grid={"ratio": [0.3, 0.95, 0.4]}, figure=["perplexity"], x="ratio")
    output = tmp_path / "out"
    code, _, err = run("run", file, "--output", output)
    assert code == 2
    assert "1 of 3 cells failed" in err
    assert "largest feasible ratio" in err
    lines = [line for line in (output / "recipe.md").read_text().splitlines() if "|" in line]
    assert lines[0].endswith("| failed |")
    assert ["which can lose" in line for line in lines] == [False, False, False, True, False]
    assert lines[3].startswith("| 95 % |  |")
    before = calls.copy()
    assert run("run", file, "--output", output)[0] == 2
    assert calls - before == {"prune": 1}


def test_a_failure_in_numbers_does_not_stop_the_rest(
    recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = runner.prune

    def fail_once(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(runner, "prune", prune)
        raise NumericalError("not positive | definite")

    monkeypatch.setattr(runner, "prune", fail_once)
    result = slimgpt.run_recipe(recipe(grid={"ratio": [0.3, 0.4]}), tmp_path / "out")
    assert result.errors == ["not positive | definite"]
    assert "not positive \\| definite" in result.markdown
    assert "evaluate" in result.report["cells"][1]


def test_what_is_wrong_with_the_machine_stops_the_run(
    recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunStateError, match="cannot write"):
        slimgpt.run_recipe(recipe(), tmp_path / "file" / "out")

    def fail(*args: Any, **options: Any) -> Any:
        raise RunStateError("the disk is full")

    monkeypatch.setattr(runner, "prune", fail)
    with pytest.raises(RunStateError, match="the disk is full"):
        slimgpt.run_recipe(recipe(), tmp_path / "out")
    assert not (tmp_path / "out" / "recipe.md").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": None}, "title=None"),
        ({"tabel": []}, "unknown option 'tabel': did you mean 'table'?"),
        ({"table": ["tasks", "parms"]}, "table='parms': Input should be"),
        ({"grid": {"ratio": [0.2, 1.5]}}, "prune: ratio=1.5: Input should be less than 1"),
        ({"grid": {"ration": [0.2]}}, "prune: unknown option 'ration': did you mean 'ratio'?"),
        ({"grid": {"v": {"a": {"prone": {}}}}}, "unknown step 'prone': did you mean 'prune'?"),
        ({"grid": {"v": {"a": {"prune": None}}}}, "prune=None is no mapping of options"),
        ({"grid": {"v": {"a": {"bench": [2]}}}}, "bench=[2] is no mapping of options"),
        ({"grid": {"ratio": 0.2}}, "grid=0.2"),
        ({"grid": {}, "model": None}, "model is missing"),
        ({"evaluate": {"data": ["pydocs"], "batch_size": 0}}, "evaluate: batch_size=0"),
        ({"evaluate": {"data": ["{data}/x.txt"]}}, "the recipe reads local files from {data}"),
        ({"evaluate": {"data": ["none.txt"]}}, "no data file none.txt"),
        ({"prune": {"calibration": "pydoc"}}, "unknown calibration data set 'pydoc'"),
        ({"figure": ["perplexity"]}, "needs x"),
        ({"figure": ["layer_ratios"], "x": "ratio"}, "x='ratio' is for figures of measures"),
        ({"figure": ["perplexity"], "x": "schedule"}, "x='schedule' is no dimension of numbers"),
        ({"figure": ["layer_errors"]}, "layer_errors need data and against"),
        ({"table": ["inference"]}, "inference comes from `bench`"),
        ({"evaluate": {"tasks": ["piqa"], "data_dir": "none"}}, "directory none does not exist"),
        ({"evaluate": {"tasks": ["piqqa"]}}, "lm-eval has no task 'piqqa'"),
        ({"model": "none"}, "no model 'none'"),
        ({"grid": {"ratio": []}}, "the dimension 'ratio' of the grid is empty"),
        ({"small": {"titel": "x"}}, "unknown option 'titel'"),
    ],
)
def test_a_bad_recipe_is_one_clear_error(
    changes: dict[str, Any], message: str, run: Run, recipe: Edit, tmp_path: Path
) -> None:
    flags = ("--small",) if "small" in changes else ()
    code, out, err = run("run", recipe(**changes), "--output", tmp_path / "out", *flags)
    assert code == 2
    assert message in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert not out
    assert not (tmp_path / "out").exists()


def test_all_problems_are_reported_together(run: Run, recipe: Edit, tmp_path: Path) -> None:
    file = recipe(grid={"ratio": [2, 3]}, evaluate={"seqlen": [0]}, recover={"rank": 0})
    code, _, err = run("run", file, "--output", tmp_path / "out")
    assert code == 2
    for part in ("ratio=2", "ratio=3", "evaluate: ", "recover: rank=0"):
        assert err.count(part) == 1


def test_without_a_small_variant(run: Run, recipe: Edit, tmp_path: Path) -> None:
    code, _, err = run("run", recipe(), "--output", tmp_path / "out", "--small")
    assert code == 2
    assert "has no small variant" in err


def test_a_missing_package_is_named_before_the_work(
    run: Run, recipe: Edit, calls: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    file = recipe(figure=["layer_ratios"])
    code, _, err = run("run", file, "--output", tmp_path / "out")
    assert code == 2
    assert "needs the package 'matplotlib'" in err
    assert not calls


names = st.sampled_from(["seed", "nsamples", "seqlen", "multiple_of"])
numbers = st.lists(st.integers(2, 9), min_size=1, max_size=3, unique=True)


def test_texts_of_the_same_name(run: Run, recipe: Edit, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text("one two three")
    texts = [str(tmp_path / folder / "text.txt") for folder in ("a", "b")]
    code, _, err = run("run", recipe(evaluate={"data": texts}), "--output", tmp_path / "out")
    assert code == 2
    assert "several texts to evaluate on have the name text.txt" in err


def test_one_process(recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ConfigError, match="runs in one process"):
        slimgpt.run_recipe(recipe(), tmp_path / "out")


def test_a_cell_without_memory_fails_alone(
    recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*args: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(runner, "evaluate", evaluate)
    result = slimgpt.run_recipe(recipe(grid={"ratio": [0.3, 0.4]}), tmp_path / "out")
    assert [error.partition(";")[0] for error in result.errors] == ["out of memory"] * 2


@pytest.mark.parametrize(
    ("err", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (PermissionError(13, "Permission denied"), "cannot be read or written"),
        (ZeroDivisionError("surprise"), "internal error: ZeroDivisionError: surprise"),
    ],
)
def test_whatever_ends_a_cell_does_not_end_the_recipe(
    err: Exception, message: str, recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = runner.prune

    def fail_once(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(runner, "prune", prune)
        raise err

    monkeypatch.setattr(runner, "prune", fail_once)
    result = slimgpt.run_recipe(recipe(grid={"ratio": [0.3, 0.4]}), tmp_path / "out")
    (error,) = result.errors
    assert message in error
    assert "evaluate" in result.report["cells"][1]


@pytest.mark.parametrize(
    "err",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),
        ResourceError("no space left: No space left on device", hint="free some space"),
    ],
)
def test_a_full_disk_ends_the_recipe(
    err: Exception, recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(args)
        raise err

    monkeypatch.setattr(runner, "prune", fail)
    with pytest.raises(ResourceError, match="no space left") as error:
        slimgpt.run_recipe(recipe(grid={"ratio": [0.3, 0.4]}), tmp_path / "out")
    assert "free some space" in str(error.value.hint)
    assert len(calls) == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"machine": 3}'])
def test_a_broken_step_is_done_again(
    content: str, recipe: Edit, calls: Counter[str], tmp_path: Path
) -> None:
    file = recipe(grid={"ratio": [0.3]})
    first = slimgpt.run_recipe(file, tmp_path / "out")
    for step in (tmp_path / "out" / "steps").iterdir():
        step.write_text(content)
    second = slimgpt.run_recipe(file, tmp_path / "out")
    assert not second.errors
    results = [result.report["cells"][0]["evaluate"]["perplexity"] for result in (first, second)]
    assert results[0] == results[1]
    assert calls["evaluate"] == 2


def test_labels_stay_in_their_cells() -> None:
    row = {"labels": {"v": "a\n| b"}, "model": "m", "error": None}
    values = ANY | {"grid": {"v": {"a\n| b": {}}}, "title": "one\ntwo"}
    config = RecipeConfig.create(**values).model_dump(mode="json")
    text = to_markdown({"recipe": config, "cells": [row], "is_small": False}, "x.svg")
    assert "# one two\n" in text
    assert "| a \\| b |" in text


@given(st.dictionaries(names, numbers, max_size=3), st.booleans())
def test_a_grid_is_the_product_of_its_dimensions(
    grid: dict[str, list[int]], with_dense: bool
) -> None:
    dimensions = {"ratio": [0, 0.5] if with_dense else [0.5], **grid}
    cells = expand(RecipeConfig.create(**ANY, model="m", prune={"damping": 0.02}, grid=dimensions))
    places = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    pruned = [cell for cell in cells if not cell.is_dense]
    assert [cell.prune for cell in pruned] == [
        {"damping": 0.02, "ratio": 0.5, **place} for place in places
    ]
    dense = [cell for cell in cells if cell.is_dense]
    assert [cell.labels for cell in dense] == [{"ratio": 0, **dict.fromkeys(grid)}] * with_dense


def test_named_changes_and_placeholders() -> None:
    config = RecipeConfig.create(
        **ANY,
        recover={"rank": 4},
        evaluate={"data": ["{data}/test.txt"], "against": "{model}"},
        grid={
            "model": ["a/one", "{data}/two"],
            "variant": {
                "as it is": {},
                "other": {
                    "prune": {"preset": "paper"},
                    "recover": None,
                    "evaluate": {"max_tokens": 9},
                },
            },
        },
    )
    cells = expand(config, "texts")
    evaluation = {"data": ["texts/test.txt"], "against": "a/one"}
    assert cells[0].recover == {"rank": 4}
    assert cells[0].evaluate == evaluation
    labels = {"model": "a/one", "variant": "other"}
    prune = {"preset": "paper"}
    assert cells[1] == Cell(labels, "a/one", prune, None, evaluation | {"max_tokens": 9}, None)
    assert cells[1].labels == labels
    assert [cell.model for cell in cells] == ["a/one", "a/one", "texts/two", "texts/two"]
    assert cells[2].evaluate == evaluation | {"against": "texts/two"}


def test_small_changes_options_and_dimensions_singly(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    grid = {"ratio": [0.2, 0.5], "method": ["x"]}
    small = {"model": "b", "prune": {"seqlen": 32}, "grid": {"ratio": [0.5]}, "table": ["tasks"]}
    prune = {"nsamples": 4, "seqlen": 64}
    file.write_text(
        yaml.safe_dump(ANY | {"model": "a", "prune": prune, "grid": grid, "small": small})
    )
    config = read_recipe(file, small=True)
    assert config.model == "b"
    assert config.prune == {"nsamples": 4, "seqlen": 32}
    assert config.grid == {"ratio": [0.5], "method": ["x"]}
    assert config.table == ("tasks",)
    assert read_recipe(file).grid == grid


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("file", SHIPPED.values(), ids=SHIPPED)
def test_recipes_in_the_package(file: Path, small: bool) -> None:
    config = read_recipe(file, small)
    cells = expand(config, "data")
    assert cells
    if small:
        assert {cell.model for cell in cells} <= EMBEDDED_MODELS.keys()
        assert len(cells) <= 25
    shown = {runner.SHOWN[name].verb for name in (*config.table, *config.figure)}
    asked = {
        verb for verb in ("recover", "evaluate", "bench") if any(getattr(c, verb) for c in cells)
    }
    assert asked - {"recover"} <= shown <= asked | {"prune"}


def test_there_are_recipes() -> None:
    assert len(SHIPPED) >= 15


def test_a_recipe_of_the_package_runs_by_its_name(
    run: Run, recipe: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = recipe(grid={"ratio": [0]}, table=["perplexity"])
    monkeypatch.setitem(SHIPPED, "table1", file)
    (tmp_path / "table1").mkdir()
    code, _, err = run("run", "table1", "--output", "table1")
    assert code == 0, err
    assert (tmp_path / "table1" / "recipe.md").is_file()
    shutil.rmtree(tmp_path / "table1")
    (tmp_path / "table1").write_text("title: a file comes first")
    assert "grid is missing" in run("run", "table1", "--output", "out")[2]
    code, _, err = run("run", "tabel1", "--output", "out")
    assert code == 2
    assert "hint: did you mean 'table1'? available: figure2, figure3a" in err


def make_report(**recipe: Any) -> dict[str, Any]:
    """A report of two ratios and two methods, written by hand."""
    task = {
        "num_docs": 10,
        "num_fewshot": 0,
        "lm_eval": "0.4",
        "data": "piqa.jsonl",
        "dtype": "float32",
    }
    more, less = task | {"higher_is_better": True}, task | {"higher_is_better": False}
    place = {"machine": "a machine", "versions": {"torch": "2.0"}}
    cells = []
    for ratio, method, perplexity, score in (
        (0, None, 10, 0.9), (0.5, "ours", 20, 0.5), (0.5, "theirs", 30, 0.6)
    ):  # fmt: skip
        text = {
            "data": "c4 (allenai/c4, validation)",
            "seqlen": 8,
            "tokens": 1400,
            "dtype": "bfloat16",
        }
        evaluation = {
            "perplexity": [text | {"perplexity": perplexity, "layer_errors": [0.5, ratio]}],
            "tasks": [
                more | {"task": "piqa", "metric": "acc_norm", "value": score, "stderr": 0.09},
                more
                | {"task": "commonsense", "metric": "mean", "value": score / 2, "stderr": 0.01},
                less
                | {"task": "ptb", "metric": "word_perplexity", "value": perplexity}
                | {"stderr": None},
            ],
        }
        pruning = {"params_after": 2000, "layer_ratios": [ratio, ratio]}
        cells.append(
            {
                "labels": {"ratio": ratio, "method": method},
                "model": "a model",
                "error": None,
                "prune": place | pruning,
                "evaluate": place | evaluation,
            }
        )
    grid = {"ratio": [0, 0.5], "method": ["ours", "theirs"]}
    config = RecipeConfig.create(**{**ANY, "grid": grid, **recipe})
    return {"is_small": True, "recipe": config.model_dump(mode="json"), "cells": cells}


def test_the_best_of_a_column_that_not_all_rows_have() -> None:
    report = make_report(table=["perplexity"])
    for row, (text, value) in zip(report["cells"], (("a", 9), ("b", 20), ("b", 10)), strict=True):
        row["evaluate"]["perplexity"][0] |= {"data": text, "perplexity": value}
    markdown = to_markdown(report, "recipe.svg")
    assert "| 50 % | ours |  | 20.00 |" in markdown
    assert "| 50 % | theirs |  | **10.00** |" in markdown


def test_a_table_from_results() -> None:
    report = make_report(table=["parameters", "perplexity", "tasks"], note="A note.")
    assert (
        to_markdown(report, "recipe.svg")
        == """# A title

Table 0 of SlimGPT (arXiv 2412.18110), small variant.

A note.

| ratio | method | parameters | perplexity, c4 × 8 | piqa, acc_norm | commonsense, mean \
| ptb, word_perplexity |
| --- | --- | --- | --- | --- | --- | --- |
| 0 % |  | 2,000 | 10.00 | 90.0 ± 9.0 | 45.0 ± 1.0 | 10.0 |
| 50 % | ours | 2,000 | **20.00** | 50.0 ± 9.0 | 25.0 ± 1.0 | **20.0** |
| 50 % | theirs | 2,000 | 30.00 | 60.0 ± 9.0 | **30.0** ± 1.0 | 30.0 |

- Model: a model
- Perplexity: c4 (allenai/c4, validation), 1,400 tokens in windows of 8
- Tasks, shares in %: commonsense, 10 questions of piqa.jsonl, 0 shots, lm-eval 0.4
- Evaluated in: bfloat16; float32
- Machine: a machine
- Versions: torch 2.0
"""
    )


@pytest.mark.parametrize(
    ("figure", "x", "num_lines"),
    [(["layer_errors", "layer_ratios"], None, 6), (["perplexity", "means"], "ratio", 6)],
)
def test_a_figure_from_results(
    figure: list[str], x: str | None, num_lines: int, tmp_path: Path
) -> None:
    report = make_report(figure=figure, x=x)
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        draw(report, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    root = ElementTree.parse(files[0]).getroot()
    groups = [group.get("id", "") for group in root.iter("{http://www.w3.org/2000/svg}g")]
    assert sum(name.startswith("axes_") for name in groups) == len(figure)
    assert sum(name.startswith("legend_") for name in groups) == len(figure)
    assert "![A title](recipe.svg)" in to_markdown(report, "recipe.svg")
    draw(report | {"cells": []}, files[0])  # as if all had failed
    assert ElementTree.parse(files[0]).getroot().tag.endswith("svg")
