"""Which tokens a training learns, and prompts that the model answers."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import MARKED, TEMPLATE
from conftest import TEXT, assert_greedy, make_tiny_model
from transformers import PreTrainedTokenizerFast

from slimgpt.data import prompts as prompts_module
from slimgpt.data import self_generated
from slimgpt.data.documents import instruction_prompt
from slimgpt.data.examples import training_texts, training_windows
from slimgpt.data.prompts import answer_length, read_prompts
from slimgpt.data.samples import (
    SampleOptions,
    calibration_tokens,
    count_samples,
    held_out_samples,
)
from slimgpt.data.self_generated import answer_prompts
from slimgpt.errors import DataError

CHATS = [
    [
        {"role": "user", "content": f"What is {number} and two?"},
        {"role": "assistant", "content": f"It is {number + 2}."},
        {"role": "user", "content": "Why? " * (number % 5)},
        {"role": "assistant", "content": "So it is. " * (number % 3)},
    ]
    for number in range(40)
]

Flagged = list[tuple[int, bool]]  # tokens, and whether each is learned


def write(path: Path, records: Any) -> str:
    text = records if isinstance(records, str) else "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def rendered(chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Flagged:
    """Write the template's text by hand, and mark what lies between <assistant> and </s>."""
    text = "<s>" + "".join(f"<{turn['role']}>{turn['content']}</s>" for turn in chat)
    flagged: Flagged = []
    for number, part in enumerate(re.split(r"((?<=<assistant>).*?</s>)", text)):
        ids = tokenizer(part, add_special_tokens=False).input_ids
        flagged += [(token, number % 2 == 1) for token in ids]
    return flagged


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize("seqlen", [7, 32])
def test_windows_of_chats_learn_the_assistants_turns(
    template: str, seqlen: int, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Against all windows of the rendered chats, in the order that the seed decides."""
    chat_tokenizer.chat_template = template
    file = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    order = list(CHATS)
    random.Random(5).shuffle(order)
    text = [pair for chat in order for pair in rendered(chat, chat_tokenizer)]
    cut = [text[start : start + seqlen] for start in range(0, len(text) - seqlen + 1, seqlen)]
    useful = [window for window in cut if any(learned for _, learned in window[1:])]
    assert len(useful) < len(cut) or seqlen == 32
    drawn = training_windows(file, chat_tokenizer, SampleOptions(len(useful), seqlen, seed=5))
    flagged = [
        list(zip(*pair, strict=True))
        for pair in zip(drawn.tokens.tolist(), drawn.is_learned.tolist(), strict=True)
    ]
    assert sorted(flagged) == sorted(useful)
    with pytest.raises(DataError, match=f", {len(useful)} samples of {seqlen}") as few:
        training_windows(file, chat_tokenizer, SampleOptions(len(useful) + 1, seqlen, seed=5))
    assert ("without a token of an answer" in str(few.value)) == (len(useful) < len(cut))


@pytest.mark.parametrize("seqlen", [7, 32])
def test_the_first_windows_of_chats_are_held_out(
    seqlen: int, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """All of them, and of the others those with an answer can be drawn and are counted."""
    file = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    order = list(CHATS)
    random.Random(5).shuffle(order)
    text = [pair for chat in order for pair in rendered(chat, chat_tokenizer)]
    cut = [text[start : start + seqlen] for start in range(0, len(text) - seqlen + 1, seqlen)]
    has_answer = [any(learned for _, learned in window[1:]) for window in cut]
    assert all(has_answer) == (seqlen == 32)
    tokens = [[token for token, _ in window] for window in cut]

    def options(nsamples: int, num_held_out: int) -> SampleOptions:
        return SampleOptions(nsamples, seqlen, 5, None, num_held_out)

    def texts() -> Iterator[Any]:
        return training_texts(file, chat_tokenizer, options(0, 0))

    most = len(cut) // 10
    assert held_out_samples(texts(), options(3, 0)).tolist() == tokens[:3]
    assert held_out_samples(texts(), options(999, 0)).tolist() == tokens[:most]
    left = [window for window, useful in zip(tokens, has_answer, strict=True) if useful]
    left = left[sum(has_answer[:most]) :]
    assert count_samples(texts(), options(999, most)) == len(left)
    assert count_samples(texts(), options(2, most)) == 2
    assert count_samples(texts(), options(1, len(cut) + 1)) == 0
    drawn = training_windows(file, chat_tokenizer, options(len(left), most))
    assert sorted(drawn.tokens.tolist()) == sorted(left)
    with pytest.raises(DataError, match=f"samples and {most} held-out ones need"):
        training_windows(file, chat_tokenizer, options(len(left) + 1, most))


def test_windows_of_instructions_learn_the_outputs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    record = {"instruction": "Count.", "output": "one two three"}
    file = write(tmp_path / "a.jsonl", [record] * 30)
    drawn = training_windows(file, tokenizer, SampleOptions(8, 64))
    prompt = len(tokenizer(instruction_prompt(record)).input_ids)
    whole = tokenizer(instruction_prompt(record) + record["output"]).input_ids
    text = list(zip([*whole, tokenizer.eos_token_id], [False] * prompt + [True] * 99))  # noqa: B905
    windows = [
        [text[(start + i) % len(text)] for i in range(64)] for start in range(0, 30 * 64, 64)
    ]
    for pair in zip(drawn.tokens.tolist(), drawn.is_learned.tolist(), strict=True):
        assert list(zip(*pair, strict=True)) in windows


def test_windows_of_plain_text_are_those_of_the_calibration(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    options = SampleOptions(5, 16, seed=3)
    drawn = training_windows(TEXT, tokenizer, options)
    assert torch.equal(drawn.tokens, calibration_tokens(TEXT, tokenizer, options))
    assert drawn.is_learned.all()


@pytest.mark.parametrize("has_template", [True, False])
def test_prompts_are_read_up_to_the_answer(
    has_template: bool, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def read(name: str, records: Any) -> list[str]:
        read = read_prompts(write(tmp_path / name, records), chat_tokenizer, 512)
        return [str(chat_tokenizer.decode(prompt.tolist())) for prompt in read]

    instruction = {"instruction": "Add.", "input": "1 2", "output": "3"}
    asked = instruction_prompt(instruction)
    if not has_template:
        chat_tokenizer.chat_template = None
        assert read("a.txt", "one\n\n  \ntwo\n") == ["one", "two"]
        assert read("a.jsonl", [{"text": "one\ntwo"}, instruction]) == ["one\ntwo", asked]
        with pytest.raises(DataError, match="has no chat template"):
            read("b.jsonl", [{"messages": CHATS[1]}])
        return
    before, after = "<s><user>", "</s><assistant>"
    assert read("a.txt", "one\n\ntwo\n") == [f"{before}{text}{after}" for text in ("one", "two")]
    assert read("a.jsonl", [instruction]) == [f"{before}{asked}{after}"]
    asked = "What is 1 and two?</s><assistant>It is 3.</s><user>Why? "
    assert (
        read("b.jsonl", [{"messages": CHATS[1]}, {"messages": CHATS[1][:3]}])
        == [f"{before}{asked}{after}"] * 2
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "has no prompt of at most 16 tokens"),
        ("a.txt", " \n\n", "has no prompt of at most 16 tokens"),
        ("a.txt", "word " * 99, "has no prompt of at most 16 tokens; 1 are longer"),
        ("a.jsonl", "\n", "has no prompt of at most 16 tokens"),
        ("a.jsonl", '{"text": null}\n', "has no prompt of at most 16 tokens"),
        ("a.jsonl", "{", "cannot read .*line 1"),
        ("a.jsonl", '{"prompt": "x"}', "has no text field 'text'; it has: prompt"),
        ("a.jsonl", json.dumps({"messages": CHATS[0][1:2]}), "has only turns of the assistant"),
    ],
)
def test_bad_prompts(
    name: str, content: str, message: str, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as mistake:
        read_prompts(write(tmp_path / name, content), chat_tokenizer, 32)
    assert mistake.value.hint


def test_long_and_very_many_prompts_are_left_out(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(prompts_module, "MAX_PROMPTS", 3)
    file = write(tmp_path / "a.txt", "short\n" + "very " * 99 + "\nalso short\nnot read\n")
    read = read_prompts(file, tokenizer, 32)
    assert [tokenizer.decode(prompt.tolist()) for prompt in read] == ["short", "also short"]
    assert caplog.messages == ["skipped 1 prompts with more than 16 tokens"]


def test_answers_follow_their_prompts(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each prompt has as many answers as the others, and what the model draws decides them."""
    caplog.set_level("INFO")
    model, seqlen = make_tiny_model("llama"), 32
    file = write(tmp_path / "a.txt", "one\ntwo and three\nfour five six seven\n")
    prompts = read_prompts(file, tokenizer, seqlen)
    model.lm_head.weight[tokenizer.eos_token_id] = 2 * model.lm_head.weight[7]  # often the last
    torch.manual_seed(0)
    texts = itertools.islice(self_generated._answers(model, tokenizer, prompts, seqlen), 300)
    asked, lengths, answers = [], set(), set()
    for (prompt, is_asked), (answer, is_answer) in texts:  # pyright: ignore
        asked.append(tuple(prompt))
        answers.add(tuple(answer))
        lengths.add(len(answer))
        assert (set(is_asked), set(is_answer)) == ({False}, {True})
        assert (len(is_asked), len(is_answer)) == (len(prompt), len(answer))
        assert tokenizer.eos_token_id not in answer[:-1]
        assert answer[-1] == tokenizer.eos_token_id or len(answer) == answer_length(seqlen)
    assert {asked.count(tuple(prompt)) for prompt in prompts} == {100}
    assert len(lengths) > 3
    assert max(lengths) == answer_length(seqlen) == 16
    assert len(answers) > 200
    assert "3 prompts are too few: they are answered several times" in caplog.messages


def test_padding_does_not_change_the_answers(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the likeliest token in place of a drawn one."""
    monkeypatch.setattr(self_generated._Draw, "__call__", lambda _, ids, scores: scores)
    model = make_tiny_model("llama")
    prompts = [prompts_module.array("q", range(5, 5 + length)) for length in (1, 4, 9)]
    texts = itertools.islice(self_generated._answers(model, tokenizer, prompts, 32), 3)
    for (prompt, _), (answer, _) in texts:  # pyright: ignore
        assert_greedy(model, torch.tensor([[*prompt, *answer]]), len(answer))


def test_answers_are_cut_into_windows_by_the_seed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_tiny_model("llama")
    prompts = read_prompts(write(tmp_path / "a.txt", "one\ntwo three\n"), tokenizer, 32)
    state = torch.get_rng_state()
    one, same, other = (
        answer_prompts(model, tokenizer, prompts, SampleOptions(6, 32, seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert one.tokens.shape == one.is_learned.shape == (6, 32)
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one.tokens, other.tokens)
    assert one.is_learned[:, 1:].any(dim=1).all()
    assert not one.is_learned.all()


def test_a_file_in_which_no_window_has_an_answer(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", [{"messages": CHATS[0][:1]}] * 20)
    with pytest.raises(DataError, match=r"0 samples of 16 and \d+ without a token of an answer"):
        training_windows(file, chat_tokenizer, SampleOptions(1, 16))
