"""Options of every command, as frozen values that check themselves. No torch in here.

The fields are the single source of the options: the command line makes its flags, their help and
their defaults from them, recipes (YAML) and the Python API use the same names.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from slimgpt.errors import ConfigError

Schedule = Literal["log", "linear", "uniform", "log_decrease", "linear_decrease"]

ChannelSelection = Literal["greedy", "dynamic_group"]

HeadError = Literal["exact", "diagonal"]

DampingMode = Literal["relative", "mean"]

Preset = Literal["default", "exact", "paper"]

Widths = Literal["measured", "scheduled"]

Method = Literal["slimgpt", "magnitude", "wanda_sp", "flap", "taylor", "loraprune", "random"]

DType = Literal["auto", "float32", "bfloat16", "float16"]

RecoverMethod = Literal["lora", "full", "distill"]

_EXACT = {
    "attention_share": 1.0,
    "widths": "scheduled",
    "calibration": "c4",
    "correction": 0.0,
    "refit_epochs": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact": _EXACT,
    "paper": _EXACT
    | {
        "channel_selection": "dynamic_group",
        "head_error": "diagonal",
        "damping_mode": "mean",
    },
}


def _underscored(value: Any) -> Any:
    return value.replace("-", "_") if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return value.split(",")
    return [value] if isinstance(value, int | float) else value


def _is_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
        raise ValueError("no device; use auto, cpu, cuda, cuda:N or mps")
    return value


def _is_plot(value: str | None) -> str | None:
    if value is not None and Path(value).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError("the name of a plot ends in .png, .svg or .pdf")
    return value


_Underscored = BeforeValidator(_underscored)

_Listed = BeforeValidator(_listed)

# Bounds that no sensible value reaches, so that a slip fails here and not in a library.
COUNT, LENGTH, BATCH = 10**9, 10**7, 2**16  # of anything; of a text in tokens; of sequences

MAX_SEED = 2**32 - 1  # NumPy's

BYTES = 2**60

_SHOWN = 80  # characters of a wrong value in its message


def check_text(text: str) -> None:
    """Check that a text can be a name, and be written as UTF-8.

    Raises
    ------
    ValueError
        If it has a NUL, or bytes that are not UTF-8 (which Python decodes as lone surrogates).
    """
    if "\0" in text:
        raise ValueError("a NUL character is in it")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it is not valid UTF-8")


def _check_texts(value: Any) -> None:
    """Check all texts in a value."""
    if isinstance(value, str | Path):
        check_text(str(value))
    elif isinstance(value, Mapping):
        _check_texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            _check_texts(item)


def did_you_mean(name: str, known: list[str]) -> str:
    """Say which of the known names was probably meant, and list them all."""
    close = get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"available: {', '.join(known)}"


def _widths_are_given(values: Mapping[str, Any]) -> bool:
    """Whether there is nothing to measure, or nothing that measuring could change."""
    is_rival = values.get("method", "slimgpt") != "slimgpt"
    return is_rival or bool(values.get("uniform") or values.get("layer_ratios"))


class Options(BaseModel):
    """Frozen options; all problems of one set of values are reported together."""

    verb: ClassVar[str]

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name, value in values.items():
            try:
                _check_texts(value)
            except ValueError as err:
                raise ValueError(f"{name}={_shown(value)}: {err}") from None
        return values

    @classmethod
    def create(cls, **values: Any) -> Self:
        """Validate values into options.

        Raises
        ------
        ConfigError
            With one line for each wrong value.
        """
        try:
            return cls(**values)
        except ValidationError as err:
            raise ConfigError(
                "; ".join(map(cls._explain, err.errors())), hint=cls._hint()
            ) from None

    @classmethod
    def _hint(cls) -> str:
        """Where the options are explained."""
        return f"`slimgpt {cls.verb} --help` explains the options and shows their defaults"

    @classmethod
    def _explain(cls, problem: Mapping[str, Any]) -> str:
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "missing":
            return f"{name} is missing"
        if problem["type"] == "extra_forbidden":
            return f"unknown option {_shown(name)}: {did_you_mean(name, list(cls.model_fields))}"
        if problem["type"] == "literal_error" and len(problem["loc"]) == 1:
            known = [str(arg) for arg in get_args(cls.model_fields[name].annotation)]
            return (
                f"{name}={_shown(problem['input'])}: {did_you_mean(str(problem['input']), known)}"
            )
        message = problem["msg"].removeprefix("Value error, ")
        return f"{name}={_shown(problem['input'])}: {message}" if name else message


def _shown(value: Any) -> str:
    """A wrong value, cut to what a message can hold."""
    try:
        text = repr(value)
    except ValueError:  # an int with too many digits to print
        return "(a very large number)"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class _RuntimeOptions(Options):
    """Where and in what precision a model runs."""

    dtype: Annotated[DType, _Underscored] = Field(
        "auto", description="Precision of the weights; auto keeps that of the checkpoint."
    )
    device: Annotated[str, AfterValidator(_is_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:N, mps."
    )


class _ModelOptions(_RuntimeOptions):
    """A model that runs on text."""

    text_field: str | None = Field(
        None,
        description="Field with the text or chat in local data files. Default: text, messages, "
        "conversations, or for instructions the fields of Alpaca.",
    )


class PruneConfig(_ModelOptions):
    """Options of ``slimgpt prune``."""

    verb = "prune"

    ratio: float = Field(0.2, ge=0, lt=1, description="Fraction of the block parameters to remove.")
    method: Annotated[Method, _Underscored] = Field(
        "slimgpt", description="What decides which units go; all but slimgpt are for comparison."
    )
    schedule: Annotated[Schedule, _Underscored] = Field(
        "log", description="How the layer ratios change with depth."
    )
    min_ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Smallest layer ratio: the first layer's, or the last one's where ratios "
        "decrease. Default: ratio / 8.",
    )
    attention_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Ratio of attention over that of its layer, as far as the FFN can make up for "
        "it: 0 leaves attention whole. Default: (1 + 1/g)/2 where g query heads share a kv head.",
    )
    widths: Widths = Field(
        "measured",
        description="scheduled: as the schedule says. measured: from there, heads and channels "
        "are kept where they matter most to the model's output; only for the method slimgpt, "
        "widths that may differ, and four times as many calibration tokens as channels.",
    )
    layer_ratios: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], _Listed] = Field(
        (),
        description="Ratios of the first layers, comma-separated, in place of ratio and schedule; "
        "the other layers stay as they are.",
    )
    calibration: Annotated[tuple[str, ...], _Listed] = Field(
        ("c4", "self"),
        min_length=1,
        description="Texts, comma-separated, that give equal numbers of samples: data sets, local "
        ".txt/.jsonl/.json/.parquet files (the first three also as .gz or .zst) or directories of "
        "them, and self, what the model itself writes.",
    )
    nsamples: int = Field(128, ge=1, le=LENGTH, description="Number of calibration samples.")
    seqlen: int = Field(2048, ge=2, le=LENGTH, description="Tokens of each calibration sample.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed for the choice of the samples.")
    damping: float = Field(
        0.01, gt=0, le=0.1, description="Damping of the Hessian, relative to its diagonal."
    )
    damping_mode: Annotated[DampingMode, _Underscored] = Field(
        "relative", description="Damp each channel by its own diagonal, or all by the mean."
    )
    channel_selection: Annotated[ChannelSelection, _Underscored] = Field(
        "greedy", description="FFN channels one at a time, or in the paper's shrinking batches."
    )
    min_group_size: int = Field(64, ge=1, le=COUNT, description="Smallest batch of dynamic-group.")
    max_group_size: int = Field(1024, ge=1, le=COUNT, description="Largest batch of dynamic-group.")
    head_error: Annotated[HeadError, _Underscored] = Field(
        "exact", description="Error of a head: exact, or the paper's diagonal approximation."
    )
    correction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="How much of the error that earlier blocks left in the residual stream each "
        "sublayer corrects; the paper's 0 saves the forward pass of the dense model.",
    )
    refit_epochs: int = Field(
        1,
        ge=0,
        le=BATCH,
        description="How often all weights of a pruned FFN see the calibration tokens after the "
        "compensation, to follow the output that it should have; the paper's 0 leaves this out.",
    )
    multiple_of: int = Field(8, ge=1, le=COUNT, description="FFN widths are multiples of this.")
    uniform: bool = Field(
        False, description="Same width in every layer: a checkpoint of the stock class."
    )
    preset: Preset = Field(
        "default",
        description="Defaults of the method; paper is as published, exact the same without its "
        "approximations.",
    )
    activation_memory: ByteSize = Field(
        ByteSize(4 * 10**9),
        le=BYTES,
        description="Memory for activations, e.g. 8GB. A residual stream beyond it is mapped to a "
        "file; sublayer activations beyond it are computed twice.",
    )
    max_shard_size: ByteSize = Field(
        ByteSize(5 * 10**9),
        ge=1,
        le=BYTES,
        description="Size of the largest file of weights, e.g. 2GB.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        defaults = dict(PRESETS.get(str(values.get("preset", "default")), {}))
        if values.get("uniform"):
            defaults["schedule"] = "uniform"
        if _widths_are_given(values):
            defaults["widths"] = "scheduled"
        return defaults | values

    @model_validator(mode="before")
    @classmethod
    def _check_what_decides_the_ratios(cls, values: dict[str, Any]) -> dict[str, Any]:
        # Runs before the preset fills in a schedule.
        idle = {"ratio", "schedule", "min_ratio", "uniform"} & values.keys()
        if values.get("layer_ratios") and idle:
            raise ValueError(f"layer_ratios leaves nothing to decide to {', '.join(sorted(idle))}")
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        solver = {"damping", "damping_mode", "channel_selection", "head_error", "correction"}
        solver |= {"min_group_size", "max_group_size", "refit_epochs"}
        idle = solver & self.model_fields_set
        if self.method != "slimgpt" and idle:
            idle = {"preset"} if self.preset != "default" else idle
            raise ValueError(f"method={self.method!r} has no {', '.join(sorted(idle))}")
        if self.uniform and self.schedule != "uniform":
            raise ValueError(
                f"uniform=True gives every layer the same width, but schedule={self.schedule!r}"
            )
        if self.widths == "measured" and _widths_are_given(self.model_dump()):
            raise ValueError(
                "widths='measured' is for the method slimgpt, without uniform and "
                "without layer_ratios"
            )
        if self.min_ratio is not None and self.min_ratio > self.ratio:
            raise ValueError(f"min_ratio={self.min_ratio} is above ratio={self.ratio}")
        if self.min_group_size > self.max_group_size:
            raise ValueError(
                f"min_group_size={self.min_group_size} is above "
                f"max_group_size={self.max_group_size}"
            )
        if len(set(self.calibration)) < len(self.calibration):
            raise ValueError(f"calibration={','.join(self.calibration)!r} has a text twice")
        if self.nsamples < len(self.calibration):
            raise ValueError(
                f"nsamples={self.nsamples} is too few for {len(self.calibration)} texts of "
                f"calibration={','.join(self.calibration)!r}"
            )
        return self

    @property
    def refits(self) -> bool:
        """Whether all weights of a pruned FFN are fitted to its output."""
        return self.method == "slimgpt" and self.refit_epochs > 0

    @property
    def needs_dense(self) -> bool:
        """Whether the residual stream of the dense model is needed beside the pruned one."""
        return self.method == "slimgpt" and self.correction > 0


class EvalConfig(_ModelOptions):
    """Options of ``slimgpt eval``."""

    verb = "eval"

    data: Annotated[tuple[str, ...], _Listed] = Field(
        ("wikitext2",),
        description="Texts for perplexity: data sets, local files or directories, comma-separated. "
        "With tasks and without texts, only the tasks are run.",
    )
    seqlen: Annotated[tuple[Annotated[int, Field(ge=2, le=LENGTH)], ...], _Listed] = Field(
        (2048,), min_length=1, description="Window lengths in tokens, comma-separated."
    )
    max_tokens: int | None = Field(
        None, ge=2, le=10**12, description="Stop after this many tokens. Default: the whole split."
    )
    against: str | None = Field(
        None, description="Base model: its results and the KL divergence to it are added."
    )
    tasks: Annotated[tuple[str, ...], _Listed] = Field(
        (),
        description="commonsense, mmlu, longbench or tasks of lm-eval, comma-separated.",
    )
    data_dir: Path | None = Field(
        None, description="Folder with the tasks' data (JSON, JSONL, Parquet), not the hub."
    )
    limit: int | None = Field(
        None, ge=1, le=COUNT, description="Only the first documents of each task."
    )
    num_fewshot: int | None = Field(
        None,
        ge=0,
        le=BATCH,
        description="Solved examples in a prompt. Default: 5 for mmlu, else the task's.",
    )
    batch_size: int = Field(
        8, ge=1, le=BATCH, description="Requests of a task in one forward pass."
    )

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"data": ()} | values if values.get("tasks") else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data and not self.tasks:
            raise ValueError("neither data nor tasks to evaluate on")
        options_of = {
            "tasks": {"data_dir", "limit", "num_fewshot", "batch_size"},
            "data": {"seqlen", "max_tokens"},
        }
        for needed, options in options_of.items():
            given = options & self.model_fields_set
            idle = [name for name in given if getattr(self, name) is not None]
            if idle and not getattr(self, needed):
                raise ValueError(f"without {needed}, {', '.join(sorted(idle))} would do nothing")
        return self


class RecoverConfig(_ModelOptions):
    """Options of ``slimgpt recover``; the defaults are the paper's settings."""

    verb = "recover"

    method: RecoverMethod = Field(
        "lora", description="What is trained: adapters, all weights, or adapters with a teacher."
    )
    data: str = Field(
        "alpaca",
        description="Data set, local file or directory: instructions, chats or plain text.",
    )
    max_examples: int | None = Field(
        None, ge=1, le=COUNT, description="Use only the first examples."
    )
    seqlen: int = Field(
        256, ge=2, le=LENGTH, description="Tokens of an example; the rest is cut off."
    )
    rank: int = Field(8, ge=1, le=BATCH, description="Rank of the adapters.")
    alpha: int = Field(
        16, ge=1, le=COUNT, description="Scale of the adapters, divided by the rank."
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout in front of the adapters.")
    learning_rate: float = Field(1e-4, gt=0, description="Its peak; it falls as a cosine to 0.")
    warmup_steps: int = Field(10, ge=0, le=COUNT, description="Steps until the peak.")
    epochs: float = Field(1, gt=0, le=10**6, description="Passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, le=COUNT, description="Train for this many steps instead."
    )
    batch_size: int = Field(
        64, ge=1, le=COUNT, description="Examples of a step, over all processes."
    )
    micro_batch_size: int = Field(
        4, ge=1, le=BATCH, description="Of these, at once in one process."
    )
    teacher: str | None = Field(
        None, description="Model to distil from. Default: the base model of the pruning report."
    )
    kl_weight: float = Field(
        1.0,
        ge=0,
        le=10**6,
        description="Weight of the KL divergence to the teacher beside the loss.",
    )
    eval_data: str = Field("wikitext2", description="Text for the held-out perplexity.")
    eval_tokens: int = Field(16_384, ge=2, le=COUNT, description="The first tokens of it.")
    eval_steps: int = Field(20, ge=1, le=COUNT, description="Steps between evaluations.")
    save_steps: int = Field(
        20, ge=1, le=COUNT, description="Steps between checkpoints to resume from."
    )
    report_to: Annotated[tuple[str, ...], _Listed] = Field(
        (), description="Trackers of transformers: tensorboard, wandb, mlflow, …"
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="Seed of the adapters, the dropout and the order."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        if self.data == "self":
            raise ValueError("data='self' is text for calibration, not for training")
        if self.teacher and self.method != "distill":
            raise ValueError(f"method={self.method!r} has no teacher; did you mean 'distill'?")
        others = {
            "lora": {"kl_weight"},
            "full": {"kl_weight", "rank", "alpha", "dropout"},
            "distill": set(),
        }
        if idle := others[self.method] & self.model_fields_set:
            raise ValueError(f"method={self.method!r} has no {', '.join(sorted(idle))}")
        if {"max_steps", "epochs"} <= self.model_fields_set and self.max_steps is not None:
            raise ValueError(f"max_steps={self.max_steps} leaves nothing to decide to epochs")
        return self


class ExportConfig(Options):
    """Options of ``slimgpt export``."""

    verb = "export"

    to: Literal["gguf"] = Field("gguf", description="Format to write; gguf is llama.cpp's.")
    type: Annotated[Literal["f32", "f16", "bf16", "q8_0"], _Underscored] = Field(
        "f16", description="Type of the matrices in the file."
    )


class BenchConfig(_RuntimeOptions):
    """Options of ``slimgpt bench``."""

    verb = "bench"

    engine: Literal["transformers", "llamacpp", "vllm"] = Field(
        "transformers", description="What runs the model; for llamacpp it is converted first."
    )
    against: str | None = Field(
        None, description="Base model: the two take turns, and ratios to it are added."
    )
    batch_size: Annotated[tuple[Annotated[int, Field(ge=1, le=BATCH)], ...], _Listed] = Field(
        (1,), min_length=1, description="Numbers of sequences at once, comma-separated."
    )
    prompt_length: Annotated[tuple[Annotated[int, Field(ge=1, le=LENGTH)], ...], _Listed] = Field(
        (128, 512), min_length=1, description="Lengths of the prompts in tokens, comma-separated."
    )
    new_tokens: int = Field(
        64, ge=2, le=LENGTH, description="Tokens to generate for each sequence."
    )
    warmup: int = Field(1, ge=0, le=COUNT, description="Rounds that do not count.")
    repeats: int = Field(5, ge=1, le=COUNT, description="Rounds that do.")
    threads: int | None = Field(
        None, ge=1, le=2**12, description="CPU threads. Default: PyTorch's."
    )
    plot: Annotated[str | None, AfterValidator(_is_plot)] = Field(
        None, description="File for a plot: .png, .svg or .pdf."
    )


class ReportConfig(_RuntimeOptions):
    """Options of ``slimgpt report``; all of them concern the sample generations."""

    verb = "report"

    against: str | None = Field(
        None, description="Base model: both models go on from a few prompts, side by side."
    )
    prompts: Path | None = Field(
        None, description="Text file with one prompt per line. Default: a few of SlimGPT's own."
    )
    new_tokens: int = Field(40, ge=1, le=LENGTH, description="Tokens to generate for each prompt.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        idle = self.model_fields_set - {"against"}
        if idle and self.against is None:
            raise ValueError(f"without against, nothing is generated: {', '.join(sorted(idle))}")
        return self
