"""Interrupted runs: nothing is lost, and the result is the same to the byte."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import TEXT
from interruption import InterruptionError, fail_at_block, fingerprint, is_measuring
from safetensors.torch import load_file, save_file

import slimgpt
from slimgpt.calibration import activations
from slimgpt.errors import ConfigError, RunStateError, UnsupportedModelError
from slimgpt.models import device, weights
from slimgpt.pruning import block as module
from slimgpt.pruning import inputs, sensitivity, sequential
from slimgpt.runtime.files import describe_file
from slimgpt.runtime.run_directory import STATE_DIR, Manifest, Stage, open_run

OPTIONS = {"calibration": TEXT, "nsamples": 6, "seqlen": 32, "ratio": 0.4}


@pytest.fixture(scope="module")
def interrupted_once(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("interrupted") / "slim"
    with pytest.MonkeyPatch.context() as patch:
        fail_at_block(2, InterruptionError(), patch)
        with pytest.raises(InterruptionError):
            slimgpt.prune(str(tiny_checkpoint("llama")), output, **OPTIONS)
    return output


@pytest.fixture
def interrupted(
    interrupted_once: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> tuple[str, Path]:
    """A model, and an output directory with a run that ended in its third block."""
    return str(tiny_checkpoint("llama")), shutil.copytree(interrupted_once, tmp_path / "slim")


@pytest.fixture(scope="module")
def whole(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Directory with the result of a run that was not interrupted, written once for its options."""
    written: dict[str, Path] = {}

    def write(**options: Any) -> Path:
        name = json.dumps(options)
        if name not in written:
            written[name] = tmp_path_factory.mktemp("whole") / "slim"
            slimgpt.prune(str(tiny_checkpoint("llama")), written[name], **OPTIONS | options)
        return written[name]

    return write


def test_finished_blocks_are_not_solved_again(
    interrupted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = interrupted
    solved = []
    prune_block = sequential.prune_block
    monkeypatch.setattr(
        sequential,
        "prune_block",
        lambda block, *a: solved.append(block.index) or prune_block(block, *a),
    )
    slimgpt.prune(model, output, **OPTIONS)
    assert solved == [2, 3]
    assert not (output / STATE_DIR).exists()


def test_refitted_blocks_are_replayed(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = str(tiny_checkpoint("llama")), {"nsamples": 32, "seqlen": 64}
    options = OPTIONS | options | {"refit_epochs": 20}
    whole = slimgpt.prune(model, tmp_path / "whole", **options)
    assert min(block["sublayers"][1]["refit"] or 1 for block in whole.report["blocks"][:3]) < 1
    fail_at_block(3, InterruptionError(), monkeypatch)
    with pytest.raises(InterruptionError):
        slimgpt.prune(model, tmp_path / "resumed", **options)
    monkeypatch.undo()
    slimgpt.prune(model, tmp_path / "resumed", **options)
    assert fingerprint(tmp_path / "resumed") == fingerprint(tmp_path / "whole")


def test_an_interrupted_sensitivity_pass_goes_on(
    tiny_checkpoint: Callable[[str], Path],
    whole: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = str(tiny_checkpoint("llama"))
    fail_at_block(2, InterruptionError(), monkeypatch, while_measuring=True)
    with pytest.raises(InterruptionError):
        slimgpt.prune(model, tmp_path / "slim", **OPTIONS)
    monkeypatch.undo()
    solved = []
    prune_block = sequential.prune_block
    monkeypatch.setattr(
        sequential,
        "prune_block",
        lambda block, *a: solved.append((block.index, is_measuring(a))) or prune_block(block, *a),
    )
    slimgpt.prune(model, tmp_path / "slim", **OPTIONS)
    assert solved == [(2, True), (3, True)] + [(index, False) for index in range(4)]
    assert fingerprint(tmp_path / "slim") == fingerprint(whole())


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"ratio": 0.3}, "ratio was 0.4 and is 0.3"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"max_shard_size": "1MB"}, "max_shard_size was 5000000000 and is 1000000"),
    ],
)
def test_a_changed_option_is_named(
    changed: dict[str, Any], difference: str, interrupted: tuple[str, Path]
) -> None:
    model, output = interrupted
    with pytest.raises(RunStateError, match="holds an interrupted run that differs") as raised:
        slimgpt.prune(model, output, **OPTIONS | changed)
    assert difference in str(raised.value)
    assert "--restart" in str(raised.value.hint)
    slimgpt.prune(model, output, restart=True, **OPTIONS | changed)
    assert json.loads((output / "pruning_report.json").read_text())["config"][
        "seed"
    ] == changed.get("seed", 0)


def test_a_changed_config_of_the_model_is_named(
    interrupted: tuple[str, Path], tmp_path: Path
) -> None:
    model, output = interrupted
    file = Path(model) / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.5}))
    try:
        with pytest.raises(RunStateError, match="model config was"):
            slimgpt.prune(model, output, **OPTIONS)
    finally:
        file.write_text(before)


def test_a_cpu_with_other_products_is_named(
    interrupted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = interrupted
    before = device.fast_dtype(torch.device("cpu"), torch.float32)
    others = {"bf16": before == torch.float32}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: others, raising=False)
    with pytest.raises(RunStateError, match=f"products was '{before}'"):
        slimgpt.prune(model, output, **OPTIONS)


@pytest.mark.parametrize("deleting", [False, True])
def test_restart_of_a_half_published_run_leaves_nothing_old(
    deleting: bool,
    tiny_checkpoint: Callable[[str], Path],
    whole: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, output, changed = str(tiny_checkpoint("llama")), tmp_path / "slim", {"seed": 1}
    moved: list[Path] = []
    rename, unlink = Path.rename, Path.unlink

    def half(path: Path, target: Path) -> Path:
        if target.parent == output:
            moved.append(target)
            if len(moved) == 3:
                raise InterruptionError
        return rename(path, target)

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.parent == output / STATE_DIR:
            raise InterruptionError
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "rename", half)
    with pytest.raises(InterruptionError):
        slimgpt.prune(model, output, **OPTIONS)
    monkeypatch.undo()
    if deleting:
        monkeypatch.setattr(Path, "unlink", stop)
        with pytest.raises(InterruptionError):
            slimgpt.prune(model, output, restart=True, **OPTIONS | changed)
        monkeypatch.undo()
        slimgpt.prune(model, output, **OPTIONS)  # the manifest goes last
        changed = {}
    else:
        slimgpt.prune(model, output, restart=True, **OPTIONS | changed, max_shard_size=50_000)
        changed["max_shard_size"] = 50_000
    assert fingerprint(output) == fingerprint(whole(**changed))


def test_a_disk_that_was_enough_at_the_start_is_enough_for_the_rest(
    interrupted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = interrupted
    needed = 2 * slimgpt.plan(model, ratio=OPTIONS["ratio"]).params_after * 4
    written = sum(path.stat().st_size for path in (output / STATE_DIR).iterdir())
    free = type("Usage", (), {"free": needed - written})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    slimgpt.prune(model, output, **OPTIONS)


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_mapped_stream_without_room(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    options = OPTIONS | {"activation_memory": 0}
    model, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    with pytest.raises(RunStateError, match="No space left on device"):
        slimgpt.prune(model, output, **options)
    assert not output.exists()
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    slimgpt.prune(model, output, **options)


def test_a_mapped_stream_without_room_leaves_nothing(
    interrupted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = interrupted
    before = set(os.listdir(output / STATE_DIR))
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(RunStateError, match="No space left on device"):
        slimgpt.prune(model, output, **OPTIONS | {"activation_memory": 0})
    assert set(os.listdir(output / STATE_DIR)) == before


@pytest.mark.parametrize(
    "name", ["manifest.json", "samples-0.safetensors", "block-00001.safetensors"]
)
def test_a_damaged_file_is_named(name: str, interrupted: tuple[str, Path]) -> None:
    model, output = interrupted
    file = output / STATE_DIR / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RunStateError, match=f"{name} of the interrupted run is damaged") as raised:
        slimgpt.prune(model, output, **OPTIONS)
    assert "--restart" in str(raised.value.hint)
    slimgpt.prune(model, output, restart=True, **OPTIONS)


def test_heads_that_are_tied_by_the_config_only(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:

    source = tmp_path / "tied"
    shutil.copytree(tiny_checkpoint("llama-tied"), source)
    file, head, embedding = (
        source / "model.safetensors",
        "lm_head.weight",
        "model.embed_tokens.weight",
    )
    tensors = load_file(file)
    slimgpt.prune(str(source), tmp_path / "expected", **OPTIONS)

    save_file(tensors | {head: tensors[embedding] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"ties {head} to {embedding}, but they differ"):
        slimgpt.prune(str(source), tmp_path / "slim", **OPTIONS)
    tensors[head] = tensors.pop(embedding)
    save_file(tensors, file, metadata={"format": "pt"})
    slimgpt.prune(str(source), tmp_path / "slim", **OPTIONS)
    expected = load_file(tmp_path / "expected" / file.name)
    actual = load_file(tmp_path / "slim" / file.name)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_changed_model_is_named(interrupted: tuple[str, Path]) -> None:
    model, output = interrupted
    file = Path(model) / "model.safetensors"
    before, content = file.stat(), file.read_bytes()
    changed = bytearray(content)
    changed[-1] ^= 1
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    try:
        with pytest.raises(RunStateError, match=r"model.safetensors was '\d+ bytes, sha256 "):
            slimgpt.prune(model, output, **OPTIONS)
    finally:
        file.write_bytes(content)
    slimgpt.prune(model, output, **OPTIONS)  # touched since, but the same


def test_less_activation_memory_may_be_used_after_an_interruption(
    interrupted: tuple[str, Path], whole: Callable[..., Path]
) -> None:
    model, output = interrupted
    slimgpt.prune(model, output, **OPTIONS, activation_memory=0)
    assert fingerprint(output) == fingerprint(whole(activation_memory=0))


def test_a_second_process_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    seen = []

    def prune_block(block: Any, *args: Any) -> Any:
        if block.index == 2 and not is_measuring(args):
            with pytest.raises(RunStateError, match="another process is working on") as raised:
                slimgpt.prune(model, output, **OPTIONS)
            seen.append(raised.value)
        return module.prune_block(block, *args)

    monkeypatch.setattr(sequential, "prune_block", prune_block)
    slimgpt.prune(model, output, **OPTIONS)
    assert len(seen) == 1


def test_ctrl_c_prints_the_command_that_resumes(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from slimgpt.cli import app

    arguments = ["prune", str(tiny_checkpoint("llama")), "--output", str(tmp_path / "a b")]
    arguments += [f"--calibration={TEXT}", "--nsamples=4", "--seqlen=32"]
    monkeypatch.setattr(sys, "argv", ["slimgpt", *arguments])
    fail_at_block(1, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        app.main()
    assert exit_.value.code == 130
    assert f"slimgpt prune {arguments[1]} --output '{tmp_path}/a b'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["slimgpt", *arguments])
    with pytest.raises(SystemExit) as exit_:
        app.main()
    assert not exit_.value.code


@pytest.mark.parametrize("failing", range(10))
def test_a_full_disk(
    failing: int,
    tiny_checkpoint: Callable[[str], Path],
    whole: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fail the n-th file of weights: four blocks of the sensitivity pass, four, then shards."""
    options = {"max_shard_size": 50_000}
    model, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    written = []
    write_file = weights.write_file

    def write(file: Path, *args: Any) -> None:
        written.append(file)
        if len(written) == failing + 1:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(file, *args)

    monkeypatch.setattr("slimgpt.pruning.sequential.write_file", write)
    monkeypatch.setattr("slimgpt.checkpoint.writer.write_file", write)
    with pytest.raises(RunStateError, match="No space left on device") as raised:
        slimgpt.prune(model, output, **OPTIONS | options)
    assert "free some space" in str(raised.value.hint)
    measured, pruned = (
        len(list(output.glob(f"{STATE_DIR}/{stage}-*.safetensors"))) for stage in get_args(Stage)
    )
    assert measured == (failing if failing < 4 else 0)
    assert pruned == min(max(failing - 4, 0), 4)
    assert output.exists() == (failing > 0)
    slimgpt.prune(model, output, **OPTIONS | options)
    assert len(written) == failing + 1 + len(list(output.glob("*.safetensors"))) + (
        8 - failing if failing < 8 else 0
    )
    monkeypatch.undo()
    assert fingerprint(output) == fingerprint(whole(**options))


def test_a_read_only_output(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, *args: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    model = str(tiny_checkpoint("llama"))
    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(RunStateError, match="Read-only file system"):
        slimgpt.prune(model, tmp_path / "slim", **OPTIONS)


@pytest.fixture
def sharded(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A dense checkpoint of several shards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_checkpoint("llama")
    directory = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(directory, max_shard_size="80KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def test_shards_are_read_one_at_a_time(
    sharded: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    slimgpt.prune(str(sharded), tmp_path / "from_shards", **OPTIONS)
    slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "from_one", **OPTIONS)
    file = "model.safetensors"
    expected = load_file(tmp_path / "from_one" / file)
    for name, tensor in load_file(tmp_path / "from_shards" / file).items():
        assert torch.equal(tensor, expected[name])


def test_broken_shards(sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content, tensors = shard.read_bytes(), load_file(shard)

    def check(error: type[Exception], *parts: str) -> None:
        with pytest.raises(error) as raised:
            slimgpt.prune(str(sharded), tmp_path / "slim", **OPTIONS)
        for part in parts:
            assert part in str(raised.value)
        assert not (tmp_path / "slim").exists()

    shard.write_bytes(content[:-100])
    check(ConfigError, shard.name, "incomplete")
    shard.unlink()
    check(ConfigError, shard.name, "No such file")
    name = next(name for name in tensors if name.endswith("weight"))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, shard, metadata={"format": "pt"})
    check(UnsupportedModelError, name, "type I8")
    save_file(tensors | {name: tensors[name].bfloat16()}, shard, metadata={"format": "pt"})
    result = slimgpt.prune(str(sharded), tmp_path / "mixed", **OPTIONS)  # is converted
    assert result.report["dtype"] == "float32"


def test_one_block_is_in_memory_at_a_time(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(module: Any, function: str) -> None:
        original = getattr(module, function)

        def call(block: Any, *args: Any) -> Any:
            streamed = next(
                found.get("streamed") or found["job"].streamed
                for found in (frame.f_locals for frame in frames())
                if found.keys() & {"streamed", "job"}
            )
            parameters = streamed.skeleton.named_parameters()
            names = [name for name, p in parameters if p.device.type != "meta"]
            assert names
            assert all(name.startswith(f"model.layers.{block.index}.") for name in names)
            seen.append((function, block.index))
            return original(block, *args)

        monkeypatch.setattr(module, function, call)

    spy(sequential, "prune_block")
    spy(sensitivity, "_pull_back")
    slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **OPTIONS)
    forward, backward = ([(name, i) for i in range(4)] for name in ("prune_block", "_pull_back"))
    assert seen == [*forward, *backward[::-1], *forward]


def frames() -> Any:
    frame = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back


def test_a_stream_beyond_the_budget_is_mapped_to_a_file(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directories = []
    allocate = activations.allocate
    monkeypatch.setattr(
        activations, "allocate", lambda *args: directories.append(args[2]) or allocate(*args)
    )
    model = str(tiny_checkpoint("llama"))
    with caplog.at_level("INFO", "slimgpt"):
        slimgpt.prune(model, tmp_path / "mapped", **OPTIONS, activation_memory=1000)
        slimgpt.prune(model, tmp_path / "in_memory", **OPTIONS)
    # The streams of both models: in the sensitivity pass, for the gradients, in the run.
    file = tmp_path / "mapped" / STATE_DIR
    assert directories == [file, file, None, None, file, file] + [None] * 6
    assert "in a memory-mapped file" in caplog.text
    assert "in memory" in caplog.text
    mapped, in_memory = (
        load_file(tmp_path / name / "model.safetensors") for name in ("mapped", "in_memory")
    )
    assert all(torch.equal(mapped[name], in_memory[name]) for name in in_memory)


def test_what_cannot_fit_is_refused_with_numbers(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    model, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    with pytest.raises(ConfigError, match=r"needs about .* of memory, and 1.0 KiB are free"):
        slimgpt.prune(model, output, **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match=r"of disk, and 1.0 KiB are free"):
        slimgpt.prune(model, output, **OPTIONS)
    assert not output.exists()


def test_restart_removes_what_was_published_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    rename = Path.rename

    def all_but_the_last(path: Path, target: Path) -> Path:
        if target == output / "config.json":
            raise InterruptionError
        return rename(path, target)

    with open_run(output) as run:
        run.identify({}, restart=False)
        with run.saving(run.block_file(0)):
            pass
        with run.result() as directory:
            (directory / "runs").mkdir()
            (directory / "runs" / "events").touch()
            (directory / "config.json").touch()
        monkeypatch.setattr(Path, "rename", all_but_the_last)
        with pytest.raises(InterruptionError):
            run.publish()
        monkeypatch.undo()
    assert (output / "runs" / "events").exists()
    (output / "slurm.out").touch()
    (output / "notes").mkdir()
    with open_run(output) as run:
        run.identify({"ratio": 0.3}, restart=True)
        assert {path.name for path in output.iterdir()} == {STATE_DIR, "slurm.out", "notes"}


def test_files_of_others_are_not_replaced(
    interrupted: tuple[str, Path], whole: Callable[..., Path]
) -> None:
    model, output = interrupted
    (output / "README.md").write_text("mine")
    with pytest.raises(RunStateError, match=r"has other files of these names: README\.md"):
        slimgpt.prune(model, output, **OPTIONS)
    assert (output / "README.md").read_text() == "mine"
    (output / "README.md").unlink()
    slimgpt.prune(model, output, **OPTIONS)
    assert fingerprint(output) == fingerprint(whole())


def test_a_run_that_had_not_begun_gives_way_and_leaves_other_files(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    (output / STATE_DIR).mkdir(parents=True)  # as a kill before the first block leaves it
    Manifest({"ratio": 0.1}).write(output / STATE_DIR / "manifest.json")
    (output / "notes.txt").touch()
    with pytest.raises(ConfigError, match="no data file"):
        slimgpt.prune(str(tiny_checkpoint("llama")), output, calibration="none.txt")
    assert (output / "notes.txt").exists()
    slimgpt.prune(str(tiny_checkpoint("llama")), output, **OPTIONS)
    assert (output / "notes.txt").exists()
    assert (output / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "work"),
    [({"calibration": "self"}, "sample_from_model"), ({"method": "taylor"}, "load_model")],
)
def test_what_was_computed_before_the_first_block_is_kept(
    options: dict[str, str],
    work: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    fail_at_block(0, InterruptionError(), monkeypatch)
    with pytest.raises(InterruptionError):
        slimgpt.prune(model, output, **OPTIONS | options)
    monkeypatch.undo()
    monkeypatch.delattr(inputs, work)
    slimgpt.prune(model, output, **OPTIONS | options)


def test_calibration_files_of_one_name_are_told_apart(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / folder / "text.txt" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("one two three " * 400)
    options = OPTIONS | {"calibration": tuple(map(str, files))}
    model, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    fail_at_block(1, InterruptionError(), monkeypatch)
    with pytest.raises(InterruptionError):
        slimgpt.prune(model, output, **options)
    monkeypatch.undo()
    files[0].write_text("four five six seven " * 400)
    with pytest.raises(RunStateError, match="calibration file"):
        slimgpt.prune(model, output, **options)


@pytest.mark.parametrize("name", ["block-00001.safetensors", "samples-0.safetensors"])
@pytest.mark.parametrize("place", [-1, -400])
def test_flipped_bits_are_noticed(name: str, place: int, interrupted: tuple[str, Path]) -> None:
    model, output = interrupted
    file = output / STATE_DIR / name
    content = bytearray(file.read_bytes())
    before = file.stat()
    content[place] ^= 0x40
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RunStateError, match=f"{name} of the interrupted run is damaged"):
        slimgpt.prune(model, output, **OPTIONS)


@pytest.mark.parametrize("place", range(0, 2000, 97))
def test_flipped_bits_of_the_manifest_are_noticed(place: int, tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    Manifest({"ratio": 0.5, "text": "x" * 1900}, {"config.json": "2 bytes"}).write(file)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunStateError, match="is damaged"):
        Manifest.read(file)


def test_a_manifest_of_version_0_1_is_read(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    checksum = "f5a755100e4d43a6f148acee267fe84051fc1bbad2f64c91e4169a59b0ff2db6"
    values = {"identity": {"ratio": 0.5}, "product": {"config.json": "2 bytes"}}
    file.write_text(json.dumps({"slimgpt": checksum} | values))
    assert Manifest.read(file) == Manifest({"ratio": 0.5}, {"config.json": "2 bytes"})


@pytest.mark.parametrize("name", ["../victim", "/etc/victim", "a/../../victim", ""])
def test_a_manifest_names_no_files_elsewhere(name: str, tmp_path: Path) -> None:
    victim, output = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    with open_run(output) as run:
        run.identify({}, restart=False)
        with run.saving(run.block_file(0)):
            pass
    name = name.replace("/etc/victim", str(victim))
    Manifest({}, {name: describe_file(victim)}).write(output / STATE_DIR / "manifest.json")
    for restart in (False, True):
        with open_run(output) as run, suppress(RunStateError):
            run.identify({}, restart=restart)
        assert victim.read_text() == "mine"


def test_a_link_does_not_lead_the_withdrawal_elsewhere(tmp_path: Path) -> None:
    victim, output = tmp_path / "elsewhere" / "events", tmp_path / "out"
    victim.parent.mkdir()
    victim.write_text("mine")
    with open_run(output) as run:
        run.identify({}, restart=False)
        with run.saving(run.block_file(0)):
            pass
    result = {"runs/events": describe_file(victim)}
    Manifest({}, result).write(output / STATE_DIR / "manifest.json")
    (output / "runs").symlink_to(victim.parent)
    with open_run(output) as run:
        run.identify({}, restart=True)
    assert victim.read_text() == "mine"


def test_a_foreign_config_is_not_a_result(interrupted: tuple[str, Path]) -> None:
    model, output = interrupted
    shutil.copy(Path(model) / "config.json", output)
    before = sorted((output / STATE_DIR).iterdir())
    with pytest.raises(RunStateError, match=r"other files of these names: config\.json"):
        slimgpt.prune(model, output, **OPTIONS)
    assert sorted((output / STATE_DIR).iterdir()) == before
    (output / "config.json").unlink()
    slimgpt.prune(model, output, **OPTIONS)


def make_foreign(kind: str, output: Path, elsewhere: Path) -> None:
    state = output / STATE_DIR
    output.mkdir()
    elsewhere.mkdir()
    (elsewhere / "notes.txt").write_text("mine")
    if kind == "link":
        state.symlink_to(elsewhere)
    elif kind == "file":
        state.write_text("mine")
    else:
        state.mkdir()
        (state / "notes.txt").write_text("mine")
        if kind == "other manifest":
            (state / "manifest.json").write_text('{"name": "of another program"}')
        if kind == "link inside":
            Manifest({}).write(state / "manifest.json")
            (state / "block-00000.safetensors").symlink_to(elsewhere / "notes.txt")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["link", "file", "directory", "other manifest", "link inside"])
def test_a_foreign_state_is_refused_and_untouched(
    kind: str, restart: bool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    make_foreign(kind, output, elsewhere)
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    with pytest.raises(RunStateError, match="not the state of an interrupted run"):
        slimgpt.prune(str(tiny_checkpoint("llama")), output, restart=restart, **OPTIONS)
    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before


def test_a_lost_manifest_is_noticed(interrupted: tuple[str, Path]) -> None:
    model, output = interrupted
    (output / STATE_DIR / "manifest.json").unlink()
    with pytest.raises(RunStateError, match=r"has no manifest\.json"):
        slimgpt.prune(model, output, **OPTIONS)
    assert (output / STATE_DIR / "block-00001.safetensors").exists()


def test_a_damaged_result_is_not_published(tmp_path: Path) -> None:
    with open_run(tmp_path / "out") as run:
        run.identify({}, restart=False)
        with run.result() as directory:
            (directory / "config.json").write_text("{}")
        (run.state / "result" / "config.json").write_text("[]")
        with pytest.raises(RunStateError, match=r"config\.json is not what was written"):
            run.publish()
    assert not (tmp_path / "out" / "config.json").exists()


def test_other_threads_are_named_with_what_goes_on(
    interrupted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = interrupted
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(RunStateError, match=f"threads was {threads} and is") as raised:
        slimgpt.prune(model, output, **OPTIONS)
    assert f"set OMP_NUM_THREADS={threads} to go on" in str(raised.value.hint)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud83d"])
def test_impossible_names_of_the_output(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RunStateError, match="cannot write to"):
        slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / name, **OPTIONS)


def test_a_restart_does_not_take_a_published_result(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with open_run(output) as run:
        run.identify({}, restart=False)
        with run.result() as directory:
            (directory / "config.json").write_text("{}")
        run.publish()
        with pytest.raises(RunStateError, match="exists and is not empty"):
            run.identify({}, restart=True)
    assert (output / "config.json").read_text() == "{}"
    assert not (output / STATE_DIR).exists()
