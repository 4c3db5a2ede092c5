"""The text that a recovery trains on, drawn from its sources or written by the dense model."""

import logging
import time

import torch
from safetensors.torch import save

from slimgpt.config import RecoverConfig
from slimgpt.data.datasets import SELF, are_same_files
from slimgpt.data.examples import training_windows
from slimgpt.data.samples import SampleOptions, Windows
from slimgpt.data.self_generated import answer_prompts, sample_from_model
from slimgpt.models.stored import read_tensor
from slimgpt.recovery.job import Job
from slimgpt.recovery.teacher import Teacher, all_learned, seconds_since
from slimgpt.runtime.run_directory import GENERATED_FILE, Run

log = logging.getLogger(__name__)


def text_options(
    config: RecoverConfig, name: str, num_windows: int, num_left_out: int
) -> SampleOptions:
    """How windows of a text are drawn.

    Parameters
    ----------
    config : RecoverConfig
        The options.
    name : str
        The text.
    num_windows : int
        Number of windows.
    num_left_out : int
        Number of windows that are left out of the text that is also the held-out one.
    """
    return SampleOptions(
        num_windows,
        config.seqlen,
        config.seed + 1,  # other text than the calibration with the same seed
        config.text_field,
        num_left_out if are_same_files(name, config.eval_data) else 0,
    )


def draw_text(run: Run, job: Job, teacher: Teacher | None) -> tuple[Windows, float]:
    """Draw the text to train on, in equal parts from each source, or read what was drawn before.

    Parameters
    ----------
    run : Run
        Stores the text. All processes call this together.
    job : Job
        Its options have a number of tokens.
    teacher : callable or None
        Loads the dense model; only for the source ``self``.

    Returns
    -------
    Windows, float
        The text; and the seconds that it took.

    Raises
    ------
    DataError
        If a source has too few tokens.
    """
    config, tokenizer, prompts = job.config, job.tokenizer, job.prompts
    num_windows, num_texts = (config.tokens or 0) // config.seqlen, len(config.data)
    texts, seconds = [], 0.0
    for index, name in enumerate(config.data):
        bounds = [num_windows * i // num_texts for i in (index, index + 1)]
        options = text_options(config, name, bounds[1] - bounds[0], job.num_left_out)

        def make(name: str = name, options: SampleOptions = options) -> bytes:
            start = time.monotonic()
            if name != SELF or not teacher:
                drawn = training_windows(name, tokenizer, options)
            elif prompts:
                drawn = answer_prompts(teacher(), tokenizer, prompts, options)
            else:
                drawn = all_learned(sample_from_model(teacher(), tokenizer, options))
            return save({**drawn._asdict(), "seconds": seconds_since(start)})

        file = run.cached(GENERATED_FILE if name == SELF else f"text-{index}.safetensors", make)
        texts.append(Windows(*(read_tensor(file, field) for field in Windows._fields)))
        seconds += float(read_tensor(file, "seconds"))
    windows = Windows(*map(torch.cat, zip(*texts, strict=True)))
    share = windows.is_learned.float().mean().item()
    if share < 1:
        log.info("the loss counts %.0f %% of the tokens, those of answers", 100 * share)
    return windows, seconds
