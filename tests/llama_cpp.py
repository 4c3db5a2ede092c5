"""llama.cpp itself, as the reference that exported files are held against."""

import json
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import torch
import xllamacpp
from torch import Tensor

# Where tokenizers that seem alike tend to differ.
TEXTS = [
    "Hello world",
    " leading  and   many    spaces  ",
    "line\n\n\nbreaks\r\n\t tabs\n 1. item\n\n2. item",
    "I'm we've they'll IT'S don't",
    "12345 3.14159 1,000,000 a1b22c333",
    "naïve café — “quotes” 你好，世界 🙂👍🏽 Ωμέγα",
    "def f(x):\n    return x**2  # x²\n",
    "",
]


class LlamaCpp:
    """A model in llama.cpp, computed in float32 as far as its weights allow."""

    def __init__(self, file: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = 256
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = 1
        params.warmup = False
        params.verbosity = -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        url = self.server.listening_address + path
        request = Request(url, json.dumps(body).encode())
        with build_opener(ProxyHandler({})).open(request) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def generate(self, ids: list[int], num_tokens: int) -> list[int]:
        """Greedy continuation."""
        return self.post(
            "/completion",
            prompt=ids,
            n_predict=num_tokens,
            temperature=0,
            ignore_eos=True,
            cache_prompt=False,
            return_tokens=True,
        )["tokens"]

    def top_log_probs(self, ids: list[int], count: int) -> tuple[Tensor, Tensor]:
        """The likeliest next tokens and their log-probabilities."""
        # Those of a token that is no whole character are held back, so a letter is forced.
        letter = self.tokenize("a")[-1]
        completion = self.post(
            "/completion",
            prompt=ids,
            n_predict=1,
            temperature=0,
            n_probs=count,
            logit_bias=[[letter, 1000]],
            cache_prompt=False,
        )
        top = completion["completion_probabilities"][0]["top_logprobs"]
        return torch.tensor([t["id"] for t in top]), torch.tensor([t["logprob"] for t in top])


@torch.no_grad()
def check_agreement(
    file: Path, model: Any, ids: list[int], num_tokens: int = 4, tolerance: float = 1e-3
) -> None:
    """The 20 largest log-probabilities of every greedy step are those of PyTorch.

    So the engine's choice is PyTorch's, unless two tokens are as good as that. (It never chooses
    EOS here.)
    """
    engine = LlamaCpp(file)
    generated = engine.generate(ids, num_tokens)
    assert len(generated) == num_tokens
    for step, token in enumerate(generated):
        prefix = ids + generated[:step]
        expected = model(torch.tensor([prefix])).logits[0, -1].float().log_softmax(-1)
        likeliest = expected.index_fill(0, torch.tensor(model.config.eos_token_id), -torch.inf)
        assert likeliest.max() - expected[token] < 2 * tolerance
        top, log_probs = engine.top_log_probs(prefix, 20)
        assert len(top) == 20
        assert (log_probs - expected[top]).abs().max() < tolerance
