"""Command-line flags derived from the fields of a config class."""

import inspect
import re
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator, ByteSize
from pydantic.fields import FieldInfo

Command = Callable[..., None]


def options_of(config: type[BaseModel]) -> Callable[[Command], Command]:
    """Replace a command's ``**options`` by one flag for each field of a config class."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name, field)
            )
            for name, field in config.model_fields.items()
        ]
        command.__signature__ = signature.replace(parameters=[*own, *flags])
        command.__annotations__ |= {flag.name: flag.annotation for flag in flags}
        return command

    return decorate


def _flag(name: str, field: FieldInfo) -> Any:
    """Build the annotation of a flag: type, metavar, help and default as shown."""
    types_ = [arg for arg in _union_args(field.annotation) if arg is not types.NoneType]
    kind = types_[0]
    metavar, default, text = None, field.default, field.description
    if get_origin(kind) is Literal:
        # A list of names as the metavar would be cut off on a narrow terminal.
        text = f"{text} One of {', '.join(map(_dashed, get_args(kind)))}."
        kind, metavar = str, "NAME"
        default = _dashed(str(default))
    elif kind is ByteSize:
        default = default and default.human_readable(decimal=True)
        kind, metavar = str, "BYTES"
    elif get_origin(kind) is tuple:
        kind, metavar, default = str, "A,B,…", ",".join(map(str, default))
    elif any(isinstance(entry, BeforeValidator) for entry in field.metadata):  # it has a unit
        kind, metavar = str, "NUMBER"
    flag = name.replace("_", "-")
    option = typer.Option(
        f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
        help=text,
        metavar=metavar,
        show_default=False if default in (None, "") or kind is bool else str(default),
    )
    return Annotated[kind | None, option]


def _dashed(name: str) -> str:
    """Write a name as on the command line: wanda-sp, but q8_0."""
    return re.sub("(?<=[a-z])_(?=[a-z])", "-", name)


def _union_args(annotation: Any) -> Iterable[Any]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)
