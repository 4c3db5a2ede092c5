"""A time instead of tokens: what is measured, what fits, and what is left out of the training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

import slimgpt
from slimgpt.config import LONGEST_TEXT, RecoverConfig
from slimgpt.data.datasets import are_same_files
from slimgpt.errors import ConfigError, DataError
from slimgpt.recovery import budget, recover
from slimgpt.recovery.budget import Costs, tokens_within
from slimgpt.runtime.run_directory import STATE_DIR

OPTIONS: dict[str, Any] = {"seqlen": 32, "eval_tokens": 128, "device": "cpu", "dtype": "float32"}

seconds = st.floats(1e-6, 1e3)


@pytest.fixture
def timed(
    slim_checkpoint: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    def run(minutes: float, **options: Any) -> dict[str, Any]:
        given = OPTIONS | {"method": "distill", "teacher": str(tiny_checkpoint("llama"))} | options
        given = {name: value for name, value in given.items() if value is not None}
        model = str(slim_checkpoint("llama"))
        return slimgpt.recover(model, tmp_path / "out", minutes=minutes, **given).report

    return run


@settings(max_examples=100, deadline=None)
@given(
    minutes=st.floats(0.1, 1e6),
    costs=st.builds(Costs, *[seconds] * 6),
    spent=seconds,
    own=st.booleans(),
    eval_steps=st.none() | st.integers(1, 50),
)
def test_tokens_fill_the_time(
    minutes: float, costs: Costs, spent: float, own: bool, eval_steps: int | None
) -> None:
    """One window more would not fit; the error says a time that is enough."""
    texts = ("pydocs", "self") if own else ("pydocs",)
    config = RecoverConfig.create(
        method="distill", minutes=minutes, data=texts, eval_steps=eval_steps, batch_size=4
    )

    def needed(num_windows: int) -> float:
        num_steps = num_windows / 4
        evaluations = num_steps / eval_steps if eval_steps else budget.EVALUATIONS
        tokens = 512 * num_windows
        generated = tokens / 2 if own else 0
        return (
            spent + costs.loading + costs.evaluation + num_steps * costs.step
            + evaluations * (costs.evaluation + costs.checkpoint)
            + generated * costs.generation + (tokens + 3 * 512) * costs.prediction
        )  # fmt: skip

    if needed(len(texts)) > 60 * minutes:
        with pytest.raises(ConfigError) as few:
            tokens_within(config, costs, spent, num_held_out=3)
        enough = re.match(r"give at least (\S+) minutes", few.value.hint or "")
        assert enough
        assert needed(len(texts)) <= 60 * float(enough[1]) * (1 + 1e-9)
        return
    tokens = tokens_within(config, costs, spent, num_held_out=3)
    assert tokens % 512 == 0
    assert 512 * len(texts) <= tokens <= LONGEST_TEXT
    assert needed(tokens // 512) <= 60 * minutes * (1 + 1e-9)
    if tokens < LONGEST_TEXT - 512:
        assert needed(tokens // 512 + 1) > 60 * minutes * (1 - 1e-9)


def test_more_epochs_leave_time_for_fewer_tokens() -> None:
    costs = Costs(0, 0, step=1, evaluation=0, checkpoint=0, loading=0)
    once, twice = (
        tokens_within(RecoverConfig.create(method="distill", minutes=10, epochs=n), costs, 0, 1)
        for n in (1, 2)
    )
    assert once == 2 * twice == 600 * 2 * 512


@pytest.mark.parametrize(
    ("options", "has_generated", "has_predicted"),
    [
        ({"data": (TEXT, "self"), "eval_data": "pydocs"}, True, True),
        ({"data": TEXT, "eval_data": TEXT}, False, True),
        ({"method": "full", "data": TEXT, "eval_data": "pydocs", "teacher": None},
         False, False),
    ],
)  # fmt: skip
def test_what_is_measured(
    options: dict[str, Any], has_generated: bool, has_predicted: bool,
    timed: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The time is enough for more text than there is; nothing of the trial remains."""
    measure, seen = budget.measure, list[Costs]()

    def measured(run: Any, *args: Any) -> Costs:
        seen.append(measure(run, *args))
        left = [path.name for path in run.state.iterdir()]
        assert sorted(left) == ["lock", "manifest.json"]
        return seen[0]

    monkeypatch.setattr(budget, "measure", measured)
    report = timed(600, **{"batch_size": 16, "micro_batch_size": 4} | options)
    (costs,) = seen
    assert min(costs.step, costs.evaluation, costs.checkpoint, costs.loading) > 0
    assert (costs.generation > 0, costs.prediction > 0) == (has_generated, has_predicted)
    left_out = 4 if options["eval_data"] == TEXT else 0
    num_windows = (3911 // 32 - left_out) * (2 if has_generated else 1)
    assert report["tokens"] == report["budget"]["tokens"] == 32 * num_windows
    assert not (tmp_path / "out" / STATE_DIR).exists()


def test_too_little_time(timed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0\.0001 minutes are too few") as few:
        timed(0.0001, data=TEXT, eval_data="pydocs")
    assert few.value.hint
    assert few.value.hint.startswith("give at least 0.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "1M"}, "give one of tokens and minutes"),
        ({"max_steps": 3}, "minutes leaves nothing to decide to max_steps"),
        ({"max_examples": 3}, "minutes leaves nothing to decide to max_examples"),
        ({"data": (TEXT, TEXT)}, "has a text twice"),
    ],
)
def test_mistakes(
    options: dict[str, Any], message: str, timed: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError, match=message) as mistake:
        timed(1, **options)
    assert mistake.value.hint


class Interrupted(BaseException):
    """Ends a run."""


def test_a_part_of_the_text_is_left_out(
    timed: Callable[..., dict[str, Any]],
    slim_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The same windows however much is trained on, under any name of the file."""
    other = Path(TEXT).parent / ".." / Path(TEXT).parent.name / Path(TEXT).name
    assert are_same_files(TEXT, str(other))
    assert not are_same_files("pydocs", "pydocs")
    seen: list[Any] = []

    def stop(job: Any, data: Any, _: Any) -> None:
        seen.append((data.train, data.held_out))
        raise Interrupted

    monkeypatch.setattr(recover, "_train", stop)
    model, train = str(slim_checkpoint("llama")), {"method": "full", "data": TEXT, **OPTIONS}
    for name, tokens in ((TEXT, 118), (str(other), 20)):
        with pytest.raises(Interrupted):
            slimgpt.recover(
                model, tmp_path / name[-9:], tokens=32 * tokens, eval_data=name, **train
            )
    (all_of_it, held_out), (few, again) = (
        ([tuple(row["input_ids"]) for row in rows] for rows in pair) for pair in seen
    )
    held_out, again, all_of_it, few = map(set, (held_out, again, all_of_it, few))
    assert len(held_out) == 4
    assert held_out == again
    assert len(all_of_it) == 118
    assert len(few) == 20
    assert not held_out & (all_of_it | few)
    assert few < all_of_it
    with pytest.raises(DataError, match="120 samples and 4 held-out ones need"):
        slimgpt.recover(model, tmp_path / "more", tokens=32 * 120, eval_data=TEXT, **train)


def test_of_a_short_text_a_tenth_is_left_out(
    slim_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number_of(words: str) -> int:
        file = tmp_path / "short.txt"
        file.write_text(words)
        tokenizer = recover.load_tokenizer(recover.find_model(str(slim_checkpoint("llama"))))
        config = RecoverConfig.create(tokens=64, seqlen=32, data=str(file), eval_data=str(file))
        return len(recover._held_out_windows(config, tokenizer))

    words = Path(TEXT).read_text()
    assert number_of(words) == 3911 // 32 // 10
    assert number_of(words[:200]) == 1
    with pytest.raises(DataError, match="has less than two windows of 32") as short:
        number_of("Brevity.")
    assert short.value.hint
