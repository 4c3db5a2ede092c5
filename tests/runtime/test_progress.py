"""Who calls a callback of progress, with what; the bar that a terminal shows."""

import io
import os
import pty
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TEXT, Run
from rich.console import Console

import slimgpt
from slimgpt.runtime.progress import progress_bar

PRUNING = {"calibration": TEXT, "nsamples": 6, "seqlen": 32}
RECOVERY = {
    "method": "full", "data": TEXT, "max_examples": 8, "eval_data": "pydocs",
    "eval_tokens": 64, "seqlen": 32, "max_steps": 3, "batch_size": 1, "micro_batch_size": 1,
    "device": "cpu",
}  # fmt: skip


class StoppedError(Exception):
    """Raised by a callback."""


@pytest.fixture
def terminal() -> Iterator[tuple[int, io.TextIOWrapper]]:
    """The end of a terminal that a person sees, and the one that a program writes to."""
    shown, written = pty.openpty()
    os.set_blocking(shown, False)
    with os.fdopen(written, "w") as file:
        yield shown, file
    os.close(shown)


def read(shown: int) -> str:
    """All that a terminal has been sent, without colours and movements of the cursor."""
    text = b""
    with suppress(BlockingIOError):
        while True:
            text += os.read(shown, 10_000)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r╸╺]", "", text.decode())


def test_each_block_of_each_pass_is_told(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []

    def stop_after_two_blocks(*call: object) -> None:
        calls.append(call)  # type: ignore[arg-type]
        if call == ("block", 2, 4):
            raise StoppedError

    model, output = str(tiny_checkpoint("llama")), tmp_path / "slim"
    with pytest.raises(StoppedError):
        slimgpt.prune(model, output, progress=stop_after_two_blocks, **PRUNING)
    blocks = [("block", done, 4) for done in (1, 2, 3, 4)]
    assert calls == [*(("sensitivity", done, 4) for done in (1, 2, 3, 4)), *blocks[:2]]
    calls.clear()
    slimgpt.prune(model, output, progress=lambda *call: calls.append(call), **PRUNING)
    assert calls == blocks  # those that were finished are replayed


def test_each_step_of_a_training_is_told(
    slim_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    slimgpt.recover(
        str(slim_checkpoint("llama")),
        tmp_path / "out",
        progress=lambda *call: calls.append(call),
        **RECOVERY,
    )
    assert calls == [("step", done, 3) for done in (1, 2, 3)]


def test_the_bar_of_a_terminal(
    terminal: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, file = terminal
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    console = Console(file=file, width=80, get_time=lambda: now[0])
    with progress_bar(console) as show:
        for done in (1, 2, 3):
            now[0] += 100
            show("block", done, 4)
        assert re.search("block ━+ 3/4 0:01:40 left", read(shown))
        show("block", 4, 4)
        read(shown)
        console.print("above")
        after = read(shown)
        assert "above" in after
        assert "block" not in after  # a bar that is full is gone
    assert not read(shown).strip()


def test_without_a_terminal_there_is_no_bar(
    run: Run,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    flags = [f"--{name}={value}" for name, value in PRUNING.items()]
    source, output = tiny_checkpoint("llama"), tmp_path / "slim"
    code, _, err = run("prune", source, "--output", output, *flags)
    assert code == 0
    assert "block 4/4" in err
    assert "\x1b" not in err
    forced = Console(file=io.StringIO(), force_terminal=True)
    with progress_bar(forced) as show:
        show("block", 1, 4)
    assert not forced.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_that_is_gone_does_not_end_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown, written = pty.openpty()
    with os.fdopen(written, "w") as file, progress_bar(Console(file=file)) as show:
        show("block", 1, 4)
        os.close(shown)
        show("block", 2, 4)
        show("block", 3, 4)


def test_a_recipe_sets_no_callback(
    run: Run, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("progress: true\n")
    source = tiny_checkpoint("llama")
    code, _, err = run("prune", source, "--output", tmp_path / "slim", "--recipe", recipe)
    assert code == 2
    assert "sets progress" in err
