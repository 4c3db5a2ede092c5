"""Inputs of a run: calibration samples, and the scores of a method."""

import logging
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from slimgpt.config import PruneConfig
from slimgpt.data.datasets import SELF, check_dataset, dataset_files
from slimgpt.data.samples import calibration_tokens
from slimgpt.data.self_generated import sample_from_model
from slimgpt.errors import MissingDependencyError
from slimgpt.methods.registry import GLOBAL_SCORES, NEEDS_GRADIENTS
from slimgpt.models.device import fast_dtype
from slimgpt.models.loading import load_model
from slimgpt.models.stored import read_tensor
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.tokenizer import tokenizer_files
from slimgpt.models.weights import Weights, tensor_names
from slimgpt.pruning.plan import PrunePlan
from slimgpt.runtime.environment import computation, versions
from slimgpt.runtime.files import describe_file
from slimgpt.runtime.run_directory import GENERATED_FILE, SCORES_FILE, Run

log = logging.getLogger(__name__)


def check_inputs(config: PruneConfig) -> None:
    """Check that the calibration data exists and the packages for the method are installed."""
    for name in config.calibration:
        check_dataset(name, "calibration")
    if config.method == "loraprune" and find_spec("peft") is None:
        raise MissingDependencyError(
            "peft", "the method 'loraprune'", "pip install 'slimgpt[recover]'"
        )


def calibration_samples(
    run: Run,
    streamed: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    config: PruneConfig,
) -> Tensor:
    """The calibration samples: those of the interrupted run, or new ones.

    Each text gives an equal number, as far as possible.
    """
    num_texts, samples = len(config.calibration), []
    for index, name in enumerate(config.calibration):
        file = GENERATED_FILE if name == SELF else f"samples-{index}.safetensors"
        if not run.has(file):
            bounds = [config.nsamples * i // num_texts for i in (index, index + 1)]
            draw = (tokenizer, bounds[1] - bounds[0], seqlen, config.seed)
            if name == SELF:
                dtype = fast_dtype(streamed.device, streamed.weights.dtype)
                with streamed.whole(dtype) as model:
                    drawn = sample_from_model(model, *draw)
            else:
                drawn = calibration_tokens(name, *draw, text_field=config.text_field)
            with run.saving(file) as temporary:
                temporary.write_bytes(save({"tokens": drawn}))
        samples.append(read_tensor(run.saved(file), "tokens"))
    return torch.cat(samples)


def global_scores(
    run: Run, streamed: StreamedModel, samples: Tensor, planned: PrunePlan, config: PruneConfig
) -> list[Tensor]:
    """Scores that come from the model as a whole, if the method has such."""
    if config.method not in GLOBAL_SCORES:
        return []
    if not run.has(SCORES_FILE):
        model = streamed.skeleton
        if config.method in NEEDS_GRADIENTS:
            log.info("gradients of the whole model, for the method %s", config.method)
            model = load_model(streamed.weights.source, "float32", config.device)
        scores = GLOBAL_SCORES[config.method](model, samples, planned.widths, config.seed)
        with run.saving(SCORES_FILE) as temporary:
            temporary.write_bytes(save({f"{i:05d}": s for i, s in enumerate(scores)}))
    file = run.saved(SCORES_FILE)
    return [read_tensor(file, name) for name in sorted(tensor_names(file))]


def identity_of(
    weights: Weights,
    model_config: PreTrainedConfig,
    generation_config: GenerationConfig,
    config: PruneConfig,
    device: torch.device,
) -> dict[str, Any]:
    """All that the result depends on."""
    configs = {"model config": model_config, "generation config": generation_config}
    files = {
        "calibration file": [f for name in config.calibration for f in dataset_files(name)],
        "tokenizer file": tokenizer_files(weights.source).values(),
    }
    return {
        "model": weights.source.title,
        **{name: sha256(c.to_json_string().encode()).hexdigest() for name, c in configs.items()},
        **{file.name: describe_file(file) for file in weights.files},
        **config.model_dump(exclude={"activation_memory"}),
        **{f"{kind} {f}": describe_file(f) for kind, found in files.items() for f in found},
        "device": device.type,
        "products": str(fast_dtype(device, weights.dtype)),
        **computation(),
        **versions(),
    }
