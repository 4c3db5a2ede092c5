"""Calibration and evaluation text."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from transformers import PreTrainedTokenizerFast

from slimgpt.data.documents import instruction_prompt
from slimgpt.data.examples import IGNORED, training_examples
from slimgpt.data.samples import SampleOptions, calibration_tokens, evaluation_tokens
from slimgpt.data.self_generated import TEXT_LENGTH, _Draw, sample_from_model
from slimgpt.errors import DataError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_samples_are_windows_of_the_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = " ".join(f"word {i}" for i in range(400))
    name = write(tmp_path / "text.txt", text)
    samples = calibration_tokens(name, tokenizer, SampleOptions(nsamples=5, seqlen=16, seed=3))
    tokens = tokenizer(text + "\n\n").input_ids
    windows = [tokens[i : i + 16] for i in range(0, len(tokens) - 15, 16)]
    assert samples.shape == (5, 16)
    rows = samples.tolist()
    assert all(row in windows for row in rows)
    assert len({tuple(row) for row in rows}) == 5


def test_seed_decides_the_samples(tokenizer: PreTrainedTokenizerFast) -> None:
    draws = [
        calibration_tokens("pydocs", tokenizer, SampleOptions(4, 64, seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_pydocs_calibration_and_evaluation_do_not_overlap(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    from pydoc_data.topics import topics

    held_out = tokenizer.decode(evaluation_tokens("pydocs", tokenizer))
    whole = "\n\n".join(topics[key] for key in sorted(topics))
    assert whole.endswith(held_out)
    assert len(held_out) / len(whole) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_record_files_give_the_same_text(
    suffix: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    records = [{"body": f"document number {i}"} for i in range(9)]
    path = tmp_path / f"records{suffix}"
    if suffix == ".parquet":
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(records).to_parquet(path)
    elif suffix == ".jsonl":
        write(path, "\n".join(map(json.dumps, records)))
    else:
        write(path, json.dumps(records))
    tokens = evaluation_tokens(str(path), tokenizer, text_field="body")
    assert tokenizer.decode(tokens) == "\n\n".join(record["body"] for record in records)


def test_instructions_are_formatted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    name = write(tmp_path / "alpaca.json", json.dumps(records))
    text = tokenizer.decode(evaluation_tokens(name, tokenizer))
    assert text == "\n\n".join(instruction_prompt(r) + r["output"] for r in records)
    assert "### Input:\n1 2\n\n### Response:\n3" in text
    assert "### Instruction:\nSay hi.\n\n### Response:\nhi" in text


def test_only_answers_are_trained_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "three"},
        {"instruction": "Say much.", "input": "", "output": "much " * 200},
        {"instruction": "Long. " * 400, "input": "", "output": "never seen"},
    ]
    name = write(tmp_path / "alpaca.json", json.dumps(records))
    examples = training_examples(name, tokenizer, seqlen=256)
    assert len(examples) == 2
    for example, record in zip(examples, records, strict=False):
        pairs = list(zip(example["input_ids"], example["labels"], strict=True))
        prompt = [token for token, label in pairs if label == IGNORED]
        answer = [token for token, label in pairs if label == token]
        assert prompt + answer == example["input_ids"]
        assert tokenizer.decode(prompt) == instruction_prompt(record)
        assert (record["output"] + "</s>").startswith(tokenizer.decode(answer))
    assert tokenizer.decode(examples[0]["input_ids"]).endswith("three</s>")
    assert len(examples[1]["input_ids"]) == 256
    assert len(training_examples(name, tokenizer, seqlen=256, max_examples=1)) == 1


def test_plain_text_is_trained_on_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    from pydoc_data.topics import topics

    examples = training_examples("pydocs", tokenizer, seqlen=64, max_examples=5)
    tokens = [token for example in examples for token in example["input_ids"]]
    assert len(tokens) == 5 * 64
    assert "\n\n".join(topics[key] for key in sorted(topics)).startswith(tokenizer.decode(tokens))
    assert all(example["labels"] == example["input_ids"] for example in examples)
    with pytest.raises(DataError, match="not one example"):
        training_examples("pydocs", tokenizer, seqlen=10**7)


def test_max_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = evaluation_tokens("pydocs", tokenizer)
    assert torch.equal(evaluation_tokens("pydocs", tokenizer, max_tokens=100), whole[:100])


def test_a_named_field_is_not_replaced_by_another(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    name = write(tmp_path / "alpaca.json", json.dumps([{"instruction": "Add.", "output": "3"}]))
    with pytest.raises(DataError, match="no text field 'body'; it has: instruction, output"):
        evaluation_tokens(name, tokenizer, text_field="body")


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("\n", ".txt", "has 0 tokens, 0 samples of 32, but 4 samples need 128 tokens"),
        ('{"body": "x"}', ".jsonl", "line 1 has no text field 'text'; it has: body"),
        ('{"text": "x"}\n{"text": 3}', ".jsonl", "line 2: 'text' is a number, not a string"),
        ("{broken", ".jsonl", "cannot read"),
        ('[{"text": "x"}', ".json", "',' or ']' expected"),
        ("no parquet", ".parquet", "cannot read"),
    ],
)
def test_bad_files(
    content: str, suffix: str, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    name = write(tmp_path / f"bad{suffix}", content)
    with pytest.raises(DataError, match=message):
        calibration_tokens(name, tokenizer, SampleOptions(nsamples=4, seqlen=32))


def test_hub_failure_names_the_local_alternatives(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="no route to the hub") as caught:
        calibration_tokens("c4", tokenizer, SampleOptions(nsamples=1, seqlen=8))
    assert "pydocs" in str(caught.value.hint)
    assert ".jsonl" in str(caught.value.hint)


def test_hub_records_are_read_by_their_field(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load(path: str, **options: object) -> list[dict[str, str]]:
        asked.update(path=path, **options)
        return [{"sentence": "one two"}, {"sentence": "three"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    tokens = evaluation_tokens("ptb", tokenizer)
    assert tokenizer.decode(tokens) == "one two three"
    assert asked["split"] == "test"
    assert asked["streaming"] is True


def test_the_model_draws_from_its_distribution() -> None:
    """Of tokens without probability none is drawn, of the others as many as expected."""
    scores = torch.tensor([-torch.inf, 0.3, -1.0, -torch.inf, 1.2, -torch.inf])
    num_texts = 20_000
    torch.manual_seed(0)
    drawn = _Draw()(torch.empty(0), scores.expand(num_texts, -1)).argmax(dim=1)
    counts = torch.bincount(drawn, minlength=len(scores))
    expected = scores.softmax(dim=0) * num_texts
    assert (counts[expected == 0] == 0).all()
    assert ((counts - expected).abs() <= 4 * expected.sqrt()).all()


def test_texts_of_the_model_are_joined_to_samples(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model("llama", max_position_embeddings=TEXT_LENGTH)
    nsamples, seqlen = 2, TEXT_LENGTH + 10
    samples = sample_from_model(model, tokenizer, SampleOptions(nsamples, seqlen, seed=3))
    assert samples.shape == (nsamples, seqlen)
    assert (samples.flatten()[::TEXT_LENGTH] == tokenizer.bos_token_id).all()
    assert not (samples == tokenizer.eos_token_id).any()
    again = sample_from_model(model, tokenizer, SampleOptions(nsamples, seqlen, seed=3))
    assert torch.equal(samples, again)
