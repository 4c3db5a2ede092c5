"""Recovery on texts of which only the answers are learned, and on answers of the dense model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from safetensors.torch import load_file
from torch.nn import functional

import slimgpt
from slimgpt.config import RecoverConfig
from slimgpt.data.examples import training_texts, training_windows
from slimgpt.data.samples import SampleOptions
from slimgpt.errors import ConfigError, DataError, RunStateError
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.recovery import recover, text
from slimgpt.runtime.run_directory import STATE_DIR

OPTIONS: dict[str, Any] = {
    "method": "distill",
    "tokens": 4 * 48,
    "seqlen": 48,
    "eval_data": "pydocs",
    "eval_tokens": 2 * 48,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 3e-3,
    "top_k": 320,
    "device": "cpu",
    "dtype": "float32",
}

FULL: dict[str, Any] = {"method": "full", "top_k": None}

INSTRUCTIONS = [
    {"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i * i)))} for i in range(8)
]

Recover = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def dense(tiny_checkpoint: Callable[[str], Path]) -> str:
    return str(tiny_checkpoint("llama"))


@pytest.fixture
def instructions(tmp_path: Path) -> str:
    file = tmp_path / "instructions.json"
    file.write_text(json.dumps(INSTRUCTIONS), encoding="utf-8")
    return str(file)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("One thing\nAnd another thing\n", encoding="utf-8")
    return str(file)


@pytest.fixture
def recovered(slim_checkpoint: Callable[[str], Path], dense: str, tmp_path: Path) -> Recover:
    def run(output: str = "out", **options: Any) -> dict[str, Any]:
        given = {**OPTIONS, "teacher": dense, **options}
        given = {name: value for name, value in given.items() if value is not None}
        model = given.pop("model", slim_checkpoint("llama"))
        return slimgpt.recover(str(model), tmp_path / output, **given).report

    return run


class Interrupted(BaseException):
    """Ends a run as abruptly as a signal does, as far as its files are concerned."""


def interrupt(*_: Any, **__: Any) -> None:
    raise Interrupted


def windows(output: Path, name: str = "text-0") -> tuple[Any, Any]:
    stored = load_file(output / STATE_DIR / f"{name}.safetensors")
    return stored["tokens"], stored["is_learned"]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("method", ["distill", "full"])
def test_loss_is_the_mean_over_the_learned_tokens(
    method: str, micro_batch_size: int, recovered: Recover, instructions: str, dense: str,
    slim_checkpoint: Callable[[str], Path],
) -> None:  # fmt: skip
    """Against a loop over the tokens of the one step, however they lie in its batches."""
    options = {"data": instructions, "micro_batch_size": micro_batch_size}
    if method == "full":
        options |= FULL | {"teacher": None, "eval_steps": 1}
    tokenizer = load_tokenizer(find_model(dense))
    seed = 1  # one more than the run's
    drawn = list(
        zip(*training_windows(instructions, tokenizer, SampleOptions(4, 48, seed)), strict=True)
    )
    assert len({int(is_learned.sum()) for _, is_learned in drawn}) > 1
    models = [load_model(find_model(str(m))) for m in (dense, slim_checkpoint("llama"))]
    terms = []
    with torch.no_grad():
        for tokens_T, is_learned_T in drawn:
            p, q = (m(tokens_T[None]).logits[0].log_softmax(-1).exp() for m in models)
            for place in range(1, len(tokens_T)):
                before = place - 1
                if is_learned_T[place] and method == "distill":
                    kl = functional.kl_div(q[before].log(), p[before], reduction="sum")
                    terms.append(float(kl))
                elif is_learned_T[place]:
                    terms.append(-float(q[before, tokens_T[place]].log()))
    report = recovered(**options)
    assert report["steps"] == 1
    (step,) = report["train_loss"]
    assert step[1] == pytest.approx(sum(terms) / len(terms), rel=2e-3)


def test_chats_are_learned_in_the_models_template(
    recovered: Recover, slim_checkpoint: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    chatty = tmp_path / "chatty"
    shutil.copytree(slim_checkpoint("llama"), chatty)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    (chatty / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "So be it"}]
    file = tmp_path / "chats.jsonl"
    file.write_text(40 * (json.dumps({"messages": chat}) + "\n"), encoding="utf-8")
    monkeypatch.setattr(recover, "_train", interrupt)
    with pytest.raises(Interrupted):
        recovered(model=chatty, data=str(file))
    tokens_NT, is_learned_NT = windows(tmp_path / "out")
    assert tokens_NT.shape == (4, 48)
    tokenizer = load_tokenizer(find_model(str(chatty)))
    learned = tokenizer.decode(tokens_NT[0][is_learned_NT[0]])
    assert "So be it</s>" in learned
    assert "Say" not in learned
    share = 100 * is_learned_NT.float().mean()
    assert f"the loss counts {share:.0f} % of the tokens, those of answers" in caplog.messages


def test_answers_to_prompts_are_the_text(
    recovered: Recover, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after they are written, the run goes on with the same answers and result."""
    options = {"data": (TEXT, "self"), "prompts": prompts, "eval_steps": 1}
    whole = recovered("whole", **options)
    assert whole["config"]["prompts"] == "prompts.txt"
    assert str(tmp_path) not in json.dumps(whole)
    with monkeypatch.context() as patch:
        patch.setattr(recover, "store_predictions", interrupt)
        with pytest.raises(Interrupted):
            recovered(**options)
    tokens_NT, is_learned_NT = windows(tmp_path / "out", "generated")
    assert tokens_NT.shape == (2, 48)
    assert 0.2 < is_learned_NT.float().mean() < 0.95
    assert windows(tmp_path / "out")[1].all()
    monkeypatch.setattr(text, "answer_prompts", interrupt)
    resumed = recovered(**options)
    assert (resumed["train_loss"], resumed["held_out_kl"]) == (
        whole["train_loss"],
        whole["held_out_kl"],
    )


def test_held_out_windows_and_a_time(
    recovered: Recover, instructions: str, prompts: str, dense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With time for more text than there is, all windows with an answer but those held out."""
    trained: list[Any] = []
    train = recover._train

    def see(job: Any, data: Any, arguments: Any) -> None:
        trained.extend(data.train[index] for index in range(len(data.train)))
        train(job, data, arguments)

    monkeypatch.setattr(recover, "_train", see)
    texts = {"data": (instructions, "self"), "prompts": prompts, "eval_data": instructions}
    report = recovered(**texts, tokens=None, minutes=600)
    assert report["held_out"] == "instructions.json (windows left out of the training)"
    assert report["tokens"] == report["budget"]["tokens"] == 48 * len(trained)
    assert report["config"]["prompts"] == "prompts.txt"
    parts = training_texts(
        instructions, load_tokenizer(find_model(dense)), SampleOptions(0, 48, seed=1)
    )
    text = [pair for part in parts for some in part for pair in zip(*some, strict=True)]
    cut = [text[start : start + 48] for start in range(0, len(text) - 47, 48)]
    assert len(cut) // 10 == 2
    useful = [window for window in cut[2:] if any(learned for _, learned in window[1:])]
    drawn = [row["input_ids"].tolist() for row in trained[: len(trained) // 2]]
    assert sorted(drawn) == sorted([token for token, _ in window] for window in useful)


def test_texts_with_few_answers_are_found_before_the_pruning(dense: str, instructions: str) -> None:
    options = OPTIONS | {"data": instructions, "eval_data": instructions, "seqlen": 16}
    config = RecoverConfig.create(**options, teacher=dense)
    recover.check_recovery(dense, config)
    config = RecoverConfig.create(**options | {"tokens": "100k"}, teacher=dense)
    with pytest.raises(DataError, match=r"\d+ without a token of an answer, but 6250 samples and"):
        recover.check_recovery(dense, config)


def test_other_prompts_are_refused(
    recovered: Recover, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data": "self", "prompts": prompts}
    monkeypatch.setattr(recover, "_train", interrupt)
    with pytest.raises(Interrupted):
        recovered(**options)
    Path(prompts).write_text("One thing\nAnd yet another thing\n", encoding="utf-8")
    with pytest.raises(RunStateError, match=r"text file .*prompts\.txt was"):
        recovered(**options)


@pytest.mark.parametrize(
    ("options", "content", "error", "message"),
    [
        ({"data": TEXT}, "One\n", ConfigError, "prompts are a file or data set for data='self'"),
        ({"prompts": "self"}, "", ConfigError, "prompts are a file or data set for data='self'"),
        ({"prompts": "missing.txt"}, "", ConfigError, "no data file missing.txt"),
        ({}, "\n", DataError, r"prompts\.txt has no prompt of at most 24 tokens"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(
    options: dict[str, Any], content: str, error: type[Exception], message: str,
    recovered: Recover, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(recover, "load_model", interrupt)
    Path(prompts).write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message) as mistake:
        recovered(**{"data": "self", "prompts": prompts} | options)
    assert mistake.value.hint  # pyright: ignore
    assert not (tmp_path / "out").exists()
