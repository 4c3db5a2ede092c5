"""Tasks of lm-eval: local files are read as the hub's data would be, and scores are right."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from transformers import PreTrainedTokenizerFast

import slimgpt
from slimgpt.errors import ConfigError, DataError, MissingDependencyError, SlimGPTError
from slimgpt.evaluation import tasks
from slimgpt.evaluation.local_tasks import find_split
from slimgpt.evaluation.tasks import Score, TaskSet, load_tasks

pytest.importorskip("lm_eval")

PIQA = [
    {"goal": "boil water", "sol1": "heat it up", "sol2": "cool it down a lot", "label": 0},
    {"goal": "cut paper", "sol1": "use a spoon", "sol2": "use scissors", "label": 1},
    {"goal": "dry a towel", "sol1": "hang it in the sun", "sol2": "put it in a lake", "label": 0},
]
HELLASWAG = {
    "activity_label": "Cooking",
    "ctx_a": "A man cooks.",
    "ctx_b": "he",
    "endings": ["eats.", "[step] sleeps.", "runs.", "sings."],
    "label": 2,
}
FILES: dict[str, list[dict[str, Any]]] = {
    "piqa_valid.jsonl": PIQA,
    "boolq_validation.jsonl": [{"question": "is it", "passage": "It is.", "answer": True}],
    "hellaswag_val_1_row.jsonl": [HELLASWAG],
    "winogrande_xl_validation.jsonl": [
        {"sentence": "Ann met Bea and _ left.", "option1": "Ann", "option2": "Bea", "answer": "2"}
    ],
    "ARC-Easy-Test.jsonl": [
        {
            "question": "What melts?",
            "choices": {"text": ["ice", "fire", "air"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        }
    ],
    "openbookqa_test.jsonl": [
        {
            "question_stem": "Fog is likely",
            "choices": {"text": ["in a marsh", "in a desert"], "label": ["A", "B"]},
            "answerKey": "A",
        }
    ],
}
SUBJECTS = {"astronomy": "stem", "anatomy": "stem", "marketing": "other"}


def run_tasks(found: TaskSet, model: Any, tokenizer: Any, **options: Any) -> list[Score]:
    return [s for scores in tasks.run_tasks(found, model, tokenizer, **options) for s in scores]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for name, rows in FILES.items():
        write_rows(tmp_path / "data" / name, rows)
    for index, subject in enumerate(SUBJECTS):
        for split, num in (("dev", 5), ("test", 3 + 4 * index)):
            file = tmp_path / "data" / "mmlu" / split / f"{subject}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [f'"{split} {i}, why?",0,4,None,"0,1",{"ABCD"[i % 4]}\n' for i in range(num)]
            file.write_text("".join(lines), encoding="utf-8")
    return tmp_path / "data"


def rendered(task: Any) -> list[tuple[Any, Any, Any]]:
    return [
        (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc))
        for doc in task.eval_docs
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("boolq", ("It is.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1)),
        (
            "hellaswag",
            ("Cooking: A man cooks. He", ["eats.", " sleeps.", "runs.", "sings."], 2),
        ),
        ("winogrande", (1, ["Ann met Bea and Ann", "Ann met Bea and Bea"], "left.")),
        ("arc_easy", ("Question: What melts?\nAnswer:", ["ice", "fire", "air"], 0)),
        ("openbookqa", ("Fog is likely", ["in a marsh", "in a desert"], 0)),
        ("mmlu_astronomy", ("test 0, why?\nA. 0\nB. 4\nC. None\nD. 0,1\nAnswer:", list("ABCD"), 0)),
    ],
)
def test_local_files_render_as_lm_eval_writes_prompts(
    data_dir: Path, name: str, expected: tuple[Any, Any, Any]
) -> None:
    task = load_tasks([name], data_dir).tasks[name]
    assert rendered(task)[0] == expected


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("boolq", "boolq_validation.jsonl", {"question": "is it", "passage": "It is.", "label": 1}),
        (
            "hellaswag",
            "hellaswag_val.json",
            HELLASWAG | {"label": "2"},
        ),
        (
            "mmlu_astronomy",
            "astronomy_test.jsonl",
            {"question": "test 0, why?", "choices": ["0", "4", "None", "0,1"], "answer": 0},
        ),
    ],
)
def test_layout_of_the_hub_gives_the_same_prompts(
    data_dir: Path, tmp_path: Path, name: str, file: str, row: dict[str, Any]
) -> None:
    path = tmp_path / "hub" / file
    write_rows(path, [row])
    if path.suffix == ".json":
        path.write_text(json.dumps([row]), encoding="utf-8")
    ours = rendered(load_tasks([name], data_dir).tasks[name])
    assert rendered(load_tasks([name], path.parent).tasks[name]) == ours[:1]


def log_likelihoods(model: Any, tokenizer: Any, prompt: str, answers: list[str]) -> list[float]:
    start = len(tokenizer(prompt).input_ids)
    sums = []
    for answer in answers:
        tokens = torch.tensor(tokenizer(f"{prompt} {answer}").input_ids)
        log_probs = model(tokens[None]).logits[0].log_softmax(-1)
        picked = log_probs[:-1].gather(1, tokens[1:, None])[start - 1 :]
        sums.append(float(picked.sum()))
    return sums


def test_commonsense(
    data_dir: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The score of a task is that of brute force; the mean is of the tasks that have data."""
    model = make_tiny_model("llama")
    found = load_tasks(["piqa", "commonsense"], data_dir)
    assert "left out" in caplog.text
    assert "arc_challenge" in caplog.text
    *scores, mean = run_tasks(found, model, tokenizer)
    correct = []
    for row in PIQA:
        answers = [row["sol1"], row["sol2"]]
        sums = log_likelihoods(model, tokenizer, f"Question: {row['goal']}\nAnswer:", answers)
        per_byte = [s / len(a.encode()) for s, a in zip(sums, answers, strict=True)]
        correct.append(float(per_byte.index(max(per_byte)) == row["label"]))
    expected = sum(correct) / 3
    variance = sum((c - expected) ** 2 for c in correct) / 2
    piqa = scores[0]
    assert (piqa.task, piqa.metric, piqa.num_docs, piqa.num_fewshot) == ("piqa", "acc_norm", 3, 0)
    assert piqa.value == pytest.approx(expected)
    assert piqa.stderr == pytest.approx(math.sqrt(variance / 3))
    assert piqa.data == "piqa_valid.jsonl"

    assert len(scores) == 6
    assert mean.value == pytest.approx(sum(score.value for score in scores) / 6)
    assert (mean.task, mean.data, mean.num_docs) == ("commonsense", "6 of 7 tasks", 8)


def test_mmlu_is_5_shot_with_means_by_size(
    data_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = load_tasks(["mmlu"], data_dir)
    model = make_tiny_model("llama")
    model.config.max_position_embeddings = 2048
    scores = {s.task: s for s in run_tasks(found, model, tokenizer, limit=9)}
    prompt = found.tasks["mmlu_marketing"].instances[0].args[0]
    assert prompt.count("Answer:") == 6
    assert prompt.index("dev 0, why?") < prompt.index("dev 4, why?") < prompt.index("test 0, why?")
    assert set(scores) == {f"mmlu_{s}" for s in SUBJECTS} | {"mmlu_stem", "mmlu_other", "mmlu"}
    assert [scores[f"mmlu_{subject}"].num_docs for subject in SUBJECTS] == [3, 7, 9]
    total = sum(scores[f"mmlu_{s}"].value * scores[f"mmlu_{s}"].num_docs for s in SUBJECTS)
    assert scores["mmlu"].value == pytest.approx(total / 19)
    assert scores["mmlu_stem"].data == "2 of 19 tasks"
    assert scores["mmlu"].num_fewshot == 5


@pytest.mark.parametrize("names", [("mmlu_astronomy", "mmlu"), ("mmlu", "mmlu_astronomy")])
def test_shots_of_a_suite_do_not_depend_on_the_order(
    data_dir: Path, names: tuple[str, str]
) -> None:
    found = load_tasks(names, data_dir)
    assert {task.config.num_fewshot for task in found.tasks.values()} == {5}


def test_number_of_shots_can_be_set(data_dir: Path) -> None:
    task = load_tasks(["mmlu"], data_dir, num_fewshot=0).tasks["mmlu_anatomy"]
    assert task.config.num_fewshot == 0
    with pytest.raises(DataError, match=r"no train split of piqa"):
        load_tasks(["piqa"], data_dir, num_fewshot=2)


@pytest.mark.parametrize(
    "name",
    ["piqa_train.jsonl", "piqa2_valid.jsonl", "my_piqa_valid.jsonl", "piqa_fr_valid.jsonl"],
)
def test_other_files_are_not_taken(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, PIQA)
    assert find_split(tmp_path, "piqa", None, "validation") is None


def test_two_files_for_one_split(data_dir: Path) -> None:
    write_rows(data_dir / "copy" / "piqa-validation.jsonl", PIQA)
    with pytest.raises(DataError, match="more than one file fits the validation split of piqa"):
        load_tasks(["piqa"], data_dir)


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        ("piqa", "piqa_valid.jsonl", {"label": None}, "question 4 has the answer"),
        ("piqa", "piqa_valid.jsonl", {"label": 2}, "question 4 has the answer 2, none of its 2"),
        ("piqa", "piqa_valid.jsonl", {"label": -1}, "question 4 has the answer -1"),
        ("winogrande", "winogrande_xl_validation.jsonl", {"answer": ""}, "question 2 cannot be"),
    ],
)
def test_questions_without_an_answer(
    data_dir: Path, name: str, file: str, row: dict[str, Any], message: str
) -> None:
    write_rows(data_dir / file, [*FILES[file], FILES[file][0] | row])
    with pytest.raises(DataError, match=message):
        load_tasks([name], data_dir)


def test_unlabelled_data(data_dir: Path) -> None:
    rows = [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in PIQA]
    write_rows(data_dir / "piqa_valid.jsonl", rows)
    with pytest.raises(DataError, match="question 1 has the answer 'label'"):
        load_tasks(["piqa"], data_dir)


def test_code_from_elsewhere_is_not_run() -> None:
    import evaluate

    with pytest.raises(ConfigError, match="runs what the model writes"):
        load_tasks(["humaneval"])
    load = evaluate.load
    with tasks._no_code_from_the_hub(), pytest.raises(ConfigError, match="'rouge' is code"):
        evaluate.load("rouge")
    assert evaluate.load is load


def test_prompts_that_do_not_fit_are_counted(
    data_dir: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model("llama", max_position_embeddings=16)
    run_tasks(load_tasks(["piqa"], data_dir), model, tokenizer)
    assert "prompts did not fit into the model's 16 tokens" in caplog.text


def test_mistakes(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no task 'comonsense'") as unknown:
        load_tasks(["comonsense"], data_dir)
    assert "did you mean 'commonsense'?" in str(unknown.value.hint)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tasks(["piqa"], tmp_path / "nowhere")
    with pytest.raises(DataError, match="no test split of arc_challenge") as missing:
        load_tasks(["arc_challenge", "piqa"], data_dir)
    assert "arc_challenge_test*" in str(missing.value.hint)
    write_rows(data_dir / "openbookqa_test.jsonl", PIQA)
    with pytest.raises(DataError, match=r"cannot load the task openbookqa from .*'choices' is"):
        load_tasks(["openbookqa"], data_dir)
    (data_dir / "winogrande_xl_validation.jsonl").unlink()
    rows = "sentence,option1,option2,answer\nAnn met Bea and _ left.,Ann,Bea,2\n"
    (data_dir / "winogrande_xl_validation.csv").write_text(rows, encoding="utf-8")
    with pytest.raises(DataError, match="only the files of MMLU"):
        load_tasks(["winogrande"], data_dir)
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="lm-eval"):
        load_tasks(["piqa"], data_dir)


ROW = json.dumps(PIQA[0])
HALF = json.dumps(PIQA[0] | {"goal": "\ud83d"})
BOOLQ = '{"question": "is it", "passage": "It is."}'
BAD_FILES = [
    ("piqa", "piqa_valid.jsonl", f"{ROW}\n[1]\n", "line 2 is a list, not a row"),
    ("piqa", "piqa_valid.jsonl", f'{ROW}\n{{"goal": "a"}}\n', "line 2 lacks the field 'sol1'"),
    ("piqa", "piqa_valid.jsonl", HALF, "line 1 has half of a surrogate pair"),
    ("piqa", "piqa_valid.jsonl", "", "piqa_valid.jsonl has no rows"),
    ("boolq", "boolq_validation.jsonl", BOOLQ, "line 1 lacks the field 'answer'"),
    (
        "boolq",
        "boolq_validation.jsonl",
        BOOLQ.replace("}", ', "answer": "maybe"}'),
        "line 1 has the answer 'maybe', which is none",
    ),
    (
        "boolq",
        "boolq_validation.jsonl",
        BOOLQ.replace("}", ', "answer": null}'),
        "line 1 has the answer None, which is none",
    ),
    ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", "why?,0,1,A\n", "row 1 has 4 columns, not 6"),
    ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", "why?,0,1,2,3,E\n", "row 1 has the answer 'E'"),
    ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", "", "anatomy_test.csv has no rows"),
    (
        "mmlu_anatomy",
        "mmlu/test/anatomy_test.csv",
        'a,0,1,2,3,A\n"b"c,0,1,2,3,A\n',
        "cannot read .*anatomy_test.csv, after row 1: ",
    ),
    ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", b"\xff,0,1,2,3,A\n", "after row 0: 'utf-8'"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD_FILES)
def test_bad_files(
    data_dir: Path, name: str, file: str, content: str | bytes, message: str
) -> None:
    is_text = isinstance(content, str)
    (data_dir / file).write_bytes(content.encode() if is_text else content)
    with pytest.raises(DataError, match=message) as error:
        load_tasks([name], data_dir)
    assert error.value.hint


def test_groups_that_change_their_tasks() -> None:
    with pytest.raises(ConfigError, match="'mmlu_continuation' changes the tasks in it") as error:
        tasks.check_tasks(["mmlu_continuation"])
    assert error.value.hint == "name its tasks one by one"


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (ConnectionError("no network"), DataError, "piqa from the hub .*: no network"),
        (ImportError("no module"), MissingDependencyError, r"piqa' needs the package 'lm-eval"),
    ],
)
def test_data_that_cannot_be_had(
    raised: Exception, error: type[SlimGPTError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(error, match=message) as found:
        load_tasks(["piqa"])
    assert found.value.hint


@pytest.mark.parametrize(
    ("against", "ends_in_run", "expected"),
    [
        (False, 2, [("piqa", None)]),
        (True, 3, [("piqa", "base")]),
        (True, 4, [("piqa", "base"), ("winogrande", None)]),
    ],
    ids=["alone", "second-task", "second-task-of-the-base"],
)
def test_scores_are_kept_when_a_later_task_fails(
    against: bool,
    ends_in_run: int,
    expected: list[tuple[str, str | None]],
    data_dir: Path,
    slim_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, base = tmp_path / "slim", tmp_path / "base"
    for directory in (model, base):
        shutil.copytree(slim_checkpoint("llama"), directory)
    run_task, runs = tasks._run_task, []

    def fail(*args: Any) -> list[Score]:
        runs.append(args)
        if len(runs) == ends_in_run:
            raise MemoryError
        return run_task(*args)

    monkeypatch.setattr(tasks, "_run_task", fail)
    options = {"tasks": ["piqa", "winogrande"], "data_dir": data_dir, "limit": 1, "data": ()}
    with pytest.raises(MemoryError) as error:
        slimgpt.evaluate(str(model), **options | ({"against": str(base)} if against else {}))
    kept = json.loads((model / "eval" / "tasks.json").read_text())
    found = list(dict.fromkeys((score["task"], score["base"]) for score in kept))
    assert found == expected
    assert [asdict(score) for score in vars(error.value)["measured"].tasks] == kept
