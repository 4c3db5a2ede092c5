"""Data files as people have them: what is read, what is refused and how, and within what memory."""

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import MARKED, TEMPLATE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from slimgpt.data import chats, documents, records, tokenization
from slimgpt.data.datasets import BLANK_LINE, check_dataset, dataset_files, describe_dataset
from slimgpt.data.examples import IGNORED, training_examples
from slimgpt.data.samples import MAX_TOKENS, SampleOptions, calibration_tokens, evaluation_tokens
from slimgpt.data.self_generated import sample_from_model
from slimgpt.data.tokenization import tokenize
from slimgpt.errors import ConfigError, DataError, SlimGPTError

# Without the time, since the content is a part of a test's name.
compress = partial(gzip.compress, mtime=0)

CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "That makes five."},
]
RENDERED = (
    "<user>What is two and two?</s><assistant>It is four.</s>"
    "<user>And one?</s><assistant>That makes five.</s>"
)
TEXTS = [f"document number {i}" for i in range(9)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
# Each is a way to the tokens; the arguments ask for more text than a small file has.
USES: dict[str, Callable[[str, PreTrainedTokenizerFast], Any]] = {
    "calibration": lambda name, tokenizer: calibration_tokens(
        name, tokenizer, SampleOptions(2, 16)
    ),
    "evaluation": evaluation_tokens,
    "training": lambda name, tokenizer: training_examples(name, tokenizer, 16),
}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def zstd(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def parquet(path: Path, **columns: Any) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.jsonl", "\ufeff" + LINES),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
        ("a.jsonl", LINES.replace("\n", "\n\n  \n")),
        ("a.jsonl", LINES + '{"text": null}\n'),
        ("a.jsonl.gz", compress(LINES.encode())),
        ("a.jsonl.gz", compress(LINES[:50].encode()) + compress(LINES[50:].encode())),
        ("a.json", LINES),
        ("a.json", "\ufeff" + LINES),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=2)),
        ("a.json.gz", compress(json.dumps([{"text": text} for text in TEXTS]).encode())),
        ("a.txt", "\n\n".join(TEXTS)),
        ("a.txt", "\ufeff" + "\r\n\r\n".join(TEXTS)),
        ("a.txt.gz", compress("\n\n".join(TEXTS).encode())),
    ],
)
def test_forms_of_a_file_give_the_same_text(
    name: str, content: str | bytes, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write(tmp_path / name, content)
    check_dataset(file, "calibration")
    assert tokenizer.decode(evaluation_tokens(file, tokenizer)) == "\n\n".join(TEXTS)
    assert calibration_tokens(file, tokenizer, SampleOptions(2, 16)).shape == (2, 16)
    assert training_examples(file, tokenizer, 16)
    assert dataset_files(file) == [Path(file)]


def test_zstandard(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    packed = zstd(LINES[:50].encode()) + zstd(LINES[50:].encode())
    file = write(tmp_path / "a.jsonl.zst", packed)
    assert tokenizer.decode(evaluation_tokens(file, tokenizer)) == "\n\n".join(TEXTS)
    file = write(tmp_path / "b.jsonl.zst", packed[:-9])
    with pytest.raises(DataError, match=r"cannot read .*b.jsonl.zst: Truncated"):
        evaluation_tokens(file, tokenizer)


def test_directories(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "sub" / ".git").mkdir(parents=True)
    write(data / "b.jsonl", '{"text": "second"}')
    write(data / "a.txt", "first")
    write(data / "sub" / "c.json.gz", compress(b'[{"text": "third"}]'))
    for other in ("sub/.git/d.txt", ".e.txt", "README.md", "data.gz"):
        write(data / other, "not data")
    check_dataset(str(data), "calibration")
    text = tokenizer.decode(evaluation_tokens(str(data), tokenizer))
    assert text == "first\n\nsecond\n\nthird"
    names = [path.name for path in dataset_files(str(data))]
    assert names == ["a.txt", "b.jsonl", "c.json.gz"]
    assert describe_dataset(str(data) + "/", "evaluation") == "data (3 files)"


def test_names_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pydocs", "self", "c4"):
        assert dataset_files(name) == []
    Path("c4").mkdir()
    check_dataset("c4", "evaluation")
    write(Path("c4/a.txt"), "text")
    with pytest.raises(ConfigError, match="'c4' is a data set, and a local directory"):
        check_dataset("c4", "evaluation")
    check_dataset("./c4", "evaluation")
    assert dataset_files("./c4") == [Path("c4/a.txt")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "no data file gone.jsonl"),
        ("gone.jsonl.gz", "no data file gone.jsonl.gz"),
        ("known.csv", "the suffix '.csv' of the data file known.csv is not known"),
        ("known.tar.gz", "the suffix '.gz' of the data file"),
        ("known", "the suffix '' of the data file known is not known"),
        ("empty", "the directory empty has no data files"),
        ("gone", "unknown calibration data set 'gone'"),
        ("", "unknown calibration data set ''"),
        ("a\0b.txt", "no data file"),
        ("x" * 5000, "unknown calibration data set"),
        ("x" * 5000 + ".txt", "no data file"),
        ("\udc80.txt", "no data file"),
    ],
)
def test_bad_names(
    name: str,
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for known in ("known.csv", "known.tar.gz", "known"):
        Path(known).touch()
    with pytest.raises(ConfigError, match=message) as caught:
        check_dataset(name, "calibration")
    assert caught.value.hint
    with pytest.raises(SlimGPTError):
        evaluation_tokens(name, tokenizer)


DEEP = "[" * 100_000
GOOD = '{"text": "x"}\n'
BAD_FILES: list[tuple[str, str | bytes, str]] = [
    ("a.txt", b"caf\xe9 au lait", "a.txt is not UTF-8: invalid continuation byte at byte 3"),
    ("a.txt", b"\xff\xfea\0b\0", "a.txt is not UTF-8: invalid start byte at byte 0"),
    ("a.txt", b"x" * 300_000 + b"\xff", "not UTF-8: invalid start byte at byte 300000"),
    ("a.txt", b"ends in \xe2\x82", "not UTF-8: unexpected end of data at byte 8"),
    ("a.txt.gz", b"not gzip", "cannot read .*a.txt.gz: Not a gzipped file"),
    ("a.txt.gz", compress(b"text" * 99)[:-9], "cannot read .*ended before"),
    ("a.txt.gz", compress(b"text" * 99)[:-8] + b"\0" * 8, "cannot read .*CRC"),
    ("a.txt.zst", b"no zstandard, really", "cannot read .*ZSTD"),
    ("a.jsonl", "{broken", "cannot read .*a.jsonl, line 1: no JSON: .* at column 2"),
    ("a.jsonl", GOOD + "\n{broken", "line 3: no JSON"),
    ("a.jsonl", GOOD + '{"text": "unfinished', "line 2: no JSON: Unterminated string"),
    ("a.jsonl", GOOD + '{"text": "x"} {"text": "y"}', "line 2: no JSON: Extra data at column 15"),
    ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', "line 2 is not UTF-8: .* at byte 10"),
    ("a.jsonl", GOOD + DEEP, "line 2: nested too deep"),
    ("a.jsonl", GOOD + '{"text": ' + "9" * 5000 + "}", "line 2: Exceeds the limit"),
    ("a.jsonl", GOOD + "3", "line 2 is a number, not an object with a text"),
    ("a.jsonl", GOOD + "null", "line 2 is null, not an object"),
    ("a.jsonl", GOOD + '"text"', "line 2 is a string, not an object"),
    ("a.jsonl", GOOD + "[]", "line 2 is a list, not an object"),
    ("a.jsonl", GOOD + "NaN", "line 2 is a number"),
    ("a.jsonl", GOOD + "{}", "line 2 has no text field 'text'; it has: no field"),
    ("a.jsonl", GOOD + '{"body": "x"}', "line 2 has no text field 'text'; it has: body"),
    ("a.jsonl", '{"\\ud800": 1}', "line 1 has no text field 'text'"),
    ("a.jsonl", GOOD + '{"text": 3}', "line 2: 'text' is a number, not a string"),
    ("a.jsonl", GOOD + '{"text": true}', "line 2: 'text' is a boolean, not a string"),
    ("a.jsonl", GOOD + '{"text": {"a": 1}}', "line 2: 'text' is an object, not a string"),
    ("a.jsonl", GOOD + '{"text": ["x"]}', r"line 2: 'text\[1\]' is a string, not an object"),
    ("a.jsonl", GOOD + '{"text": "x \\ud83d"}', r"line 2: character 3 of 'text' is half of a surr"),
    ("a.jsonl", '{"instruction": 3, "output": "x"}', "line 1: 'instruction' is a number"),
    ("a.jsonl", '{"instruction": "x", "output": ["x"]}', "line 1: 'output' is a list"),
    ("a.jsonl", '{"instruction": "x", "input": 3, "output": "x"}', "line 1: 'input' is a number"),
    ("a.jsonl", '{"instruction": "\\udc00", "output": "x"}', "'instruction' is half of a surrog"),
    ("a.jsonl", '{"messages": "x", "text": 1}', "line 1: 'text' is a number, not a string"),
    ("a.jsonl", '{"messages": "x"}', "line 1: 'messages' is a string, not a list of turns"),
    ("a.jsonl", '{"messages": {"a": 1}}', "line 1: 'messages' is an object, not a list of turns"),
    ("a.jsonl", '{"messages": [3]}', r"line 1: 'messages\[1\]' is a number, not an object"),
    ("a.jsonl", '{"messages": [{"role": "user"}]}', r"messages\[1\] has no 'content'"),
    ("a.jsonl", '{"messages": [{"content": "x"}]}', r"messages\[1\] has no 'from'"),
    ("a.jsonl", '{"messages": [{"role": 1, "content": "x"}]}', "'messages.1..role' is a number"),
    ("a.jsonl", '{"messages": [{"role": "u", "content": null}]}', "content' is null, not a string"),
    ("a.jsonl", '{"messages": [{"role": "u", "content": "\\ud83d"}]}', "half of a surrogate pair"),
    ("a.jsonl", '{"conversations": [{"from": "human"}]}', r"conversations\[1\] has no 'value'"),
    ("a.jsonl", json.dumps({"messages": CHAT}), "line 1 is a chat, and the tokenizer has no chat"),
    ("a.jsonl.gz", compress(GOOD.encode() + b"{"), "a.jsonl.gz, line 2: no JSON"),
    ("a.json", "{broken", "a.json, line 1: no JSON: Expecting property name"),
    ("a.json", '[{"text": "x"},\n\n {"text" 3}]', "line 3: no JSON: Expecting ':'"),
    ("a.json", '[{"text": "x"}', "line 1: no JSON: ',' or ']' expected after a record"),
    ("a.json", '[{"text": "x"},]', "no JSON: Expecting value"),
    ("a.json", '[{"text": "x"}] 3', "no JSON: more text after the list"),
    ("a.json", '[{"text": "x"} {"text": "y"}]', "',' or ']' expected"),
    ("a.json", "[,]", "no JSON: Expecting value"),
    ("a.json", DEEP, "a.json, line 1: no JSON: nested too deep"),
    ("a.json", '{"a": ' * 100_000, "a.json, line 1: no JSON: nested too deep"),
    ("a.json", "[3]", "record 1 is a number, not an object"),
    ("a.json", '[{"text": "x"}, {"text": false}]', "record 2: 'text' is a boolean"),
    ("a.json", '{"data": []}', "record 1 has no text field 'text'; it has: data"),
    ("a.json", b'[{"text": "\xff"}]', "a.json is not UTF-8: .* at byte 11"),
    ("a.json", GOOD + '{"text": "\\ud83d"}', "record 2: character 1 of 'text' is half"),
    ("a.parquet", "no parquet", "cannot read .*a.parquet"),
    ("a.parquet", "", "cannot read .*a.parquet"),
    ("a.parquet", b"PAR1" + b"\xff" * 99 + b"PAR1", "cannot read .*a.parquet"),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named(
    use: str,
    name: str,
    content: str | bytes,
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    if records.needs_pyarrow(Path(name)):
        pytest.importorskip("pyarrow")
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        USES[use](file, tokenizer)
    assert caught.value.hint
    str(caught.value).encode()  # can be printed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*documents.FIELDS, "role", "content", "from", "value", "x"]), inner
        )
    ),
    max_leaves=8,
)


@settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(values=st.lists(JSON, min_size=1, max_size=3), is_list=st.booleans())
def test_any_json_is_documents_or_an_error(
    values: list[Any], is_list: bool, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = "\n".join(json.dumps(value) for value in values)
    files = [write(tmp_path / "a.jsonl", lines), write(tmp_path / "a.json", lines)]
    if is_list:
        files = [write(tmp_path / "a.json", json.dumps(values))]
    for file in files:
        for use in USES.values():
            error = None
            try:
                use(file, chat_tokenizer)
            except DataError as err:
                error = err
            assert error is None or (error.hint and file in str(error))


def test_null_texts_are_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    null = '{"text": null}\n{"messages": null}\n{"instruction": "x", "output": null}\n'
    (tmp_path / "d").mkdir()
    for name in ("a.jsonl", "b.json"):
        write(tmp_path / "d" / name, null + LINES + null)
    text = tokenizer.decode(evaluation_tokens(str(tmp_path / "d"), tokenizer))
    assert text == "\n\n".join(TEXTS + TEXTS)
    (warning,) = caplog.messages
    assert warning.startswith("12 records of ")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"text": None, "messages": CHAT},
        {
            "conversations": [
                {
                    "from": {"user": "human", "assistant": "gpt"}[turn["role"]],
                    "value": turn["content"],
                }
                for turn in CHAT
            ]
        },
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_chats_are_in_the_models_template(
    record: dict[str, Any], suffix: str, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = str(tmp_path / f"a{suffix}")
    if suffix == ".parquet":
        parquet(Path(file), **{key: [value, value] for key, value in record.items()})
    else:
        write(Path(file), 2 * (json.dumps(record) + "\n"))
    text = f"<s>{RENDERED}"  # this tokenizer adds no BOS itself
    assert chat_tokenizer.decode(evaluation_tokens(file, chat_tokenizer)) == f"{text}\n\n{text}"
    drawn = chat_tokenizer.decode(calibration_tokens(file, chat_tokenizer, SampleOptions(1, 64))[0])
    assert drawn in f"{text}\n\n{text}\n\n"


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_assistants_turns_are_trained_on(
    template: str, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat_tokenizer.chat_template = template
    questions = {"messages": [CHAT[0]]}  # nothing to learn from
    file = write(
        tmp_path / "a.jsonl", json.dumps({"messages": CHAT}) + "\n" + json.dumps(questions)
    )
    (example,) = training_examples(file, chat_tokenizer, 256)
    assert chat_tokenizer.decode(example["input_ids"]) == f"<s>{RENDERED}"
    learned = [label for label in example["labels"] if label != IGNORED]
    assert chat_tokenizer.decode(learned) == "It is four.</s>That makes five.</s>"
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    assert all(label in (token, IGNORED) for token, label in pairs)


def test_a_template_that_refuses_is_named(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT}))
    for template in ("{{ raise_exception('only one turn') }}", "{{ 1 + 'a' }}", "{% broken"):
        chat_tokenizer.chat_template = template
        with pytest.raises(DataError, match=r"chat template does not take .*a.jsonl, line 1"):
            evaluation_tokens(file, chat_tokenizer)


def test_a_rendered_bos_is_not_doubled(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenization, is_answer = chats.chat_tokens(CHAT, chat_tokenizer, "here")
    assert tokenization.count(chat_tokenizer.bos_token_id) == 1
    assert len(tokenization) == len(is_answer)


def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: merges over the whole text, a space in front, and a BOS token."""
    from pydoc_data.topics import topics

    from tokenizers.processors import TemplateProcessing

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.decoder = decoders.Replace("▁", " ")
    trained.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"])
    trained.train_from_iterator([topics[key][:2000] for key in sorted(topics)][:20], trainer)
    trained.pre_tokenizer = None  # type: ignore[assignment]
    trained.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "sentences"])
@pytest.mark.parametrize("piece", [700, 1111, 5000])
def test_pieces_give_the_tokens_of_the_whole(
    kind: str, piece: int, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydoc_data.topics import topics

    chosen = tokenizer if kind == "bytes" else sentence_tokenizer()
    odd = "=" * 1500 + "\n" * 900 + " " * 800 + "é漢字🙂" * 400 + "aaaa" * 300 + "<s>"
    text = "\n\n".join([topics[key] for key in sorted(topics)][:12])[:30_000]
    text = text[:9000] + odd + text[9000:]
    monkeypatch.setattr(tokenization, "PIECE", piece)
    monkeypatch.setattr(tokenization, "OVERLAP", 500)
    parts = [text[i : i + 333] for i in range(0, len(text), 333)]
    joined = [token for some in tokenize(parts, chosen) for token in some]
    assert joined == chosen(text).input_ids


def test_small_files_are_drawn_as_ever(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The plain algorithm: shuffle all, tokenise until there is enough, choose among windows."""
    texts = [f"text {i}: " + "word " * (i % 7) + "\n" * (i % 3) for i in range(300)] + ["", " \n"]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    for seed in (0, 3):
        shuffled = [text for text in texts if text.strip()]
        random.Random(seed).shuffle(shuffled)
        stream: list[int] = []
        for text in shuffled:
            stream += tokenizer(text + BLANK_LINE).input_ids
            if len(stream) >= 10 * 16:
                break
        windows = torch.tensor(stream[: len(stream) // 16 * 16]).view(-1, 16)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        drawn = calibration_tokens(file, tokenizer, SampleOptions(10, 16, seed))
        assert torch.equal(drawn, windows[order[:10]])


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl.gz"])
def test_of_a_large_file_a_part_is_in_memory(
    suffix: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydoc_data.topics import topics

    monkeypatch.setattr("slimgpt.data.samples.SHUFFLED_CHARACTERS", 2**22)
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 2**16)
    monkeypatch.setattr(tokenization, "PIECE", 2**14)
    text = "\n\n".join(topics[key] for key in sorted(topics))[:50_000]
    content = text * 800
    if "json" in suffix:
        content = (json.dumps({"text": text}) + "\n") * 800
    packed = content.encode()
    file = write(
        tmp_path / f"a{suffix}", gzip.compress(packed, 1) if suffix.endswith(".gz") else packed
    )
    del content, packed
    tracemalloc.start()
    try:
        assert calibration_tokens(file, tokenizer, SampleOptions(4, 64)).shape == (4, 64)
        assert evaluation_tokens(file, tokenizer, 256).shape == (256,)
        assert len(training_examples(file, tokenizer, 64, max_examples=4)) == 4
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60 * 2**20  # of a text of 40 MB; its tokens as a list take ten times as much


def test_a_long_line_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD", 2**20)
    line = b'{"text": "' + b"x" * (3 * 2**20)
    for name in ("a.jsonl.gz", "a.json.gz"):
        file = write(tmp_path / name, gzip.compress(line))
        with pytest.raises(DataError, match=r"line 1,? is longer than 1 MiB"):
            evaluation_tokens(file, tokenizer)


def test_records_without_text_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_WITHOUT_TEXT", 100)
    for value in ("null", '""'):
        file = write(tmp_path / "a.jsonl", f'{{"text": {value}}}\n' * 200)
        with pytest.raises(DataError, match=r"100 records up to .* have no text"):
            calibration_tokens(file, tokenizer, SampleOptions(1, 16))


def test_parquet_bombs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    value = "word " * 200_000  # a million characters, which the file has once
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 50_000, pyarrow.int32()), pyarrow.array([value])
    )
    file = parquet(tmp_path / "a.parquet", text=column)
    assert Path(file).stat().st_size < 2**20
    assert evaluation_tokens(file, tokenizer, 64).shape == (64,)
    assert pyarrow.default_memory_pool().max_memory() < 3 * records.MAX_ROW_GROUP
    monkeypatch.setattr(records, "MAX_ROW_GROUP", 2**10)
    with pytest.raises(DataError, match=r"row group 0 of .*GiB"):
        evaluation_tokens(file, tokenizer, 64)


def test_parquet_of_other_types(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    columns = {
        r"record 1: 'text' is a number": {"text": [3]},
        r"record 1: 'text' is an object": {"text": [{"a": {"b": [1]}}]},
        r"record 1: 'text\[1\]' is a list": {"text": [[["x"]]]},
        r"record 1: 'text' is a bytes": {"text": [b"x"]},
        r"record 1 has no text field 'text'; it has: body": {"body": ["x"]},
        r"cannot read .*a.parquet: .*utf-8": {"text": bad},
    }
    for message, values in columns.items():
        file = parquet(tmp_path / "a.parquet", **values)
        with pytest.raises(DataError, match=message):
            evaluation_tokens(file, tokenizer)
    file = parquet(tmp_path / "a.parquet", text=["x", None, "y"], other=[1, 2, 3])
    assert tokenizer.decode(evaluation_tokens(file, tokenizer)) == "x\n\ny"


@pytest.mark.parametrize("text_field", ["gone", "a.b", "", "\udc80", "messages", "x" * 9999])
def test_odd_text_fields(
    text_field: str, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", '{"instruction": "x", "messages": 3}')
    with pytest.raises(DataError) as caught:
        evaluation_tokens(file, chat_tokenizer, text_field=text_field)
    assert file in str(caught.value)
    str(caught.value).encode()


def test_numbers_that_do_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    for nsamples, seqlen in ((10**6, 10**6), (10**30, 2), (1, MAX_TOKENS + 1)):
        with pytest.raises(DataError, match=f"at most {MAX_TOKENS} can be used"):
            calibration_tokens("pydocs", tokenizer, SampleOptions(nsamples, seqlen))
    whole = evaluation_tokens("pydocs", tokenizer)
    assert torch.equal(evaluation_tokens("pydocs", tokenizer, max_tokens=10**30), whole)


def test_models_that_write_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    from conftest import make_tiny_model

    from slimgpt.errors import NumericalError

    model = make_tiny_model("llama")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NumericalError, match="not finite in float32") as caught:
        sample_from_model(model, tokenizer, SampleOptions(1, 8))
    assert "--dtype float32" in str(caught.value.hint)
    with pytest.raises(DataError, match="at most"):
        sample_from_model(model, tokenizer, SampleOptions(10**9, 10**9))
