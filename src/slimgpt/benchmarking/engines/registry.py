"""The engines, by name."""

from slimgpt.benchmarking.engines.base import Engine
from slimgpt.benchmarking.engines.llama_cpp import LlamaCpp
from slimgpt.benchmarking.engines.transformers import Transformers
from slimgpt.benchmarking.engines.vllm import Vllm

ENGINES: dict[str, type[Engine]] = {
    "transformers": Transformers,
    "llamacpp": LlamaCpp,
    "vllm": Vllm,
}
