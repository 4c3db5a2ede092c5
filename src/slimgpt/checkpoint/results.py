"""Read the reports and results in a model's directory into typed values."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    GetPydanticSchema,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from slimgpt.config import PruneConfig, RecoverConfig
from slimgpt.errors import ConfigError

log = logging.getLogger(__name__)

REPORT_FILE = "pruning_report.json"

PERPLEXITY_FILE = "eval/perplexity.json"

TASKS_FILE = "eval/tasks.json"

SPEED_FILE = "eval/speed.json"

RECOVERY_FILE = "recovery_report.json"

SECONDS_FOR_OTHERS = 30.0  # waits so long for another process that writes its results

LARGEST_NUMBER = 1e100

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Read(BaseModel):
    """The keys of a report that are read; other keys are ignored."""

    model_config = ConfigDict(extra="allow")


class _SublayerShape(_Read):
    kind: Literal["attention", "ffn", "experts"]
    num_units: Count
    parts: Count = 1


class _Shape(_Read):
    sublayers: list[_SublayerShape] = Field(min_length=1)


class _Routing(_Read):
    rerouted: FiniteFloat
    load_shift: FiniteFloat
    samples_factor: FiniteFloat
    few_tokens: list[Count] = []


class _Sublayer(_Read):
    kind: Literal["attention", "ffn", "experts"]
    keep: list[Count]
    parts: list[Count] = []
    relative_error: float
    routing: _Routing | None = None


class _Block(_Read):
    block: Count
    sublayers: list[_Sublayer] = Field(min_length=1)


class _Calibration(_Read):
    data: str
    nsamples: Count
    seqlen: Count


class _Target(_Read):
    option: str
    asked: int | FiniteFloat
    reached: int | FiniteFloat
    unit: str


class _Sensitivity(_Read):
    widths: list[list[Any]]
    layer_ratios: list[FiniteFloat]
    divergence: FiniteFloat
    costs: list[list[FiniteFloat]]


def _options(config: type[BaseModel], *needed: str) -> Any:
    """Schema of the options in a report: the options of this version, some of them required."""
    fields: dict[str, Any] = {
        name: (field.annotation, ... if name in needed else None)
        for name, field in config.model_fields.items()
    }
    model = create_model(
        config.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
    )
    return GetPydanticSchema(lambda _, handler: handler(model))


class PruningReport(_Read):
    """The content of ``pruning_report.json``."""

    base_model: str
    config: Annotated[Any, _options(PruneConfig, "method", "uniform")]
    dtype: str
    device: str
    calibration: _Calibration
    shapes: list[_Shape]
    widths: list[list[Count | tuple[Count, Count]]]
    layer_ratios: list[FiniteFloat]
    target_ratio: FiniteFloat
    block_ratio: FiniteFloat
    total_ratio: FiniteFloat
    params_before: Count
    params_after: Count
    is_measured: bool
    target: _Target | None = None
    dropped: list[Count] = []
    blocks: list[_Block] = Field(min_length=1)
    sensitivity: _Sensitivity | None = None
    trials: list[FiniteFloat] = []
    seconds: dict[str, FiniteFloat]
    peak_memory_bytes: Count | None
    versions: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, values: Any) -> Any:
        """Read reports of version 0.1 too, where a block was a pair of attention and FFN."""
        if not isinstance(values, dict) or not isinstance(values.get("blocks"), list):
            return values
        if not all(isinstance(block, dict) and "ffn" in block for block in values["blocks"]):
            return values
        units = {"attention": "num_groups", "ffn": "num_channels"}

        def shape(old: Any) -> dict[str, Any]:
            sublayers = ({"kind": kind, "num_units": old[name]} for kind, name in units.items())
            return {"sublayers": list(sublayers)}

        def block(old: Any) -> dict[str, Any]:
            sublayers = (old[kind] | {"kind": kind} for kind in units)
            return {"block": old["block"], "sublayers": list(sublayers)}

        try:
            return values | {
                "shapes": list(map(shape, values["shapes"])),
                "widths": [[old[name] for name in units.values()] for old in values["widths"]],
                "blocks": list(map(block, values["blocks"])),
            }
        except KeyError as err:
            raise ValueError(f"its blocks, widths or shapes lack {err}") from None
        except TypeError:
            raise ValueError("its blocks, widths or shapes have another form") from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = {
            name: len(getattr(self, name))
            for name in ("blocks", "shapes", "widths", "layer_ratios")
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"different numbers of layers: {lengths}")
        for entry in (*self.shapes, *self.blocks):
            kinds = [sublayer.kind for sublayer in entry.sublayers]
            if kinds not in (["attention", "ffn"], ["attention", "experts"]):
                raise ValueError(
                    f"a block has the sublayers {kinds}, not attention and ffn or experts"
                )
        if any(len(width) != 2 for width in self.widths):
            raise ValueError("a block has not two widths")
        return self


class _Budget(_Read):
    minutes: FiniteFloat
    tokens: Count
    measuring: FiniteFloat
    seconds: FiniteFloat


class RecoveryReport(_Read):
    """The content of ``recovery_report.json``."""

    model: str
    teacher: str | None
    config: Annotated[
        Any, _options(RecoverConfig, "method", "batch_size", "learning_rate", "seqlen")
    ]
    data: str
    held_out: str
    steps: Count
    seconds: FiniteFloat
    peak_memory_bytes: Count | None
    train_loss: list[tuple[Count, FiniteFloat]] = Field(min_length=1)
    held_out_perplexity: list[tuple[Count, FiniteFloat]] = Field(min_length=1)
    held_out_kl: list[tuple[Count, FiniteFloat]] = []
    num_examples: Count | None = None
    tokens: Count | None = None
    best_step: Count | None = None
    preparation_seconds: FiniteFloat = 0.0
    budget: _Budget | None = None


def read_typed(file: Path, kind: Any) -> Any:
    """Read a JSON file written by SlimGPT into values of a given type.

    Parameters
    ----------
    file : Path
        The file.
    kind : type
        A type that pydantic validates: a model, a dataclass, or a list of one of these.

    Raises
    ------
    ConfigError
        If the file cannot be read or has another form. The message names the key.
    """
    try:
        content = file.read_bytes()
        values = TypeAdapter(kind).validate_json(content)
        json.loads(content, parse_float=_check_number, parse_int=_check_number)
    except OSError as err:
        raise ConfigError(f"cannot read {file}: {err}", hint="check its permissions") from None
    except OverflowError as err:
        raise ConfigError(
            f"{file} is not as this version writes it: {err}",
            hint="remove the file; if it holds results, measure again",
        ) from None
    except ValidationError as err:
        problem = err.errors(include_url=False)[0]
        if problem["type"] == "json_invalid":
            raise ConfigError(
                f"cannot read {file}: {problem['msg']}",
                hint="the file is broken: write it again, or remove it",
            ) from None
        key = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"{file} is not as this version writes it: {key or 'all of it'}: {problem['msg']}",
            hint="remove the file; if it holds results, measure again",
        ) from None
    return values


def _check_number(text: str) -> None:
    """Refuse numbers that no measurement gives, or that overflow in sums and chart axes."""
    if len(text) > 30 or not abs(float(text)) <= LARGEST_NUMBER:
        raise OverflowError(f"the number {text[:40]} is out of range")


def read_report(file: Path, kind: type[BaseModel]) -> dict[str, Any]:
    """Read a report as validated JSON values; raises the same errors as `read_typed`."""
    return read_typed(file, kind).model_dump(mode="json", exclude_unset=True)
