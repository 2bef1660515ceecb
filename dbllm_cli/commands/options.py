"""Command line options: those shared by commands, and those made from a stage's settings."""

import re
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dbllm_cli.configs import InputFile, StageConfig
from dbllm_cli.errors import UsageError

_BOUNDS = {
    "gt": "> {}",
    "ge": ">= {}",
    "lt": "< {}",
    "le": "<= {}",
    "multiple_of": "multiple of {}",
}

ConfigType = TypeVar("ConfigType", bound=StageConfig)


def _known_device(device: str) -> str:
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise typer.BadParameter(f"{device!r} is not one of cpu, cuda, cuda:N, mps, xpu.")
    return device


StoreOption = Annotated[
    Path,
    typer.Option(
        "--store",
        envvar="DBLLM_STORE",
        file_okay=False,
        help="folder of the artifacts",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        callback=_known_device,
        help="where torch computes: cpu, cuda, cuda:1, ...",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object on stdout"),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="let transformers run code that comes with the model",
    ),
]
NoWaitOption = Annotated[
    bool,
    typer.Option("--no-wait", help="fail where another run makes the same, instead of waiting"),
]
ModelRevisionOption = Annotated[
    str | None,
    typer.Option(
        "--model-revision",
        help="commit, tag or branch of a model on the hub",
    ),
]


def option_name(field: str) -> str:
    """The option that sets a field: `num_samples` -> `--num-samples`."""
    return "--" + field.replace("_", "-")


def config_parameters(config: type[StageConfig]) -> list[Parameter]:
    """One keyword parameter with typer's option for every field of a config model."""
    return [_parameter(name, field) for name, field in config.model_fields.items()]


def build_config(config: type[ConfigType], values: Mapping[str, Any], command: str) -> ConfigType:
    """The config that the options of a command describe; `values` may hold more than that.

    Raises:
        UsageError: a value is out of bounds or does not fit another one; names the option.
    """
    try:
        return config.model_validate({name: values[name] for name in config.model_fields})
    except ValidationError as error:
        problems = "; ".join(_problem(each) for each in error.errors())
        raise UsageError(problems, f"dbllm {command} --help") from error


def plain_message(message: str) -> str:
    """A message of pydantic's without the class it puts in front."""
    return message.replace("Value error, ", "")


def _parameter(name: str, field: FieldInfo) -> Parameter:
    kind = _plain_type(field.annotation)
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    metavar = None
    if InputFile in get_args(field.annotation):
        metavar = "<path>"
    elif isinstance(default, list):
        metavar = "<str>, repeatable"
    option = typer.Option(default, help=_help(field), metavar=metavar)
    annotation = kind | None if default is None else kind
    return Parameter(name, Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _plain_type(annotation: Any) -> Any:
    """What typer reads: without `| None` and metadata, and a tuple as a repeated option."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (member for member in get_args(annotation) if member is not NoneType)
        return _plain_type(annotation)
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    return annotation


def _help(field: FieldInfo) -> str:
    bounds = [
        text.format(getattr(rule, name))
        for rule in field.metadata
        for name, text in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    description = field.description or ""
    return f"{description} ({', '.join(bounds)})" if bounds else description


def _problem(error: Any) -> str:
    message = plain_message(error["msg"])
    if not error["loc"]:
        return message
    return f"{option_name(str(error['loc'][0]))}: {message}, got {error['input']!r}"
