"""Distillation: the loss, the stored predictions, and what a run keeps, resumes and refuses."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, make_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState

import slimgpt
from slimgpt.config import RecoverConfig
from slimgpt.errors import ConfigError, DataError, RunStateError
from slimgpt.models.loading import load_config
from slimgpt.models.source import find_model
from slimgpt.recovery import recover, teacher, trainer
from slimgpt.recovery.methods.registry import RECOVERY_METHODS
from slimgpt.recovery.teacher import TopK, divergence, top_k
from slimgpt.runtime.run_directory import STATE_DIR

OPTIONS: dict[str, Any] = {
    "method": "distill",
    "data": (TEXT, "self"),
    "tokens": 12 * 32,
    "seqlen": 32,
    "eval_data": "pydocs",
    "eval_tokens": 4 * 32,
    "eval_steps": 2,
    "batch_size": 2,
    "learning_rate": 3e-3,
    "device": "cpu",
    "dtype": "float32",
}

FULL: dict[str, Any] = {"method": "full", "micro_batch_size": 1}

VOCABULARY = 320

STEPS = 6

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def slim(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "slim"
    base = str(tiny_checkpoint("llama"))
    slimgpt.prune(base, output, ratio=0.4, calibration=TEXT, nsamples=4, seqlen=32)
    return output


@pytest.fixture
def distill(
    slim: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    def run(output: str = "out", model: Path = slim, **options: Any) -> dict[str, Any]:
        given = OPTIONS | {"teacher": str(tiny_checkpoint("llama"))} | options
        return slimgpt.recover(str(model), tmp_path / output, **given).report

    return run


@pytest.fixture(scope="module")
def whole(
    slim: Path, tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The result of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return slimgpt.recover(
        str(slim), output, **OPTIONS, teacher=str(tiny_checkpoint("llama"))
    ).output


def read_recovery(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "recovery_report.json").read_text(encoding="utf-8"))


def weights(directory: Path) -> Weights:
    return load_file(directory / "model.safetensors")


def are_equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Interrupted(BaseException):
    """Ends a run as abruptly as a signal does, as far as its files are concerned."""


def interrupt(*_: Any, **__: Any) -> None:
    raise Interrupted


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 12), data=st.data())
def test_loss_is_the_divergence_with_the_rest_as_one_token(
    seed: int, size: int, data: st.DataObject
) -> None:
    """Against sums over the tokens, in float64; at most the whole divergence, for K = V equal."""
    k = data.draw(st.integers(1, size + 2))
    generator = torch.Generator().manual_seed(seed)
    scale = data.draw(st.sampled_from([0.1, 1.0, 30.0]))
    dense, model = (
        scale * torch.randn(3, size, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    target = top_k(dense, k)
    loss = divergence(target, model)
    p, q = dense.softmax(-1), model.softmax(-1)
    whole = (p * (p.log() - q.log())).sum(-1)
    for row in range(3):
        kept = p[row].argsort(descending=True)[:k].tolist()
        others = [token for token in range(size) if token not in kept]
        assert target.ids[row].tolist() == kept
        expected = sum(float(p[row, i] * (p[row, i] / q[row, i]).log()) for i in kept)
        if others:
            rest_p, rest_q = p[row, others].sum(), q[row, others].sum()
            expected += float(rest_p * (rest_p / rest_q).log())
        assert float(loss[row]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (loss <= whole + 1e-9).all()
    if k >= size:
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("k", [3, 8])
def test_gradient_is_that_of_the_sums(k: int) -> None:
    """The model's probability less the teacher's, which the rest has in the model's proportions."""
    dense, model = torch.randn(5, 8), torch.randn(5, 8, requires_grad=True)
    target = top_k(dense, k)
    divergence(target, model).sum().backward()
    p, q = dense.softmax(-1), model.detach().softmax(-1)
    is_kept = torch.zeros(5, 8, dtype=torch.bool).scatter(-1, target.ids, True)
    rest_p, rest_q = (x.masked_fill(is_kept, 0).sum(-1, keepdim=True) for x in (p, q))
    expected = q - torch.where(is_kept, p, q * rest_p / rest_q)
    torch.testing.assert_close(model.grad, expected, rtol=1e-4, atol=1e-6)


def test_rest_without_probability_costs_nothing() -> None:
    """A teacher that is certain: the rest underflows in the stored type."""
    dense, model = torch.tensor([[0.0, -1e5, -1e5]]), torch.zeros(1, 3, requires_grad=True)
    exact = top_k(dense, 1)
    loss = divergence(TopK(exact.ids, exact.log_probs.half(), exact.log_rest.half()), model)
    assert loss.item() == pytest.approx(math.log(3))
    loss.sum().backward()
    assert model.grad is not None
    assert model.grad.isfinite().all()


@pytest.mark.parametrize(("k", "wide"), [(3, False), (3, True), (1000, False)])
def test_stored_predictions_are_the_teachers(
    k: int, wide: bool, slim: Path, distill: Callable[..., Any], tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[Any] = []
    monkeypatch.setattr(recover, "_train", lambda job, data, _: seen.append(data) or interrupt())
    monkeypatch.setattr(teacher, "FILE_TOKENS", 5 * 32)
    if wide:
        monkeypatch.setattr(teacher, "SMALL_VOCABULARY", 100)
    with pytest.raises(Interrupted):
        distill(top_k=k)
    (data,) = seen
    dense = slimgpt.models.loading.load_model(find_model(str(tiny_checkpoint("llama"))))
    files = sorted((tmp_path / "out" / STATE_DIR).glob("logits-training-*.safetensors"))
    assert [len(load_file(file)["ids"]) for file in files] == [5, 5, 2]
    stored = load_file(files[0])
    assert stored["ids"].dtype == (torch.int32 if wide else torch.uint16)
    assert stored["log_probs"].dtype == stored["log_rest"].dtype == torch.float16
    assert (len(data.train), len(data.held_out)) == (12, 4)
    assert data.seconds > 0
    for row in (data.train[0], data.train[7], data.held_out[3]):
        with torch.no_grad():
            expected = top_k(dense(row["input_ids"][None]).logits[0, :-1], k)
        assert row["ids"].shape == (31, min(k, VOCABULARY))
        for name, tensor in expected._asdict().items():
            if name == "ids":
                assert torch.equal(row[name], tensor)
            else:
                torch.testing.assert_close(row[name], tensor, rtol=1e-3, atol=1e-3)


def test_text_is_half_the_models_own(
    slim: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover, "_train", interrupt)
        with pytest.raises(Interrupted):
            distill(tokens=13 * 32)
    state = tmp_path / "out" / STATE_DIR
    drawn, own = (load_file(state / f"{n}.safetensors") for n in ("text-0", "generated"))
    assert (drawn["tokens"].shape, own["tokens"].shape) == ((6, 32), (7, 32))
    words = Path(TEXT).read_text()
    tokenizer = slimgpt.models.tokenizer.load_tokenizer(find_model(str(slim)))
    assert tokenizer.decode(drawn["tokens"][0][1:-1]) in words
    assert tokenizer.decode(own["tokens"][0][1:]) not in words


def test_divergence_falls_and_embeddings_stay(
    slim: Path, distill: Callable[..., Any], tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """The held-out divergence is that of `slimgpt eval`, where all tokens are stored."""
    report = distill(tokens=96 * 32, top_k=VOCABULARY, eval_steps=16)
    curve = report["held_out_kl"]
    assert [step for step, _ in curve] == [0, 16, 32, 48]
    assert report["tokens"] == 96 * 32
    assert report["best_step"] == 48
    for directory, (_, kl) in ((slim, curve[0]), (tmp_path / "out", curve[-1])):
        (measured,) = slimgpt.evaluate(
            str(directory), data="pydocs", max_tokens=4 * 32, seqlen=32,
            against=str(tiny_checkpoint("llama")),
        ).perplexity  # fmt: skip
        assert kl == pytest.approx(measured.kl_divergence, rel=2e-3)
    assert curve[-1][1] < 0.9 * curve[0][1]
    before, after = weights(slim), weights(tmp_path / "out")
    kept = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"}
    assert f"{curve[0][1]:.4f} before" in (tmp_path / "out" / "README.md").read_text()
    assert "(3,072 tokens)" in (tmp_path / "out" / "README.md").read_text()


def test_fewer_stored_tokens_train_alike(
    slim: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    """The bound is close: with a fifth of the vocabulary, the whole divergence falls as well."""
    few, all_of_them = (
        distill(str(k), tokens=32 * 32, top_k=k, eval_steps=16) for k in (64, VOCABULARY)
    )
    for report in (few, all_of_them):
        (_, first), *_, (_, last) = report["held_out_kl"]
        assert last < 0.97 * first
    assert few["held_out_kl"][0][1] < all_of_them["held_out_kl"][0][1]


def test_adapters_are_trained_on_request(
    slim: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    report = distill(adapters=True, rank=4, tokens=32 * 32, eval_steps=8, dropout=0)
    curve = dict(report["held_out_kl"])
    assert min(curve.values()) < curve[0]
    before, after = weights(slim), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 4 * 7
    assert all(name.endswith("_proj.weight") for name in changed)


def test_a_worse_model_is_not_returned(
    slim: Path, distill: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = distill(learning_rate=10.0)
    assert report["best_step"] == 0
    assert min(kl for _, kl in report["held_out_kl"][1:]) > report["held_out_kl"][0][1]
    assert "has not lowered the held-out KL divergence" in caplog.text
    assert are_equal(weights(slim), weights(tmp_path / "out"))
    assert "so the weights are those before it" in (tmp_path / "out" / "README.md").read_text()


def test_the_best_step_is_returned_and_training_ends_early(
    distill: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divergences are made up: the second evaluation is the best one."""
    measure = iter([3.0, 2.0, 1.0, *[1.5] * 99])
    monkeypatch.setattr(
        "slimgpt.recovery.methods.distill._mean_divergence", lambda _: {"kl": next(measure)}
    )
    monkeypatch.setattr(trainer, "PATIENCE", 3)
    saved: dict[int, Weights] = {}
    save = trainer.RecoveryTrainer._save_checkpoint

    def keep(self: Any, *args: Any) -> None:
        save(self, *args)
        file = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}/model.safetensors")
        saved[self.state.global_step] = load_file(file)
        assert len(list(file.parent.parent.glob("checkpoint-*"))) <= 2

    monkeypatch.setattr(trainer.RecoveryTrainer, "_save_checkpoint", keep)
    with monkeypatch.context() as patch:  # killed after the training, it does not train more
        patch.setattr(recover, "_write", interrupt)
        with pytest.raises(Interrupted):
            distill(tokens=40 * 32, eval_steps=1)
    report = distill(tokens=40 * 32, eval_steps=1)
    assert report["best_step"] == 2
    assert report["steps"] == 5
    assert report["tokens"] == 5 * 2 * 32
    assert are_equal(saved[2], weights(tmp_path / "out"))
    assert not are_equal(saved[5], weights(tmp_path / "out"))


@pytest.mark.parametrize("place", ["text", "predictions", "training", "result"])
def test_killed_run_goes_on_with_the_same_result(
    place: str, whole: Path, distill: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(teacher, "FILE_TOKENS", 5 * 32)
    read = teacher._predict
    with monkeypatch.context() as patch:
        if place == "text":
            patch.setattr(recover, "store_predictions", interrupt)
        elif place == "predictions":
            calls: list[Any] = []

            def read_once(*args: Any) -> Any:
                calls.append(args)
                return read(*args) if len(calls) == 1 else interrupt()

            patch.setattr(teacher, "_predict", read_once)
        elif place == "training":
            on_log = trainer.MetricsLogger.on_log

            def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                on_log(self, args, state, control, **kwargs)
                if state.global_step == 5:
                    interrupt()

            patch.setattr(trainer.MetricsLogger, "on_log", stop)
        else:
            patch.setattr(recover, "_write", interrupt)
        with pytest.raises(Interrupted):
            distill()
    read_again: list[int] = []
    monkeypatch.setattr(
        teacher, "_predict", lambda *args: read_again.append(len(args[1])) or read(*args)
    )
    resumed = distill()
    # Parts of 5, 5 and 2 windows of the text, and of 4 of the held-out one.
    assert read_again == {"text": [5, 5, 2, 4], "predictions": [5, 2, 4]}.get(place, [])
    assert are_equal(weights(whole), weights(tmp_path / "out"))
    for key in ("train_loss", "held_out_kl", "held_out_perplexity", "best_step", "tokens"):
        assert resumed[key] == read_recovery(whole)[key]


def test_the_teacher_is_not_needed_once_it_has_read(
    distill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(recover, "_train", interrupt)
        with pytest.raises(Interrupted):
            distill()
    load = recover.load_model
    loaded: list[str] = []
    monkeypatch.setattr(
        recover,
        "load_model",
        lambda source, *a, **k: loaded.append(source) or load(source, *a, **k),
    )
    distill()
    assert not loaded


def test_damaged_and_other_predictions_are_refused(
    distill: Callable[..., Any],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(recover, "_train", interrupt)
        with pytest.raises(Interrupted):
            distill()
    with pytest.raises(RunStateError, match="top_k was 128 and is 3"):
        distill(top_k=3)
    with pytest.raises(RunStateError, match="tokens was 384 and is 320"):
        distill(tokens=10 * 32)
    other = tmp_path / "other"
    model = make_tiny_model("llama")
    shutil.copytree(tiny_checkpoint("llama"), other)
    model.lm_head.weight += 0.1
    model.save_pretrained(other)
    with pytest.raises(RunStateError, match=r"teacher's model\.safetensors was"):
        distill(teacher=str(other))
    (file,) = (tmp_path / "out" / STATE_DIR).glob("logits-training-*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunStateError, match=rf"{file.name} of the interrupted run is damaged"):
        distill()
    file.write_bytes(content)
    assert distill()["steps"] == STEPS


def test_options_follow_from_the_model_and_the_tokens(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    model_config = load_config(find_model(str(tiny_checkpoint("llama"))))

    def derived(**options: Any) -> RecoverConfig:
        return trainer.derive_options(RecoverConfig.create(**options), model_config)

    distilled = derived(method="distill", tokens="100k", seqlen=64, device="cpu")
    assert distilled.learning_rate == pytest.approx(3e-4 * 576 / 48)
    steps = -(-(100_000 // 64) // 2)
    assert distilled.warmup_steps == -(-steps // 20)
    assert distilled.eval_steps == distilled.save_steps == -(-steps // 10)
    assert distilled.gradient_checkpointing is False
    with_adapters = derived(method="distill", adapters=True, max_steps=7)
    assert with_adapters.learning_rate == pytest.approx(1e-3 * 576 / 48)
    assert (with_adapters.seqlen, with_adapters.eval_steps) == (128, 1)
    given = {"learning_rate": 1e-5, "warmup_steps": 0, "eval_steps": 3, "save_steps": 4}
    for method in RECOVERY_METHODS:
        config = derived(method=method, **given, dtype="float32", gradient_checkpointing=True)
        assert given | {"dtype": "float32", "gradient_checkpointing": True} == {
            name: getattr(config, name) for name in (*given, "dtype", "gradient_checkpointing")
        }
    assert derived().learning_rate == 1e-4
    assert derived(learning_rate=None).learning_rate == 1e-4


def test_patience() -> None:
    def state(*curve: float) -> TrainerState:
        log = [{"step": 10 * i, "eval_kl": kl} for i, kl in enumerate(curve)]
        return TrainerState(log_history=[{"step": 3, "loss": 1.0}, *log], global_step=99)

    assert trainer.PATIENCE == 5
    assert (trainer.best_step(state()), trainer.has_stalled(state())) == (99, False)
    assert (trainer.best_step(state(3, 2, 2)), trainer.has_stalled(state(3, 2, 2))) == (10, False)
    assert not trainer.has_stalled(state(3, 2, 4, 4, 4, 4))
    assert trainer.has_stalled(state(3, 2, 4, 4, 4, 4, 4))


def test_gradient_checkpointing_does_not_change_the_result(
    whole: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    distill(gradient_checkpointing=True)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, weights(whole)[name], rtol=0, atol=1e-5)


def test_other_methods_train_on_the_same_text(
    slim: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    """Cross-entropy of all weights; nothing is left but the losses to tell the two apart."""
    report = distill(**FULL, warmup_steps=1)
    assert report["tokens"] == 12 * 32
    assert report["steps"] == STEPS
    assert report["held_out_kl"] == []
    assert report["best_step"] == STEPS
    assert report["preparation_seconds"] > 0
    losses = dict(report["train_loss"])
    assert losses[STEPS] < losses[1]


def test_weights_keep_their_precision(
    slim: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(slim, half)
    slimgpt.models.loading.load_model(find_model(str(slim)), "bfloat16").save_pretrained(half)
    assert distill(model=half, dtype="auto")["config"]["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 63}, "less than one window of seqlen=32 for each text"),
        ({"tokens": "few"}, "tokens='few': not a number"),
        ({"data": (TEXT, TEXT)}, "has a text twice"),
        ({"max_examples": 4}, "leaves nothing to decide to max_examples"),
        ({"rank": 4}, "without adapters, rank would do nothing"),
        (FULL | {"adapters": True}, "has no adapters; did you mean 'distill'"),
        (FULL | {"data": TEXT}, "a teacher is for method='distill' or data='self'"),
        (FULL | {"tokens": None}, "is for training on text: give tokens"),
        ({"top_k": 0}, "top_k=0"),
    ],
)
def test_mistakes(
    options: dict[str, Any], message: str, distill: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as mistake:
        distill(**options)
    assert mistake.value.hint
    assert not (tmp_path / "out").exists()


def test_too_little_text(distill: Callable[..., Any], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Brevity is the soul of wit. " * 10, encoding="utf-8")
    with pytest.raises(DataError, match=r"short\.txt has \d+ tokens") as few:
        distill(data=str(short), tokens="1M")
    assert few.value.hint
    assert not (tmp_path / "out").exists()


def test_report_is_complete(whole: Path) -> None:
    report = read_recovery(whole)
    assert str(whole.parent) not in json.dumps(report)
    assert report["config"]["data"] == ["text.txt", "self"]
    assert report["data"] == "text.txt, self"
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [[m["step"], m["kl"]] for m in metrics if "kl" in m] == report["held_out_kl"]
