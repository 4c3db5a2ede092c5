"""Latency targets: tables of times, their files, and what is measured."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEXT, Run
from families import MODEL_TYPES, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedConfig

import slimgpt
from slimgpt.allocation.shapes import SublayerShape, has_experts
from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError, OtherRunError, RunStateError, UnsupportedModelError
from slimgpt.pruning import latency
from slimgpt.pruning.latency_table import LatencyTable
from slimgpt.pruning.plan import shapes_of

Checkpoint = Callable[[str], Path]

OPTIONS: dict[str, Any] = {"calibration": TEXT, "nsamples": 12, "seqlen": 32, "refit_epochs": 0}

# Seconds: a group has 4, a channel a quarter, what is around them 2, all else 20: 212 in all.
TABLE: dict[str, Any] = {
    "version": 1,
    "setting": {
        "phase": "decode",
        "context": 64,
        "dtype": "float32",
        "device": "cpu",
        "machine": "a processor",
        "threads": 1,
        "versions": {"torch": "2.13.0"},
    },
    "rest_seconds": 20,
    "kinds": [
        [
            {
                "kind": "attention",
                "num_units": 4,
                "unit_params": 2304,
                "seconds": [[1, 6], [3, 14], [4, 18]],
            },
            {
                "kind": "ffn",
                "num_units": 64,
                "unit_params": 144,
                "seconds": [[1, 14.25], [16, 18], [64, 30]],
            },
        ]
    ],
    "blocks": [0, 0, 0, 0],
}


@pytest.fixture
def table_file(tmp_path: Path) -> str:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(TABLE))
    return str(file)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Nothing is measured: the settings with which it would be, for a cache of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings: list[Any] = []

    def measure(_: PreTrainedConfig, setting: Any, __: torch.device) -> LatencyTable:
        settings.append(setting)
        return LatencyTable.model_validate(TABLE | {"setting": setting.model_dump()})

    monkeypatch.setattr(latency, "measure", measure)
    return settings


def seconds(widths: Any) -> float:
    """What the table says of these widths."""
    return 20 + sum(2 + 4 * groups + 14 + channels / 4 for groups, channels in widths)


# The targets


@pytest.mark.parametrize("widths", ["scheduled", "measured"])
def test_the_target_is_met(
    widths: str, table_file: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = str(tiny_checkpoint("llama"))
    options = OPTIONS | {"target_latency": "0.8x", "latency_table": table_file, "widths": widths}
    result = slimgpt.prune(model, tmp_path / "slim", **options)
    dense = seconds([(4, 64)] * 4)
    predicted = seconds(result.plan.widths)
    assert 0.8 * dense - 4 < predicted <= 0.8 * dense  # less than a group, or 16 channels
    assert result.report["target"] == {
        "option": "target_latency",
        "asked": 0.8,
        "reached": pytest.approx(predicted / dense),
        "unit": "of the dense decode latency after 64 tokens",
    }
    assert result.report["config"]["latency_table"] == "table.json"
    assert result.plan.is_measured == (widths == "measured")


def test_uniform_widths(table_file: str, tiny_checkpoint: Checkpoint) -> None:
    planned = slimgpt.plan(
        str(tiny_checkpoint("llama")), target_latency=0.7, latency_table=table_file, uniform=True
    )
    assert len(set(planned.widths)) == 1
    limit = 0.7 * seconds([(4, 64)] * 4)
    assert limit - 4 * 4 < seconds(planned.widths) <= limit


def test_what_can_be_reached(table_file: str, tiny_checkpoint: Checkpoint) -> None:
    model, given = str(tiny_checkpoint("llama")), {"latency_table": table_file}
    with pytest.raises(ConfigError, match=r"target_latency=0\.3 cannot be reached") as error:
        slimgpt.plan(model, target_latency=0.3, **given)
    assert "of the dense decode latency after 64 tokens or more" in str(error.value.hint)
    least = str(error.value.hint).split("ask for ")[1].split(" of")[0]
    assert slimgpt.plan(model, target_latency=least, **given).target
    whole = slimgpt.plan(model, target_latency=1, **given)
    assert whole.target
    assert whole.target.reached == 1
    assert whole.block_ratio == 0


def test_another_table_is_another_run(
    table_file: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = str(tiny_checkpoint("llama"))
    options = OPTIONS | {"target_latency": 0.8, "latency_table": table_file, "widths": "scheduled"}
    with monkeypatch.context() as patch:
        patch.setattr("slimgpt.pruning.prune.write_result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            slimgpt.prune(model, tmp_path / "slim", **options)
    Path(table_file).write_text(json.dumps(TABLE | {"rest_seconds": 21}))
    with pytest.raises(OtherRunError, match="target"):
        slimgpt.prune(model, tmp_path / "slim", **options)
    moved = Path(table_file).with_name("moved.json")
    moved.write_text(json.dumps(TABLE))
    slimgpt.prune(model, tmp_path / "slim", **options | {"latency_table": str(moved)})


def test_experts_are_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("mixtral")).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="each token uses other experts"):
        slimgpt.plan(str(tmp_path), target_latency=0.5)
    with pytest.raises(UnsupportedModelError, match="each token uses other experts"):
        slimgpt.latency(str(tmp_path), tmp_path / "table.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_latency": "fast"}, "target_latency='fast': not a fraction"),
        ({"target_latency": "0"}, "target_latency=0.0: Input should be greater than 0"),
        ({"target_latency": 1.5}, "target_latency=1.5: Input should be less than or equal"),
        ({"target_latency": 0.5, "ratio": 0.2}, "give one of ratio and target_latency"),
        ({"target_latency": 0.5, "query_heads": True}, "query_heads=True has no place"),
        ({"target_latency": 0.5, "latency_phase": "sum"}, "available: decode, prefill"),
        ({"latency_table": "a.json"}, "without target_latency, latency_table would do nothing"),
        ({"latency_phase": "decode"}, "without target_latency, latency_phase would do nothing"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PruneConfig.create(**options)
    assert message in str(error.value)
    assert error.value.hint


# The file


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """The table with another value at one place."""
    table = copy.deepcopy(TABLE)
    place: Any = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return table


FFN = ("kinds", 0, 1)
DEFECTS = {
    "no JSON": ("{", "cannot read"),
    "a list": ([TABLE], "its top level is a list"),
    "another version": (changed("version", to=2), "version: Input should be 1"),
    "a missing key": ({k: v for k, v in TABLE.items() if k != "blocks"}, "blocks: Field required"),
    "an unknown key": (TABLE | {"unit": "s"}, "unit: Extra inputs are not permitted"),
    "no times": (changed(*FFN, "seconds", to=[]), "at least 1 item"),
    "a negative time": (changed(*FFN, "seconds", 0, to=[1, -1]), "greater than 0"),
    "a time of zero": (changed("rest_seconds", to=0), "rest_seconds: Input should be greater"),
    "a time that is not finite": (
        changed(*FFN, "seconds", 0, to=[1, float("nan")]),
        "should be a finite number",
    ),
    "an infinite time": (changed("rest_seconds", to=float("inf")), "should be a finite number"),
    "text for a time": (changed(*FFN, "seconds", 0, to=[1, "fast"]), "valid number"),
    "a width of zero": (changed(*FFN, "seconds", 0, to=[0, 1]), "greater than or equal to 1"),
    "a width twice": (changed(*FFN, "seconds", 1, to=[1, 2]), "the widths do not increase"),
    "experts": (changed(*FFN, "kind", to="experts"), "should be 'attention' or 'ffn'"),
    "another phase": (changed("setting", "phase", to="prefill"), "holds prefill latencies"),
    "fewer blocks": (changed("blocks", to=[0, 0]), "it has 2 blocks, the model 4"),
    "a kind that is not there": (changed("blocks", to=[0, 0, 0, 1]), "block 3 is of kind 1, and"),
    "other units": (
        changed(*FFN, "num_units", to=32),
        "block 0 has attention of 4 × 2,304 parameters and ffn of 32 × 144 parameters, in the "
        "model attention of 4 × 2,304 parameters and ffn of 64 × 144 parameters",
    ),
    "not the whole width": (
        changed(*FFN, "seconds", to=[[1, 1], [32, 2]]),
        "the last width of ffn in block 0 is 32, not the 64",
    ),
}


@pytest.mark.parametrize(("content", "message"), DEFECTS.values(), ids=DEFECTS)
def test_a_file_is_checked(
    content: Any, message: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "table.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    options = {"target_latency": 0.5, "latency_table": str(file)}
    with pytest.raises(ConfigError) as error:
        slimgpt.plan(str(tiny_checkpoint("llama")), **options)
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert error.value.hint


def test_a_file_that_is_not_there(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = {"target_latency": 0.5, "latency_table": str(tmp_path / "none.json")}
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json"):
        slimgpt.plan(str(tiny_checkpoint("llama")), **options)


# The cache


def test_the_second_time_nothing_is_measured(
    measurements: list[Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = str(tiny_checkpoint("llama"))
    first = slimgpt.plan(model, target_latency=0.8)
    assert slimgpt.plan(model, target_latency=0.8) == first
    assert len(measurements) == 1
    (file,) = tmp_path.glob("cache/slimgpt/latency/*.json")
    assert LatencyTable.read(file).setting == measurements[0]
    slimgpt.plan(model, target_latency=0.8, dtype="bfloat16")
    slimgpt.plan(model, target_latency=0.8, latency_phase="prefill")
    with pytest.raises(ConfigError, match="is not of this model"):
        slimgpt.plan(str(tiny_checkpoint("llama-mha")), target_latency=0.8)
    assert len(measurements) == 4
    assert [s.phase for s in measurements] == ["decode", "decode", "prefill", "decode"]
    assert [s.dtype for s in measurements] == ["float32", "bfloat16", "float32", "float32"]


def test_a_cache_that_cannot_be_written(
    measurements: list[Any],
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunStateError, match="cannot write to"):
        slimgpt.plan(str(tiny_checkpoint("llama")), target_latency=0.8)


# What is measured


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "WARMUP", 0)
    monkeypatch.setattr(latency, "ROUNDS", 1)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_model_types(model_type: str, phase: Any, one_round: None) -> None:
    config, device = tiny_config(model_type), torch.device("cpu")
    shapes = shapes_of(config)
    if has_experts(shapes):
        pytest.skip("experts are refused")
    setting = latency.setting_of(config, phase, torch.float32, device)
    table = latency.measure(config, setting, device)
    table.check(Path("table.json"), shapes)
    for kind in table.kinds:
        for sublayer in kind:
            shape = shapes[0].sublayers[sublayer.kind == "ffn"]
            if shape.num_units == sublayer.num_units:
                assert [w for w, _ in sublayer.seconds] == latency.measured_widths(shape)
    assert LatencyTable.model_validate_json(table.model_dump_json()) == table


def test_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call counts one second: a sublayer's time is its call, and half of the block's rest."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(latency, "_now", lambda _: float(next(ticks)))
    config, device = tiny_config("llama"), torch.device("cpu")
    setting = latency.setting_of(config, "decode", torch.float32, device)
    table = latency.measure(config, setting, device)
    assert table.rest_seconds == 1
    assert {s for kind in table.kinds for sub in kind for _, s in sub.seconds} == {1.0}


def test_blocks_of_several_kinds_are_measured_once_each(one_round: None) -> None:
    config, device = tiny_config("gemma2"), torch.device("cpu")
    setting = latency.setting_of(config, "decode", torch.float32, device)
    table = latency.measure(config, setting, device)
    types = config.layer_types
    assert len(table.kinds) == len(set(types)) == 2
    assert [table.blocks[0] == kind for kind in table.blocks] == [t == types[0] for t in types]


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        (SublayerShape("attention", 1, 10), [1]),
        (SublayerShape("attention", 3, 10), [1, 2, 3]),
        (SublayerShape("attention", 32, 10), [1, 4, 8, 12, 16, 20, 24, 28, 32]),
        (SublayerShape("ffn", 1536, 10), [1, 192, 384, 576, 768, 960, 1152, 1344, 1536]),
        (SublayerShape("ffn", 60, 10), [1, 8, 16, 24, 32, 40, 48, 60]),
        (SublayerShape("ffn", 5, 10), [1, 5]),
        (SublayerShape("ffn", 64, 10, is_fixed=True), [64]),
    ],
)
def test_widths_that_are_measured(shape: SublayerShape, widths: list[int]) -> None:
    assert latency.measured_widths(shape) == widths


def test_a_context_beyond_the_models() -> None:
    config = tiny_config("llama")
    longest = config.max_position_embeddings
    with pytest.raises(ConfigError, match=f"beyond the model's context of {longest}") as error:
        latency.setting_of(config, "decode", torch.float32, torch.device("cpu"), longest)
    allowed = int(str(error.value.hint).split("of ")[1].split(" ")[0])
    setting = latency.setting_of(config, "decode", torch.float32, torch.device("cpu"), allowed)
    assert setting.context == allowed


# The commands


def test_a_table_for_another_machine(
    run: Run, one_round: None, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model, file = tiny_checkpoint("llama"), tmp_path / "table.json"
    code, out, _ = run("latency", model, "--output", file, "--phase", "prefill", "--context", "16")
    assert code == 0
    assert "the prefill latency of 16 tokens on" in out
    assert LatencyTable.read(file).setting.context == 16
    given = ("--target-latency", "1x", "--latency-table", file)
    code, out, _ = run("prune", model, "--dry-run", *given, "--latency-phase", "prefill")
    assert code == 0
    assert "1 of the dense prefill latency of 16 tokens, asked for 1 at most" in out
    code, _, err = run("prune", model, "--dry-run", *given)
    assert code == 2
    assert "use --latency-phase prefill" in err
    missing = tmp_path / "none" / "table.json"
    code, _, err = run("latency", model, "--output", missing)
    assert code == 2
    assert f"cannot write to {missing}" in err


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_prediction_is_checked(
    phase: str,
    run: Run,
    measurements: list[Any],
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def bench(model: str, **options: Any) -> Any:
        asked.update(options, model=model)
        speedups = {"decode_speedup": 1.25, "prefill_speedup": 2.0}
        setting = SimpleNamespace(**{k: SimpleNamespace(median=v) for k, v in speedups.items()})
        return SimpleNamespace(settings=(setting,))

    monkeypatch.setattr(slimgpt, "bench", bench, raising=False)
    monkeypatch.setattr("slimgpt.cli.app.bench_lines", lambda _: ("the speeds",))
    model, output = str(tiny_checkpoint("llama")), str(tmp_path / "slim")
    options = ("--calibration", TEXT, "--nsamples", "4", "--seqlen", "32", "--refit-epochs", "0")
    target = ("--target-latency", "0.8x", "--latency-phase", phase, "--widths", "scheduled")
    code, out, err = run("prune", model, "--output", output, *options, *target)
    assert code == 0, err
    measured = {"decode": 0.8, "prefill": 0.5}[phase]
    assert f"x of the dense model's predicted, {measured:.3f}x measured" in out
    assert "the speeds" in out
    assert asked["model"] == output
    assert asked["against"] == model
    assert asked["prompt_length"] == measurements[0].context == 64
    assert asked["prompt_length"] + asked["new_tokens"] <= 128
    assert asked["dtype"] == "float32"


def test_a_given_table_is_not_checked_here(
    run: Run, table_file: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    options = ("--calibration", TEXT, "--nsamples", "4", "--seqlen", "32", "--refit-epochs", "0")
    target = ("--target-latency", "0.8x", "--latency-table", table_file, "--widths", "scheduled")
    output = tmp_path / "slim"
    code, out, _ = run("prune", tiny_checkpoint("llama"), "--output", output, *options, *target)
    assert code == 0
    assert "measured" not in out
    assert not (output / "eval").exists()
