"""End to end on SmolLM2-135M: prune, load elsewhere, compare."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llama_cpp import TEXTS, LlamaCpp, check_agreement
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import slimgpt
from slimgpt.data.samples import evaluation_tokens
from slimgpt.models.blocks import bind
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.models.units import Kept, unit_columns
from slimgpt.pruning.slicing import slice_sublayer

pytestmark = pytest.mark.real_model

LOAD_WITHOUT_SLIMGPT = """
import sys
sys.modules["slimgpt"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
tokens = tokenizer("The capital of France is", return_tensors="pt")
with torch.no_grad():
    torch.save({"ids": tokens.input_ids, "logits": model(**tokens).logits}, sys.argv[2])
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=8, do_sample=False)[0]))
"""


@pytest.fixture(scope="module")
def dense(smollm2: str) -> PreTrainedModel:
    return load_model(find_model(smollm2))


@pytest.fixture(scope="module")
def dense_directory(
    dense: PreTrainedModel, smollm2: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The same model as safetensors, which load in no time."""
    directory = tmp_path_factory.mktemp("dense")
    dense.save_pretrained(directory)
    load_tokenizer(find_model(smollm2)).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def result(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> slimgpt.PruneResult:
    output = tmp_path_factory.mktemp("smollm2") / "slim"
    return slimgpt.prune(smollm2, output, ratio=0.3, calibration="pydocs", nsamples=16, seqlen=256)


def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss.exp())


def test_gguf_in_half_precision(smollm2: str, dense: PreTrainedModel) -> None:
    model = load_model(find_model(smollm2), "bfloat16")
    assert model.dtype == model.config.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name).bfloat16())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dense.get_buffer(name))


def test_target_is_met(result: slimgpt.PruneResult) -> None:
    assert abs(result.plan.block_ratio - 0.3) < 0.005
    assert result.plan.params_before == 134_515_008
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert model.num_parameters() == result.plan.params_after


def test_loads_in_a_process_without_slimgpt(
    result: slimgpt.PruneResult, tmp_path: Path, smollm2: str
) -> None:
    seen = tmp_path / "seen.pt"
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_SLIMGPT, result.output, seen],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "The capital of France is" in done.stdout
    remote = torch.load(seen, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert (model(remote["ids"]).logits - remote["logits"]).abs().max() <= 1e-5


def test_compensation_beats_slicing(result: slimgpt.PruneResult, dense: PreTrainedModel) -> None:
    """The same units removed without any update of the other weights do worse by far."""
    sliced = copy.deepcopy(dense)
    for block, plan in zip(list(bind(sliced)), result.blocks, strict=True):
        for sublayer, decided in zip(block.sublayers, plan.sublayers, strict=True):
            kept = torch.tensor(decided.keep)
            columns = unit_columns(kept, sublayer.unit_size)
            slice_sublayer(sublayer, Kept(kept), nn.Parameter(sublayer.output.weight[:, columns]))
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    tokens = evaluation_tokens("pydocs", tokenizer, max_tokens=1024).view(-1, 512)
    ours = perplexity(AutoModelForCausalLM.from_pretrained(result.output), tokens)
    assert perplexity(dense, tokens) < ours < 0.75 * perplexity(sliced, tokens)


def test_eval_equals_the_loss_of_transformers(
    result: slimgpt.PruneResult, dense: PreTrainedModel, dense_directory: str
) -> None:
    options = {"data": ("pydocs",), "seqlen": (128,), "max_tokens": 512}
    measured = slimgpt.evaluate(str(result.output), against=dense_directory, **options).perplexity[
        0
    ]
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    tokens = evaluation_tokens("pydocs", tokenizer, max_tokens=512).view(-1, 128)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert measured.perplexity == pytest.approx(perplexity(model, tokens), rel=1e-4)
    assert measured.base_perplexity == pytest.approx(perplexity(dense, tokens), rel=1e-4)
    with torch.no_grad():
        log_p, log_q = (m(tokens).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert measured.kl_divergence == pytest.approx(float(kl), rel=1e-3)
    with torch.no_grad():
        streams, base = (
            torch.stack(m(tokens, output_hidden_states=True).hidden_states[1:]).double()
            for m in (model, dense)
        )
    errors = ((streams - base).square().sum(-1) / base.square().sum(-1)).flatten(1).median(1).values
    assert measured.layer_errors == pytest.approx(errors.tolist(), rel=1e-3)
    saved = json.loads((result.output / "eval" / "perplexity.json").read_text())
    assert saved[-1]["perplexity"] == measured.perplexity


def test_tokenizer_is_that_of_the_base(result: slimgpt.PruneResult, smollm2: str) -> None:
    base = load_tokenizer(find_model(smollm2))
    ours = AutoTokenizer.from_pretrained(result.output)
    text = "Hello  world!\n\n\tdef f(x): return x**2 # naïve café 你好 🙂"
    assert ours(text).input_ids == base(text).input_ids
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == base.apply_chat_template(
        chat, tokenize=False
    )


def test_llama_cpp_agrees(result: slimgpt.PruneResult, tmp_path: Path) -> None:
    """Per-layer widths; the tokenizer is that of the GGUF file that the model came from."""
    file = slimgpt.export(str(result.output), tmp_path / "slim.gguf", type="f32").output
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    engine = LlamaCpp(file)
    assert [engine.tokenize(text) for text in TEXTS] == [tokenizer(t).input_ids for t in TEXTS]
    ids = tokenizer("The capital of France is").input_ids
    check_agreement(file, AutoModelForCausalLM.from_pretrained(result.output), ids, num_tokens=8)


def test_c4_file_calibrates(
    tiny_checkpoint: Callable[[str], Path], benchmark_texts: Path, tmp_path: Path
) -> None:
    text = str(benchmark_texts / "c4" / "train_1000.jsonl")
    model = str(tiny_checkpoint("llama"))
    done = slimgpt.prune(model, tmp_path / "slim", calibration=text, nsamples=2, seqlen=64)
    assert done.report["calibration"]["data"] == "train_1000.jsonl"


def test_recovery(result: slimgpt.PruneResult, dense_directory: str, tmp_path: Path) -> None:
    recovered = slimgpt.recover(
        str(result.output), tmp_path / "recovered", method="distill", teacher=dense_directory,
        data="pydocs", tokens=1024, eval_data="pydocs", eval_tokens=512, seqlen=128,
        dtype="bfloat16", eval_steps=4, learning_rate=5e-5,
    )  # fmt: skip
    (_, before), (_, after) = recovered.report["held_out_kl"]
    assert after < before
    model = AutoModelForCausalLM.from_pretrained(recovered.output)
    assert model.dtype == torch.float32
    assert model.num_parameters() == result.plan.params_after


def test_tasks_on_the_original_files(dense_directory: str, benchmark_texts: Path) -> None:
    """Every file is found and fits its task; a trained model does better than chance."""
    pytest.importorskip("lm_eval")
    *scores, mean = slimgpt.evaluate(
        dense_directory, tasks="commonsense", data_dir=benchmark_texts / "tasks", limit=8,
        dtype="bfloat16",
    ).tasks  # fmt: skip
    files = {score.task: score.data for score in scores}
    assert files == {
        "boolq": "boolq_validation.jsonl",
        "piqa": "piqa_valid.jsonl",
        "hellaswag": "hellaswag_val_1000_rubriks.jsonl",
        "winogrande": "winogrande_xl_validation.jsonl",
        "arc_easy": "arc_easy_test.jsonl",
        "openbookqa": "openbookqa_test.jsonl",
    }
    assert mean.num_docs == 6 * 8
    assert next(score for score in scores if score.task == "piqa").value > 0.5
