"""Tiny random models of each family, a tiny tokenizer, the real model, and the plain pipeline."""

import copy
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before it is imported: no test waits for the network

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import TEMPLATE
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import slimgpt
from slimgpt.allocation.shapes import BlockWidths
from slimgpt.calibration.activations import choose_batch_size, embed
from slimgpt.cli import app
from slimgpt.config import PruneConfig
from slimgpt.errors import MissingDependencyError
from slimgpt.methods.registry import make_method
from slimgpt.models.blocks import bind
from slimgpt.models.source import GEMMA3_ALIAS, SMOLLM2_ALIAS, find_model
from slimgpt.pruning.block import prune_block
from slimgpt.pruning.decisions import BlockPlan

Run = Callable[..., tuple[int, str, str]]

TEXT = str(Path(__file__).with_name("text.txt"))  # short: to tokenise it takes no time

TINY = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that several workers end together.

    Tests marked `cuda` are skipped where there is no GPU.
    """
    items.sort(key=lambda item: item.path.name not in ("test_smollm2.py", "test_bad_input.py"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="this machine has no CUDA GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device whose results are compared with those of the CPU."""
    return torch.device(request.param)


@dataclass(frozen=True)
class Variant:
    """A model type and what sets it apart from the others."""

    model_type: str
    options: dict[str, Any]


VARIANTS = {
    "llama": Variant("llama", {}),
    "llama-mha": Variant("llama", {"num_key_value_heads": 8}),
    "llama-tied": Variant("llama", {"tie_word_embeddings": True}),
    "llama-biases": Variant("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Variant("mistral", {"sliding_window": 8}),
    "qwen2": Variant("qwen2", {}),
    "qwen2-sliding": Variant(
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    ),
    "qwen3": Variant("qwen3", {"head_dim": 16}),
}


def make_tiny_model(variant: str, **options: Any) -> PreTrainedModel:
    spec = VARIANTS[variant]
    config = AutoConfig.for_model(spec.model_type, **TINY | spec.options | options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from pydoc_data.topics import topics

    trained = ByteLevelBPETokenizer()
    size = TINY["vocab_size"] - 8  # like many models, the tiny ones have embeddings to spare
    trained.train_from_iterator(topics.values(), size, special_tokens=["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Iterator[PreTrainedTokenizerFast]:
    """The tokenizer with a chat template."""
    before = tokenizer.chat_template
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = before


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """Directory with a tiny model of the named variant, written once."""
    written: dict[str, Path] = {}

    def write(variant: str) -> Path:
        if variant not in written:
            directory = tmp_path_factory.mktemp(variant)
            make_tiny_model(variant).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            written[variant] = directory
        return written[variant]

    return write


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums do not depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """No products in bfloat16, whatever the CPU has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


@torch.no_grad()
def assert_greedy(model: PreTrainedModel, tokens_NT: Tensor, num_new: int) -> None:
    """Each of the last tokens is the likeliest after those before it, up to rounding.

    Generation with a cache or padding has products of other shapes. A logit is a sum of as many
    float32 products as the model is wide, and two of them are compared.
    """
    logits_NTV = model(tokens_NT[:, :-1], use_cache=False).logits[:, -num_new:]
    chosen_NT = logits_NTV.gather(2, tokens_NT[:, -num_new:, None]).squeeze(2)
    rounding = torch.finfo(torch.float32).eps * model.config.hidden_size * logits_NTV.abs().max()
    assert (logits_NTV.amax(dim=2) - chosen_NT <= 2 * rounding).all()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Enter the command line: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")  # for --help
    for console in (app.stdout, app.stderr):
        monkeypatch.setattr(console, "width", 200)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slimgpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def slim_checkpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Directory with a pruned tiny model of the named variant, written once.

    What other tests have measured is removed.
    """
    written: dict[str, Path] = {}

    def write(variant: str) -> Path:
        if variant not in written:
            output = tmp_path_factory.mktemp(f"slim-{variant}") / "slim"
            options = {"calibration": TEXT, "nsamples": 6, "seqlen": 32}
            slimgpt.prune(str(tiny_checkpoint(variant)), output, ratio=0.45, **options)
            written[variant] = output
        shutil.rmtree(written[variant] / "eval", ignore_errors=True)
        return written[variant]

    return write


@pytest.fixture(scope="session")
def smollm2() -> str:
    return installed(SMOLLM2_ALIAS)


@pytest.fixture(scope="session")
def gemma3() -> str:
    return installed(GEMMA3_ALIAS)


def installed(alias: str) -> str:
    try:
        find_model(alias)
    except MissingDependencyError as err:
        pytest.skip(f"{err} ({err.hint})")
    return alias


@pytest.fixture(scope="session")
def benchmark_texts() -> Path:
    path = Path(os.environ.get("SLIMGPT_TEST_DATA", "../shared/data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set SLIMGPT_TEST_DATA")
    return path


WIDTHS = ((4, 64), (3, 48), (2, 64), (1, 24))


def sample_tokens(num_samples: int = 6, seqlen: int = 32) -> Tensor:
    return torch.randint(320, (num_samples, seqlen), generator=torch.Generator().manual_seed(1))


def prune_blocks(
    model: PreTrainedModel, samples: Tensor, widths: Sequence[BlockWidths], config: PruneConfig
) -> list[BlockPlan]:
    """Prune a model in memory, in place: the pipeline without files. Its config stays as it is."""
    method = make_method(config)
    if method.scores_model:
        method.scores = method.score_model(copy.deepcopy(model), samples, widths)
    stream = embed(model, samples, choose_batch_size(*samples.shape), method.needs_dense)
    return [
        prune_block(block, width, stream, method, config.activation_memory)
        for block, width in zip(bind(model), widths, strict=True)
    ]
