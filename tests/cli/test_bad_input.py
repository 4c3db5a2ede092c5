"""What is wrong in an option, a file or a name is one error with a hint, for every command."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import TEXT, Run
from hypothesis import given, settings
from hypothesis import strategies as st

import slimgpt
from slimgpt import errors
from slimgpt.checkpoint.results import PruningReport, RecoveryReport, read_report, read_typed
from slimgpt.errors import ConfigError, resource_error
from slimgpt.evaluation.perplexity import EvalResult
from slimgpt.experiments.recipe import load_recipe

SOURCE = Path(slimgpt.__file__).parent

LONG = "x" * 5000
MANY = "9" * 400
NOT_TEXT = "a\udcff"
WITH_NUL = "a\0b"
NO_NAME = {
    LONG: "too long|no model|no data file|there is no such|does not exist|unknown",
    NOT_TEXT: "not valid UTF-8",
    WITH_NUL: "NUL",
}


class Case(NamedTuple):
    """A command line, and the error that it ends with."""

    arguments: tuple[str, ...]
    error: str
    code: int = 2


# MODEL, OUT, … stand for paths that the test makes.
COMMANDS: dict[str, tuple[str, ...]] = {
    "prune": ("MODEL", "--output", "OUT", "--calibration", "pydocs"),
    "eval": ("MODEL", "--data", "pydocs"),
    "recover": ("MODEL", "--output", "OUT", "--data", "pydocs", "--eval-data", "pydocs"),
    "inspect": ("MODEL",),
    "export": ("MODEL", "--output", "OUT"),
    "bench": ("MODEL",),
    "report": ("MODEL",),
    "run": ("RECIPE", "--output", "OUT"),
}
COUNTS = {
    "prune": ("nsamples", "seqlen", "seed", "min-group-size", "max-group-size", "refit-epochs",
              "multiple-of", "target-params", "tensor-parallel"),
    "eval": ("seqlen", "max-tokens", "limit", "num-fewshot", "batch-size"),
    "recover": ("max-examples", "tokens", "seqlen", "rank", "alpha", "warmup-steps", "max-steps",
                "batch-size", "micro-batch-size", "top-k", "eval-tokens", "eval-steps",
                "save-steps", "seed"),
    "bench": ("batch-size", "prompt-length", "new-tokens", "warmup", "repeats", "threads"),
    "report": ("new-tokens",),
}  # fmt: skip
FRACTIONS = {
    "prune": ("ratio", "min-ratio", "attention-share", "layer-ratios", "damping", "correction",
              "target-kv-cache"),
    "recover": ("dropout", "learning-rate", "epochs", "minutes"),
}  # fmt: skip
RECOVERIES = {
    "0": "tokens=0",
    "0min": "minutes=0",
    "511": "tokens=511 is less than one window",
    "1T": "tokens=",
    "1.5": "tokens='1.5': not a whole number",
    "1,0": "tokens='1,0': not a number",
    "99999999h": "minutes=",
    MANY: "tokens=",
    "100M": "pydocs has .* samples need",
} | dict.fromkeys(
    ("10 parsecs", "", "-1", "nan", "30m", "1h30min", "min", LONG[:90]), "is neither a number"
)  # fmt: skip
SIZES = ("activation-memory", "max-shard-size", "target-size")
CHOICES = {
    "prune": ("method", "schedule", "widths", "damping-mode", "channel-selection", "head-error",
              "preset", "dtype", "target-type"),
    "eval": ("dtype",),
    "recover": ("method", "dtype"),
    "export": ("to", "type"),
    "bench": ("engine", "dtype"),
    "report": ("dtype",),
}  # fmt: skip
PATHS = {
    "prune": ("calibration", "recipe"),
    "eval": ("data", "against", "recipe"),
    "recover": ("data", "eval-data", "recipe"),
    "bench": ("against", "recipe"),
    "report": ("against",),
}
RECIPES = {
    "a: &a [1]\nb: *a\n": "references",
    "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n": "references",
    "a: 1\na: 2\n": "'a' stands there twice",
    "1: 2\n": "the key 1 is no text",
    "? [a]\n: 1\n": "is no text",
    "null: 1\n": "the key None is no text",
    "a: " + "[" * 100 + "]" * 100: "levels deep",
    "{" * 5000: "levels deep",
    "a: 2020-99-99\n": "month",
    f"a: {'9' * 5000}\n": "digits",
    "- ratio\n": "is not a mapping",
    "text\n": "is not a mapping",
    "a: !!python/object/apply:os.system [ls]\n": "could not determine a constructor",
    "%\n": "cannot read the recipe",
    "a: [\n": "cannot read the recipe",
    "caf\udce9: 1\n": "cannot read the recipe",
    "#" * 2_000_000: "has more than 1,000,000 bytes",
    'ratio: "\\0"\n': "NUL|unknown option|title is missing",
    "nsamples: [1]\n": "nsamples=|unknown option|title is missing",
    "device: {a: b}\n": "device=|unknown option|title is missing",
    f"? {LONG}\n: 1\n": "unknown option '.*…|title is missing",
}
JSONS = {
    "": "cannot read",
    "{": "cannot read",
    "nonsense": "cannot read",
    "[]": "not as this version writes it",
    "3": "not as this version writes it",
    "null": "not as this version writes it",
    '"text"': "not as this version writes it",
    "{}": "not as this version writes it: base_model",
    '{"base_model": 3}': "not as this version writes it: base_model",
    "[" * 100_000: "cannot read",
    '{"base_model": "\udcff"}': "cannot read",
    '{"a": ' + "9" * 5000 + "}": "cannot read|not as this version writes it",
}
REPORT_CHANGES: dict[str, dict[str, Any]] = {
    "blocks": {"blocks": []},
    "different numbers of layers": {"layer_ratios": [0.1]},
    "params_after": {"params_after": -1},
    "params_before": {"params_before": 10**30},
    "seconds.prune": {"seconds": {"prune": "long"}},
    "total_ratio": {"total_ratio": None},
    "out of range": {"total_ratio": 1e308},
    "versions": {"versions": ["0.1"]},
    "peak_memory_bytes": {"peak_memory_bytes": {}},
    "config": {"config": None},
    "config.method": {"config": {"uniform": False}},
    "config.other": {"config": {"method": "slimgpt", "uniform": False, "other": 1}},
    "calibration": {"calibration": "text"},
}
RESULTS = ("{}", "[3]", '[{"data": 3}]', "[[]]", "null", "[")


def _cases() -> Iterator[Case]:
    for verb, rest in COMMANDS.items():
        yield Case((verb,), "missing (argument|option)")
        yield Case((verb, *rest, "--no-such-option"), "no such option")
        yield Case((verb, *rest, "one-too-many"), "unexpected extra argument")
        for name, error in NO_NAME.items():
            yield Case((verb, name, *rest[1:]), rf"{error}|report\.json")
    yield Case(("no-such-command",), "no such command")
    yield Case(("--debugg",), "no such option")
    yield Case((LONG,), "no such command")
    for verb, names in COUNTS.items():
        for name in names:
            for value in ("-1", MANY, "1.5", "many", "nan"):
                key = name.replace("-", "_")
                yield Case(
                    (verb, *COMMANDS[verb], f"--{name}", value), f"'--{name}'|{key}=|do nothing"
                )
    for verb, names in FRACTIONS.items():
        for name in names:
            for value in ("nan", "inf", "-1", "1e400", "half"):
                key = name.replace("-", "_")
                yield Case(
                    (verb, *COMMANDS[verb], f"--{name}", value), f"'--{name}'|{key}=|has no {key}"
                )
    for value, error in RECOVERIES.items():
        for flags in ((), ("--dry-run",)):
            yield Case(("prune", *COMMANDS["prune"], "--recover", value, *flags), error)
    for name in SIZES:
        for value in ("-1", "1e400", "lots", MANY):
            yield Case(("prune", *COMMANDS["prune"], f"--{name}", value), name.replace("-", "_"))
    for verb, names in CHOICES.items():
        for name in names:
            for value in ("nonsense", ""):
                yield Case(
                    (verb, *COMMANDS[verb], f"--{name}", value), f"{name.replace('-', '_')}='"
                )
    for verb in ("prune", "eval", "recover", "bench"):
        for value in ("gpu", "cuda:99999999999999999999", "cuda:-1", "", "CPU"):
            yield Case((verb, *COMMANDS[verb], "--device", value), "device='")
    for verb, names in PATHS.items():
        for name in names:
            for value, error in NO_NAME.items():
                yield Case((verb, *COMMANDS[verb], f"--{name}", value), error)
    for value in ("x.txt", "x", ".png/", "x.PNG"):
        yield Case(("bench", *COMMANDS["bench"], "--plot", value), "the name of a plot ends in")
    for verb in ("prune", "eval", "recover", "bench"):
        for number, error in enumerate(RECIPES.values()):
            yield Case((verb, *COMMANDS[verb], "--recipe", f"RECIPE{number}"), error)
    for number, error in enumerate(RECIPES.values()):
        yield Case(("run", f"RECIPE{number}", "--output", "OUT"), error)
    for verb in ("report", "inspect"):
        for number, error in enumerate(JSONS.values()):
            yield Case((verb, f"REPORT{number}"), error)
        for number, key in enumerate(REPORT_CHANGES):
            yield Case((verb, f"CHANGED{number}"), f"not as this version writes it: .*{key}")
    for name in ("perplexity", "tasks", "speed"):
        for number in range(len(RESULTS)):
            yield Case(("report", f"RESULT-{name}-{number}"), rf"{name}\.json")
    for number in range(len(JSONS)):
        yield Case(("report", f"RECOVERY{number}"), r"recovery_report\.json")


CASES = list(dict.fromkeys(_cases()))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8", errors="surrogateescape")


@pytest.fixture(scope="module")
def place(
    slim_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path], str]:
    """Make what a word of a command line stands for."""
    folder = tmp_path_factory.mktemp("bad")
    slim = slim_checkpoint("llama")
    report = json.loads((slim / "pruning_report.json").read_text())
    recipes, jsons = list(RECIPES), list(JSONS)

    def model(word: str) -> Path:
        copy = folder / word
        if not copy.exists():
            shutil.copytree(slim, copy, ignore=shutil.ignore_patterns("eval"))
        return copy

    def make(word: str, output: Path) -> str:
        name = word.rstrip("0123456789")
        number = int(word.removeprefix(name) or 0)
        if word == "OUT":
            return str(output)
        if word == "MODEL":
            return str(model(word))
        if name == "RECIPE":
            file = folder / f"{word}.yaml"
            _write(file, recipes[number])
            return str(file)
        if name == "REPORT":
            _write(model(word) / "pruning_report.json", jsons[number])
        elif name == "RECOVERY":
            _write(model(word) / "recovery_report.json", jsons[number])
        elif name == "CHANGED":
            change = list(REPORT_CHANGES.values())[number]
            _write(model(word) / "pruning_report.json", json.dumps(report | change))
        elif name.startswith("RESULT-"):
            kind = name.removeprefix("RESULT-").removesuffix("-")
            _write(model(word) / "eval" / f"{kind}.json", RESULTS[number])
        else:
            return word
        return str(model(word))

    return make


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(" ".join(case.arguments))[:60])
def test_bad_input(case: Case, run: Run, place: Callable[[str, Path], str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, out, err = run(*(place(word, output) for word in case.arguments))
    lines = err.splitlines()
    message = next((line for line in lines if line.startswith("error: ")), "")
    assert re.search(case.error, " ".join(lines)), err
    assert message, err
    assert any(line.startswith("hint: ") for line in lines), err
    assert "internal error" not in err
    assert "Traceback" not in err
    assert code == case.code
    assert not out
    assert not output.exists()


def test_there_are_many_cases_for_all_commands() -> None:
    assert len(CASES) >= 200
    assert {case.arguments[0] for case in CASES} >= COMMANDS.keys()


def _raised(file: Path) -> Iterator[tuple[int, bool]]:
    """Line of each error of ours in a module, and whether it has a hint."""
    names = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SlimGPTError)
    } - {"MissingDependencyError"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node.lineno, any(keyword.arg == "hint" for keyword in node.keywords)


@pytest.mark.parametrize(
    "file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE))
)
def test_every_error_has_a_hint(file: Path) -> None:
    lacking = [line for line, has_hint in _raised(file) if not has_hint]
    assert not lacking, lacking


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(content=ANY_JSON | st.binary(max_size=40))
def test_json_of_any_shape(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("json") / "file.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    for kind in (PruningReport, RecoveryReport):
        with pytest.raises(ConfigError, match=r"file\.json"):
            read_report(file, kind)
    if content != []:
        with pytest.raises(ConfigError, match=r"file\.json"):
            read_typed(file, list[EvalResult])


@settings(max_examples=100, deadline=None)
@given(content=ANY_JSON.map(json.dumps) | st.text(max_size=60))
def test_recipes_of_any_shape(content: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(content, encoding="utf-8")
    try:
        values = load_recipe(file)
    except ConfigError as err:
        values = {str(err): err.hint}
    assert all(isinstance(key, str) for key in values)


@pytest.mark.parametrize(
    "key", sorted(name for name, field in PruningReport.model_fields.items() if field.is_required())
)
def test_every_key_of_a_report_is_checked(
    key: str, run: Run, slim_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    slim = shutil.copytree(slim_checkpoint("llama"), tmp_path / "slim")
    file = slim / "pruning_report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in report.items() if name != key}))
    code, _, err = run("report", slim)
    assert code == 2
    assert f"{file} is not as this version writes it: {key}: Field required" in err


@pytest.mark.parametrize(
    ("err", "message", "code"),
    [
        (MemoryError(), "out of memory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory", 1),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "out of memory", 1),
        (RuntimeError("std::bad_alloc"), "out of memory", 1),
        (OSError(28, "No space left on device"), "no space left", 1),
        (RuntimeError("file write failed: No space left on device"), "no space left", 1),
        (OSError(36, "File name too long", "x"), "a name is too long", 2),
        (PermissionError(13, "Permission denied", "x"), "a file cannot be read or written", 1),
    ],
)
def test_what_the_machine_refuses_is_no_fault_of_ours(
    err: Exception, message: str, code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise err

    monkeypatch.setattr("slimgpt.checkpoint.inspection.find_model", fail)
    status, out, shown = run("inspect", "smollm2-135m")
    assert status == code
    assert f"error: {message}" in shown
    assert "hint: " in shown
    assert "internal error" not in shown
    assert not out
    assert resource_error(RuntimeError("surprise")) is None


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("2>&-", 0, ""),
        pytest.param("2>/dev/full", 0, "", marks=pytest.mark.slow),
        (">&-", 0, "block 4/4"),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 1, "cannot be written to standard output: No space left"),
        pytest.param(
            "--json >/dev/full",
            1,
            "cannot be written to standard output: No space left",
            marks=pytest.mark.slow,
        ),
        ("--json | true", 1, "block 4/4"),
        pytest.param("2>&1 >/dev/null | true", 0, "", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_streams_that_cannot_be_written(
    redirection: str,
    code: int,
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source, output = tiny_checkpoint("llama"), tmp_path / "slim"
    command = (
        f"set -o pipefail; {sys.executable} -m slimgpt prune {source} --output {output} "
        f"--calibration {TEXT} --widths scheduled --nsamples 2 --seqlen 16 {redirection}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (output / "config.json").exists()
