"""What people do with a Hugging Face checkpoint, done with a pruned one."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import peft
import pytest
import torch
import yaml
from conftest import TEXT, VARIANTS, assert_greedy
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import slimgpt


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 320, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def slim(slim_checkpoint: Callable[[str], Path]) -> Path:
    return slim_checkpoint("llama")


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_is_trained_saved_loaded_and_merged(
    variant: str, slim_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory, adapter, batch = slim_checkpoint(variant), str(tmp_path / "lora"), tokens(2, 16)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(load(directory), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before = model(batch, labels=batch).loss
    before.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = model(batch, labels=batch)
    assert trained.loss < before
    model.save_pretrained(adapter)

    reloaded = peft.PeftModel.from_pretrained(load(directory), adapter)
    assert torch.equal(reloaded(batch).logits, trained.logits)
    reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    torch.testing.assert_close(again(batch).logits, trained.logits, rtol=0, atol=2e-5)


def test_pipeline_generates_what_the_model_does(slim: Path) -> None:
    generator = pipeline("text-generation", model=str(slim), trust_remote_code=True)
    options = {"max_new_tokens": 8, "do_sample": False}
    (answer,) = generator("def f(", return_tensors=True, **options)
    prompt = generator.tokenizer("def f(", return_tensors="pt")
    expected = load(slim).generate(**prompt, **options)
    assert answer["generated_token_ids"] == expected[0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_static_cache_generates_what_the_dynamic_one_does(
    variant: str, slim_checkpoint: Callable[[str], Path]
) -> None:
    model, prompt = load(slim_checkpoint(variant)), tokens(2, 12)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    static = model.generate(prompt, cache_implementation="static", **options)
    for tokens_NT in (static, model.generate(prompt, **options)):
        assert torch.equal(tokens_NT[:, :12], prompt)
        assert_greedy(model, tokens_NT, num_new=12)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_agrees_at_other_shapes(slim: Path, strict: bool) -> None:
    """Strict export traces Python too, so this holds that the config can be compiled."""
    model, dynamic = load(slim).eval(), torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model,
        (tokens(2, 12),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {0: dynamic, 1: dynamic}, "use_cache": None},
        strict=strict,
    )
    other = tokens(3, 17)
    exported = program.module()(other, use_cache=False).logits
    torch.testing.assert_close(exported, model(other).logits, rtol=0, atol=1e-5)


def test_lm_eval_takes_it_from_the_command_line(slim: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(slim)
    texts = [text[:80] for text in list(topics.values())[:3]]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(task))
    command = (
        *("--model", "hf", "--model_args", f"pretrained={slim},trust_remote_code=True"),
        *("--include_path", tmp_path, "--tasks", "texts", "--device", "cpu"),
        *("--output_path", tmp_path / "results.json"),
    )
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *command],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        check=True,
    )
    (results,) = tmp_path.glob("results_*.json")
    measured = json.loads(results.read_text())["results"]["texts"]["byte_perplexity,none"]

    model, log_likelihood = load(slim), 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            log_likelihood -= float(model(ids, labels=ids).loss) * (ids.numel() - 1)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert measured == pytest.approx(math.exp(-log_likelihood / num_bytes), rel=1e-5)


def test_folder_is_ready_for_the_hub(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    shutil.copy(TEXT, texts)
    output = tmp_path / "slim"
    options = {"ratio": 0.3, "nsamples": 6, "seqlen": 32}
    slimgpt.prune(str(tiny_checkpoint("llama")), output, calibration=str(texts), **options)
    files = {path.name: path for path in output.iterdir()}
    assert files.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_slimgpt.py",
        "pruning_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    card = ModelCard.load(files["README.md"])
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a local directory means nothing on the hub
    for name in files.keys() - {"model.safetensors"}:
        assert tempfile.gettempdir() not in files[name].read_text()
