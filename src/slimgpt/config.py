"""Options of every command, as frozen values that validate themselves. Does not import torch.

The fields are the single source of the options: the command line derives its flags, their help and
their defaults from them; recipes (YAML) and the Python API use the same names.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
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

Widths = Literal["measured", "searched", "scheduled"]

Method = Literal[
    "slimgpt", "magnitude", "wanda_sp", "flap", "taylor", "loraprune", "compresso", "random", "reap"
]

ExpertUnits = Literal["channels", "experts", "both"]

DType = Literal["auto", "float32", "bfloat16", "float16"]

Phase = Literal["decode", "prefill"]

RecoverMethod = Literal["lora", "full", "distill"]

# Types of matrices in the GGUF files that are written.
GgufType = Literal["f32", "f16", "bf16", "q8_0"]

# The sizes that a model can be asked to have, instead of a ratio.
TARGETS = ("target_params", "target_size", "target_kv_cache", "target_latency")

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


def _lowered(value: Any) -> Any:
    return _underscored(value.lower()) if isinstance(value, str) else value


def _count(value: Any) -> Any:
    """Parse a count like 80M, 1.2B or 80,000,000."""
    if not isinstance(value, str):
        return value
    number = re.fullmatch(r"(\d{1,15}(?:[,_]\d{3}){0,5}(?:\.\d{1,9})?) ?([kmbt]?)", value, re.I)
    if not number:
        raise ValueError("not a number; write it like 80M, 1.2B or 80000000")
    digits, unit = number[1].replace(",", "").replace("_", ""), number[2].lower()
    count = Decimal(digits) * 1000 ** " kmbt".index(unit or " ")
    if count % 1:
        raise ValueError("not a whole number; write it like 80M, 1.2B or 80000000")
    return int(count)


def _factor(value: Any) -> Any:
    """Parse a factor like 0.5x, 0.5 or 50%."""
    if not isinstance(value, str):
        return value
    number = re.fullmatch(r"(\d{0,9}\.?\d{1,9}) ?([x×%]?)", value.lower())
    if not number:
        raise ValueError("not a fraction of the dense model; write it like 0.5x")
    return float(Decimal(number[1]) / (100 if number[2] == "%" else 1))


def _is_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
        raise ValueError("not a device; use auto, cpu, cuda, cuda:N or mps")
    return value


def _is_plot(value: str | None) -> str | None:
    if value is not None and Path(value).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError("the name of a plot ends in .png, .svg or .pdf")
    return value


_Underscored = BeforeValidator(_underscored)

_Listed = BeforeValidator(_listed)

_Lowered = BeforeValidator(_lowered)

# Quantities with a unit; on the command line they are text.
_Count = BeforeValidator(_count)

_Factor = BeforeValidator(_factor)

# Bounds far above any sensible value, so that a typo fails here and not in a library.
COUNT, LENGTH, BATCH = 10**9, 10**7, 2**16  # counts; tokens of a text; sequences in a batch

LONGEST_TEXT = 2**28  # tokens to train on

MAX_SEED = 2**32 - 1  # NumPy's

BYTES = 2**60

_SHOWN = 80  # characters of a wrong value that a message shows


def check_text(text: str) -> None:
    """Check that a text can be a file name and can be written as UTF-8.

    Raises
    ------
    ValueError
        If it has a NUL character or lone surrogates (to which Python decodes invalid UTF-8).
    """
    if "\0" in text:
        raise ValueError("a NUL character is in it")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it is not valid UTF-8")


def _check_texts(value: Any) -> None:
    """Check all texts inside a value."""
    if isinstance(value, str | Path):
        check_text(str(value))
    elif isinstance(value, Mapping):
        _check_texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            _check_texts(item)


def did_you_mean(name: str, known: list[str]) -> str:
    """Suggest the closest known name, and list all of them."""
    close = get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"available: {', '.join(known)}"


# Options that only one method reads; the others are baselines.
OWN_OPTIONS = {
    "slimgpt": {
        "damping",
        "damping_mode",
        "channel_selection",
        "head_error",
        "correction",
        "min_group_size",
        "max_group_size",
        "refit_epochs",
    }
}


_ADAPTER_OPTIONS = {"rank", "alpha", "dropout"}

# Options that only some of the recovery methods read.
RECOVERY_OPTIONS = {
    "lora": _ADAPTER_OPTIONS,
    "full": set(),
    "distill": _ADAPTER_OPTIONS | {"adapters", "top_k"},
}

# Defaults of the method distill, where they are not the paper's; None: derived from the model and
# the number of steps by `slimgpt.recovery.trainer.derive_options`.
_DISTILL: dict[str, Any] = {
    "data": ("c4", "self"),
    "tokens": 1_000_000,
    "seqlen": 512,
    "batch_size": 2,
    "micro_batch_size": 1,
    "eval_tokens": 8192,
    "learning_rate": None,
    "warmup_steps": None,
    "eval_steps": None,
    "save_steps": None,
}


def is_baseline(method: str) -> bool:
    """Whether a method is there for comparison only."""
    return method not in OWN_OPTIONS


def _widths_are_given(values: Mapping[str, Any]) -> bool:
    """Whether other options fix the widths, so that there is nothing to measure."""
    method = str(values.get("method", "slimgpt"))
    return is_baseline(method) or bool(values.get("uniform") or values.get("layer_ratios"))


def target_of(values: Mapping[str, Any]) -> str | None:
    """Name of the target among some options, if one is given."""
    return next((name for name in TARGETS if values.get(name) is not None), None)


class Options(BaseModel):
    """Frozen options; all invalid values are reported together."""

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
        """Validate values and return the options.

        Raises
        ------
        ConfigError
            If any values are invalid; names all of them.
        """
        try:
            return cls(**values)
        except ValidationError as err:
            raise ConfigError(
                "; ".join(map(cls._explain, err.errors())), hint=cls._hint()
            ) from None

    @classmethod
    def _hint(cls) -> str:
        """Tell the user where the options are explained."""
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
    """Format a wrong value, shortened for a message."""
    try:
        text = repr(value)
    except ValueError:  # an int with too many digits to print
        return "(a very large number)"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class _RuntimeOptions(Options):
    """Device and precision of a model."""

    dtype: Annotated[DType, _Underscored] = Field(
        "auto", description="Precision of the weights; auto: that of the checkpoint."
    )
    device: Annotated[str, AfterValidator(_is_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:N or mps; auto: the first GPU, else the CPU."
    )


class _ModelOptions(_RuntimeOptions):
    """Options of a model that runs on text."""

    text_field: str | None = Field(
        None,
        description="Field with the text or chat in local data files. Default: text, messages, "
        "conversations, or the fields of Alpaca.",
    )


def _check_prompts(prompts: str | None, option: str, texts: tuple[str, ...]) -> None:
    if prompts is not None and ("self" not in texts or prompts == "self"):
        raise ValueError(f"prompts are a file or data set for {option}='self', which answers them")


def _sources(texts: tuple[str, ...], prompts: str | None) -> list[str]:
    return [*texts, *([prompts] if prompts is not None else [])]


class PruneConfig(_ModelOptions):
    """Options of ``slimgpt prune``."""

    verb = "prune"

    ratio: float = Field(0.2, ge=0, lt=1, description="Fraction of the block parameters to remove.")
    method: Annotated[Method, _Underscored] = Field(
        "slimgpt", description="Pruning method; all but slimgpt are baselines for comparison."
    )
    schedule: Annotated[Schedule, _Underscored] = Field(
        "log", description="How layer ratios change with depth."
    )
    min_ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Smallest layer ratio: the first layer's, or the last one's if the schedule "
        "decreases. Default: ratio / 8.",
    )
    attention_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Attention's pruning ratio relative to its layer's; 0 never prunes attention. "
        "The FFN absorbs the difference. Default: (1 + 1/g)/2 where g query heads share a kv head.",
    )
    widths: Widths = Field(
        "measured",
        description="scheduled: from the schedule. measured: a sensitivity pass then keeps heads "
        "and channels where they matter most to the model's output. searched: from there, a search "
        "compares models pruned to other widths. Both need --method slimgpt, no --uniform or "
        "--layer-ratios, and about four times as many calibration tokens as FFN channels.",
    )
    search_budget: float = Field(
        15,
        gt=0,
        le=10**6,
        description="Minutes after which a search begins no other trial.",
    )
    query_heads: bool = Field(
        False,
        description="With measured widths, also remove single query heads, equally many of each "
        "kv group of a layer, where that seems to cost less than a whole group.",
    )
    expert_units: ExpertUnits = Field(
        "channels",
        description="What a layer with experts loses: channels, equally many of each expert; whole "
        "experts; or the same number of parameters of both.",
    )
    layer_ratios: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], _Listed] = Field(
        (),
        description="Ratios of the first layers, comma-separated, instead of ratio and schedule; "
        "the other layers are not pruned.",
    )
    drop_layers: int = Field(
        0,
        ge=0,
        le=1023,
        description="Number of whole layers to drop, chosen one after the other by the KL "
        "divergence that it costs; the FFN before them is solved again. They count toward the "
        "ratio or target; without one, nothing else is removed.",
    )
    target_params: Annotated[int | None, _Count] = Field(
        None,
        ge=1,
        le=10**15,
        description="Most parameters that the result may have, embeddings included, e.g. 80M or "
        "1.2B, instead of a ratio.",
    )
    target_size: ByteSize | None = Field(
        None,
        ge=1,
        le=BYTES,
        description="Most bytes that the weight files of the result may have, e.g. 200MB (10^6) or "
        "200MiB (2^20), instead of a ratio; --target-type says in which format.",
    )
    target_type: Annotated[Literal["auto", GgufType], _Lowered] = Field(
        "auto",
        description="What --target-size is the size of; auto: the safetensors files in --dtype; a "
        "type of `slimgpt export`: the GGUF file with matrices of that type.",
    )
    target_kv_cache: Annotated[float | None, _Factor] = Field(
        None,
        gt=0,
        le=1,
        description="Largest KV cache of the result, relative to the dense model's (layers × kv "
        "heads × head_dim), e.g. 0.5x, instead of a ratio. Only attention is pruned then, by "
        "default with the schedule uniform.",
    )
    target_latency: Annotated[float | None, _Factor] = Field(
        None,
        gt=0,
        le=1,
        description="Largest predicted latency of the result at batch size 1, relative to the "
        "dense model's, e.g. 0.6x, instead of a ratio. The times of its sublayers are measured on "
        "this machine and kept, or read from --latency-table.",
    )
    latency_phase: Phase = Field(
        "decode",
        description="What --target-latency is the latency of; decode: a token after a text; "
        "prefill: the first token.",
    )
    latency_table: str | None = Field(
        None,
        description="File of `slimgpt latency`, of this or another machine, for --target-latency.",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=BATCH,
        description="Number of devices that share every layer: its kv heads, its query heads and "
        "each device's share of FFN channels (in multiples of --multiple-of) come out even. A "
        "layer with fewer kv heads than devices keeps a number that divides theirs.",
    )
    calibration: Annotated[tuple[str, ...], _Listed] = Field(
        ("c4", "self"),
        min_length=1,
        description="Texts in equal parts, comma-separated: data sets, local "
        ".txt/.jsonl/.json/.parquet files (the first three also as .gz or .zst), directories of "
        "such files, or self (text that the model generates).",
    )
    prompts: str | None = Field(
        None,
        description="Data set, local file or directory with prompts (.txt: one per line), which "
        "the model answers: prompts and answers make the text of self.",
    )
    nsamples: int = Field(128, ge=1, le=LENGTH, description="Number of calibration samples.")
    seqlen: int = Field(2048, ge=2, le=LENGTH, description="Tokens in each calibration sample.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Random seed.")
    damping: float = Field(
        0.01, gt=0, le=0.1, description="Damping of the Hessian, relative to its diagonal."
    )
    damping_mode: Annotated[DampingMode, _Underscored] = Field(
        "relative",
        description="Damping relative to each channel's own diagonal entry, or to their mean.",
    )
    channel_selection: Annotated[ChannelSelection, _Underscored] = Field(
        "greedy",
        description="Remove FFN channels one at a time, or in the paper's shrinking batches.",
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
        description="Fraction of the error inherited from earlier layers that each sublayer "
        "corrects; 0 (the paper's) saves the forward pass of the dense model.",
    )
    refit_epochs: int = Field(
        1,
        ge=0,
        le=BATCH,
        description="Epochs of fine-tuning of each pruned FFN on the calibration tokens, to match "
        "its target output; 0 (the paper's) skips this.",
    )
    multiple_of: int = Field(
        8,
        ge=1,
        le=COUNT,
        description="Round FFN widths to multiples of this: 32 for GGUF's q8_0, Q4_0 and other "
        "blocks of 32, 256 for its K-quants, the group size (often 128) for GPTQ and AWQ.",
    )
    uniform: bool = Field(
        False, description="Same width in every layer; the result is a stock model class."
    )
    preset: Preset = Field(
        "default",
        description="Set of defaults; paper: the published algorithm; exact: the same without its "
        "approximations.",
    )
    activation_memory: ByteSize = Field(
        ByteSize(4 * 10**9),
        le=BYTES,
        description="Memory for activations, e.g. 8GB. A larger residual stream goes to a "
        "memory-mapped file, and so do the experts of a layer that are larger; sublayer "
        "activations beyond it are computed twice.",
    )
    max_shard_size: ByteSize = Field(
        ByteSize(5 * 10**9),
        ge=1,
        le=BYTES,
        description="Maximum size of a weight file, e.g. 2GB.",
    )

    @property
    def sources(self) -> list[str]:
        """Names of the texts to calibrate on, and of the prompts."""
        return _sources(self.calibration, self.prompts)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        defaults = dict(PRESETS.get(str(values.get("preset", "default")), {}))
        if values.get("uniform") or values.get("target_kv_cache") is not None:
            defaults["schedule"] = "uniform"
        if _widths_are_given(values):
            defaults["widths"] = "scheduled"
        if values.get("drop_layers") and not (values.get("layer_ratios") or target_of(values)):
            defaults["ratio"] = 0.0
        return defaults | values

    @model_validator(mode="before")
    @classmethod
    def _check_what_decides_the_ratios(cls, values: dict[str, Any]) -> dict[str, Any]:
        # Runs before the preset fills in a schedule.
        idle = {"ratio", "schedule", "min_ratio", "uniform"} & values.keys()
        if values.get("drop_layers"):
            idle.add("drop_layers")
        if values.get("layer_ratios") and idle:
            raise ValueError(f"layer_ratios leaves nothing to decide to {', '.join(sorted(idle))}")
        if values.get("target_kv_cache") is not None and "attention_share" in values:
            raise ValueError("target_kv_cache leaves nothing to decide to attention_share")
        given = [
            name
            for name in ("ratio", "layer_ratios", *TARGETS)
            if values.get(name) not in (None, (), [], "")
        ]
        if target_of(values) and len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        others = (names for method, names in OWN_OPTIONS.items() if method != self.method)
        if idle := set().union(*others) & self.model_fields_set:
            idle = {"preset"} if self.preset != "default" else idle
            raise ValueError(f"method={self.method!r} has no {', '.join(sorted(idle))}")
        if self.uniform and self.schedule != "uniform":
            raise ValueError(
                f"uniform=True gives every layer the same width, but schedule={self.schedule!r}"
            )
        if "search_budget" in self.model_fields_set and self.widths != "searched":
            raise ValueError(f"widths={self.widths!r} has no search_budget")
        if self.widths != "scheduled" and _widths_are_given(self.model_dump()):
            raise ValueError(
                f"widths={self.widths!r} is for the method slimgpt, without uniform and "
                "without layer_ratios"
            )
        if self.target_type != "auto" and self.target_size is None:
            raise ValueError(f"without target_size, target_type={self.target_type!r} does nothing")
        idle = {"latency_phase", "latency_table"} & self.model_fields_set
        if idle and self.target_latency is None:
            raise ValueError(f"without target_latency, {', '.join(sorted(idle))} would do nothing")
        if self.query_heads and (
            self.target_kv_cache or self.target_latency or self.target_type != "auto"
        ):
            raise ValueError(
                "query_heads=True has no place beside target_kv_cache, which is about kv heads, "
                "target_latency, because only whole groups are timed, or target_type, because only "
                "whole groups have a size in a GGUF file"
            )
        if (
            self.min_ratio is not None
            and self.min_ratio > self.ratio
            and not target_of(self.model_dump())
        ):
            raise ValueError(f"min_ratio={self.min_ratio} is above ratio={self.ratio}")
        if self.min_group_size > self.max_group_size:
            raise ValueError(
                f"min_group_size={self.min_group_size} is above "
                f"max_group_size={self.max_group_size}"
            )
        if len(set(self.calibration)) < len(self.calibration):
            raise ValueError(f"calibration={','.join(self.calibration)!r} has a text twice")
        _check_prompts(self.prompts, "calibration", self.calibration)
        if self.nsamples < len(self.calibration):
            raise ValueError(
                f"nsamples={self.nsamples} is too few for {len(self.calibration)} texts of "
                f"calibration={','.join(self.calibration)!r}"
            )
        return self


class LatencyConfig(_RuntimeOptions):
    """Options of ``slimgpt latency``."""

    verb = "latency"

    phase: Phase = Field(
        "decode", description="decode: a token after a text; prefill: the first token."
    )
    context: int | None = Field(
        None,
        ge=1,
        le=LENGTH,
        description="Tokens before the one that is decoded, or of the prompt. Default: 512, or "
        "half of the model's context if that is shorter.",
    )


class EvalConfig(_ModelOptions):
    """Options of ``slimgpt eval``."""

    verb = "eval"

    data: Annotated[tuple[str, ...], _Listed] = Field(
        ("wikitext2",),
        description="Texts for perplexity: data sets, local files or directories, comma-separated. "
        "If only --tasks is given, no perplexity is measured.",
    )
    seqlen: Annotated[tuple[Annotated[int, Field(ge=2, le=LENGTH)], ...], _Listed] = Field(
        (2048,), min_length=1, description="Window lengths in tokens, comma-separated."
    )
    max_tokens: int | None = Field(
        None, ge=2, le=10**12, description="Maximum tokens of each text. Default: the whole split."
    )
    against: str | None = Field(
        None, description="Base model to evaluate beside it; adds the KL divergence to the base."
    )
    tasks: Annotated[tuple[str, ...], _Listed] = Field(
        (),
        description="commonsense, mmlu, longbench or names of lm-eval tasks, comma-separated.",
    )
    data_dir: Path | None = Field(
        None, description="Folder with the tasks' data (JSON, JSONL, Parquet) instead of the hub."
    )
    limit: int | None = Field(
        None, ge=1, le=COUNT, description="Use only the first N questions of each task."
    )
    num_fewshot: int | None = Field(
        None,
        ge=0,
        le=BATCH,
        description="Solved examples in each prompt. Default: 5 for mmlu, else the task's.",
    )
    batch_size: int = Field(8, ge=1, le=BATCH, description="Requests in one forward pass.")

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"data": ()} | values if values.get("tasks") else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data and not self.tasks:
            raise ValueError("give data or tasks to evaluate on")
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
        "lora",
        description="lora: train adapters on labels; full: all weights; distill: all weights but "
        "the embeddings, to predict what the dense model predicts.",
    )
    adapters: bool = Field(False, description="With distill, train adapters instead of weights.")
    data: Annotated[tuple[str, ...], _Listed] = Field(
        ("alpaca",),
        min_length=1,
        description="Data set, local file or directory: instructions, chats or plain text. With "
        "--tokens, texts in equal parts, comma-separated, also self (text that the dense model "
        "generates); distill: c4,self.",
    )
    tokens: Annotated[int | None, _Count] = Field(
        None,
        ge=2,
        le=LONGEST_TEXT,
        description="Train on so many tokens of text, in windows of --seqlen, e.g. 100k or 1M, and "
        "not on single examples; distill: 1M. Of chats and instructions, the loss counts the "
        "answers alone.",
    )
    minutes: float | None = Field(
        None,
        gt=0,
        le=10**6,
        description="Instead of --tokens: as many tokens as can be drawn, read by the dense model "
        "and trained on in about so many minutes on this machine, which is measured first.",
    )
    max_examples: int | None = Field(
        None, ge=1, le=COUNT, description="Use only the first N examples."
    )
    seqlen: int = Field(
        256,
        ge=2,
        le=LENGTH,
        description="Tokens of a window of text, and at most of an example; distill: 512.",
    )
    rank: int = Field(8, ge=1, le=BATCH, description="Rank of the adapters.")
    alpha: int = Field(
        16, ge=1, le=COUNT, description="LoRA alpha: adapters are scaled by alpha / rank."
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the adapters.")
    learning_rate: float | None = Field(
        1e-4,
        gt=0,
        description="Peak learning rate; cosine decay to 0. distill: 3e-4 × 576 / hidden size, "
        "with --adapters 1e-3 × 576 / hidden size.",
    )
    warmup_steps: int | None = Field(
        10,
        ge=0,
        le=COUNT,
        description="Steps until the peak learning rate; distill: a twentieth of all.",
    )
    epochs: float = Field(1, gt=0, le=10**6, description="Epochs over the data.")
    max_steps: int | None = Field(
        None, ge=1, le=COUNT, description="Train for this many steps instead of epochs."
    )
    batch_size: int = Field(
        64, ge=1, le=COUNT, description="Examples per step, over all processes; distill: 2."
    )
    micro_batch_size: int = Field(
        4, ge=1, le=BATCH, description="Examples per forward pass in one process; distill: 1."
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Compute activations a second time and not hold them: less memory, a third "
        "more time. Default: for models of 10^9 parameters and more.",
    )
    teacher: str | None = Field(
        None,
        description="Dense model, for distill and for the data self. Default: the base model of "
        "the pruning report.",
    )
    top_k: int = Field(
        128,
        ge=1,
        le=BATCH,
        description="Number of the teacher's likeliest tokens whose probabilities are stored at "
        "each position; all others count as one.",
    )
    eval_data: str = Field(
        "wikitext2", description="Text for the held-out perplexity and KL divergence."
    )
    eval_tokens: int = Field(
        16_384, ge=2, le=COUNT, description="Use only its first N tokens; distill: 8192."
    )
    eval_steps: int | None = Field(
        20,
        ge=1,
        le=COUNT,
        description="Steps between evaluations; distill: a tenth of all.",
    )
    save_steps: int | None = Field(
        20,
        ge=1,
        le=COUNT,
        description="Steps between checkpoints to resume from; distill: --eval-steps.",
    )
    report_to: Annotated[tuple[str, ...], _Listed] = Field(
        (), description="Trackers of transformers: tensorboard, wandb, mlflow, …"
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="Random seed of text, adapters, dropout and data order."
    )
    prompts: str | None = Field(
        None,
        description="Data set, local file or directory with prompts (.txt: one per line), which "
        "the dense model answers: they make the text of the data self, and the loss counts the "
        "answers alone.",
    )

    @property
    def sources(self) -> list[str]:
        """Names of the data sets to train on, and of the prompts."""
        return _sources(self.data, self.prompts)

    @property
    def uses_teacher(self) -> bool:
        """Whether the dense model is needed."""
        return self.method == "distill" or "self" in self.data

    @property
    def is_on_text(self) -> bool:
        """Whether it trains on windows of text, and not on examples."""
        return self.tokens is not None or self.minutes is not None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_method(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = {n: v for n, v in values.items() if v is not None or n not in _DISTILL}
        if values.get("method") != "distill":
            return given
        timed = {"tokens": None} if values.get("minutes") is not None else {}
        return _DISTILL | timed | given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        others = set().union(*RECOVERY_OPTIONS.values()) - RECOVERY_OPTIONS[self.method]
        if idle := others & self.model_fields_set:
            having = [name for name, options in RECOVERY_OPTIONS.items() if idle <= options]
            raise ValueError(
                f"method={self.method!r} has no {', '.join(sorted(idle))}; "
                f"did you mean {' or '.join(map(repr, having))}?"
            )
        idle = _ADAPTER_OPTIONS & self.model_fields_set
        if idle and self.method == "distill" and not self.adapters:
            raise ValueError(f"without adapters, {', '.join(sorted(idle))} would do nothing")
        if self.teacher is not None and not self.uses_teacher:
            raise ValueError("a teacher is for method='distill' or data='self'")
        _check_prompts(self.prompts, "data", self.data)
        if {"max_steps", "epochs"} <= self.model_fields_set and self.max_steps is not None:
            raise ValueError(f"max_steps={self.max_steps} leaves nothing to decide to epochs")
        self._check_data()
        return self

    def _check_data(self) -> None:
        texts = ",".join(self.data)
        if not self.is_on_text:
            if self.method == "distill":
                raise ValueError("method='distill' needs a number of tokens or minutes")
            if len(self.data) > 1 or "self" in self.data:
                raise ValueError(f"data={texts!r} is for training on text: give tokens, e.g. 100k")
            return
        name = "tokens" if self.minutes is None else "minutes"
        if self.max_examples is not None:
            raise ValueError(f"{name} leaves nothing to decide to max_examples")
        if self.minutes is not None and self.tokens is not None:
            raise ValueError("give one of tokens and minutes, not both")
        if self.minutes is not None and self.max_steps is not None:
            raise ValueError("minutes leaves nothing to decide to max_steps")
        if len(set(self.data)) < len(self.data):
            raise ValueError(f"data={texts!r} has a text twice")
        if self.tokens is not None and self.tokens < self.seqlen * len(self.data):
            raise ValueError(
                f"tokens={self.tokens} is less than one window of seqlen={self.seqlen} for each "
                f"text of data={texts!r}"
            )


class ExportConfig(Options):
    """Options of ``slimgpt export``."""

    verb = "export"

    to: Literal["gguf"] = Field("gguf", description="Output format; gguf is llama.cpp's.")
    type: Annotated[GgufType, _Underscored] = Field(
        "f16", description="Type of the matrices in the file."
    )


class BenchConfig(_RuntimeOptions):
    """Options of ``slimgpt bench``."""

    verb = "bench"

    engine: Literal["transformers", "llamacpp", "vllm"] = Field(
        "transformers", description="Inference engine; for llamacpp the model is converted first."
    )
    against: str | None = Field(
        None, description="Base model, measured in turns; adds the speed-up over it."
    )
    batch_size: Annotated[tuple[Annotated[int, Field(ge=1, le=BATCH)], ...], _Listed] = Field(
        (1,), min_length=1, description="Batch sizes, comma-separated."
    )
    prompt_length: Annotated[tuple[Annotated[int, Field(ge=1, le=LENGTH)], ...], _Listed] = Field(
        (128, 512), min_length=1, description="Prompt lengths in tokens, comma-separated."
    )
    new_tokens: int = Field(
        64, ge=2, le=LENGTH, description="Tokens to generate for each sequence."
    )
    warmup: int = Field(1, ge=0, le=COUNT, description="Warm-up rounds, discarded.")
    repeats: int = Field(5, ge=1, le=COUNT, description="Measured rounds.")
    threads: int | None = Field(
        None, ge=1, le=2**12, description="CPU threads. Default: PyTorch's."
    )
    plot: Annotated[str | None, AfterValidator(_is_plot)] = Field(
        None, description="File for a plot: .png, .svg or .pdf."
    )


class ReportConfig(_RuntimeOptions):
    """Options of ``slimgpt report``; all of them concern the generated samples."""

    verb = "report"

    against: str | None = Field(
        None, description="Base model; both models then continue a few prompts, side by side."
    )
    prompts: Path | None = Field(
        None, description="Text file with one prompt per line. Default: four built-in prompts."
    )
    new_tokens: int = Field(40, ge=1, le=LENGTH, description="Tokens to generate for each prompt.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        idle = self.model_fields_set - {"against"}
        if idle and self.against is None:
            raise ValueError(f"without against, nothing is generated: {', '.join(sorted(idle))}")
        return self
