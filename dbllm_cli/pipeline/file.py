"""The pipeline file: which steps there are, their settings, and what feeds what."""

import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dbllm_cli.configs import NO_EFFECT, StageConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.machine.paths import path_problem
from dbllm_cli.pipeline.nearest import nearest
from dbllm_cli.pipeline.wiring import MODEL, Draft, Wires, in_order, read_wires
from dbllm_cli.pipeline.yaml_file import Document, Place, read_yaml
from dbllm_cli.stages.spec import STAGES, AnyStage

SCHEMA_VERSION = 1
STEP_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"
_TOP_KEYS = ("schema_version", "model", "steps")
_MODEL_KEYS = ("path", "revision")
_STEP_KEYS = ("stage", "inputs", "config")


@dataclass(frozen=True)
class ModelReference:
    """The full-precision model: a folder, a hub id, a `.gguf` file or `builtin:NAME`."""

    path: str
    revision: str | None = None


@dataclass(frozen=True)
class Step:
    """One use of a stage.

    Attributes:
        name: its name in the file.
        stage: the operation.
        config: its settings.
        inputs: what feeds each slot: names of steps, or `model`.
        line: where it stands in the file.
    """

    name: str
    stage: AnyStage
    config: StageConfig
    inputs: Wires
    line: int


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline; every step comes after those that feed it."""

    path: Path
    model: ModelReference
    steps: tuple[Step, ...]


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline file.

    Args:
        path: the file.
        overrides: settings `STEP.KEY=VALUE` (or `model.path=VALUE`) that replace the file's.

    Raises:
        ConfigError: the file or an override is wrong; says where, what was got, what is valid.
    """
    document = read_yaml(path)
    _check_shape(document)
    for override in overrides:
        _override(document, override)
    model = _read_model(document)
    stages = {name: _read_stage(document, name) for name in document.value["steps"]}
    configs = {name: _read_config(document, name, stage) for name, stage in stages.items()}
    drafts = {name: Draft(name, stage, ("steps", name)) for name, stage in stages.items()}
    wires = {name: read_wires(document, draft, drafts) for name, draft in drafts.items()}
    for name, config in configs.items():
        _check_fit(document, name, config, wires[name])
    return Pipeline(
        path,
        model,
        tuple(
            Step(name, stages[name], configs[name], wires[name], document.lines["steps", name])
            for name in in_order(document, wires)
        ),
    )


def _check_shape(document: Document) -> None:
    _check_keys(document, (), _TOP_KEYS, "a pipeline file")
    version = document.value.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise document.error(
            ("schema_version",),
            f"schema_version must be {SCHEMA_VERSION}, got {reprlib.repr(version)}",
            "upgrade dbllm: pip install --upgrade dbllm"
            if newer
            else f"write `schema_version: {SCHEMA_VERSION}` at the top",
        )
    if not isinstance(document.value.get(MODEL), dict):
        raise document.error(
            (MODEL,),
            f"the pipeline's model must be a mapping, got {document.value.get(MODEL)!r}",
            "write `model: {path: MODEL}`",
        )
    steps = document.value.get("steps")
    if not isinstance(steps, dict) or not steps:
        raise document.error(("steps",), "steps must name at least one step, each with its inputs")
    for name in steps:
        if not re.fullmatch(STEP_NAME, name) or name == MODEL:
            raise document.error(
                ("steps", name),
                f"a step can't be called {name!r}",
                f"use letters, digits, - and _; the name {MODEL} is taken by the model",
            )
        steps[name] = steps[name] or {}
        _check_keys(document, ("steps", name), _STEP_KEYS, f"step {name}")
        for part in ("inputs", "config"):
            steps[name][part] = steps[name].get(part) or {}
            if not isinstance(steps[name][part], dict):
                raise document.error(
                    ("steps", name, part),
                    f"{part} of step {name} must be a mapping, got {steps[name][part]!r}",
                )


def _check_keys(document: Document, place: Place, valid: tuple[str, ...], what: str) -> None:
    value: Any = document.value
    for key in place:
        value = value[key]
    if not isinstance(value, dict):
        raise document.error(
            place, f"{what} must be a mapping with the keys {', '.join(valid)}; got {value!r}"
        )
    for key in value:
        if key not in valid:
            raise document.error(
                (*place, key), f"unknown key {key!r} in {what}", nearest(key, valid)
            )


def _override(document: Document, text: str) -> None:
    target, equals, _ = text.partition("=")
    step, dot, key = target.partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"--set {text}: not of the form STEP.KEY=VALUE", "e.g. distill.steps=80")
    if step == MODEL:
        document.set((MODEL, key), text, as_text=True)
        return
    steps = document.value["steps"]
    if step not in steps:
        raise ConfigError(f"--set {text}: no step is called {step!r}", nearest(step, steps))
    field = _read_stage(document, step).config.model_fields.get(key)
    as_text = field is not None and _is_text(field.annotation)
    document.set(("steps", step, "config", key), text, as_text=as_text)


def _is_text(annotation: Any) -> bool:
    """Whether a setting takes any text: `str`, `str | None`, and files."""
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_text(member) for member in get_args(annotation))
    return annotation is str


def _read_model(document: Document) -> ModelReference:
    _check_keys(document, (MODEL,), _MODEL_KEYS, "model")
    model = document.value[MODEL]
    path, revision = model.get("path"), model.get("revision")
    if not isinstance(path, str) or not path:
        raise document.error(
            (MODEL, "path"),
            f"path of model must be a string, got {path!r}",
            "a folder, a hub id, a .gguf file or builtin:smollm2-135m",
        )
    problem = path_problem(path)
    if problem:
        raise document.error(
            (MODEL, "path"), f"path of model, {reprlib.repr(path)}, can't be a path: {problem}"
        )
    if revision is not None and not isinstance(revision, str):
        raise document.error(
            (MODEL, "revision"),
            f"revision of model must be a string, got {revision!r}",
            "put it in quotes",
        )
    return ModelReference(path, revision)


def _read_stage(document: Document, step: str) -> AnyStage:
    given = document.value["steps"][step].get("stage")
    name = step if given is None else given
    place: Place = ("steps", step) if given is None else ("steps", step, "stage")
    if not isinstance(name, str) or name not in STAGES:
        raise document.error(place, f"no stage is called {name!r}", nearest(str(name), STAGES))
    if step in STAGES and step != name:
        raise document.error(
            place, f"step {step} has the name of a stage, but uses another one, {name}",
            "give the step a name of its own",
        )  # fmt: skip
    return STAGES[name]


def _read_config(document: Document, step: str, stage: AnyStage) -> StageConfig:
    given = document.value["steps"][step]["config"]
    try:
        # Strict JSON: no `true` for 1 and no "40" for 40, yet lists for tuples.
        config: StageConfig = stage.config.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        setting = (first["ctx"]["setting"],) if first["type"] == NO_EFFECT else first["loc"]
        place = ("steps", step, "config", *setting)
        raise document.error(place, *_setting_problem(first, step, stage)) from error
    return config


def _check_fit(document: Document, step: str, config: StageConfig, wires: Wires) -> None:
    try:
        config.require_inputs(wires)
    except ConfigError as error:
        raise document.error(
            ("steps", step), f"step {step}: {error.message}", error.hint
        ) from error


def _setting_problem(error: ErrorDetails, step: str, stage: AnyStage) -> tuple[str, str]:
    hint = f"see the settings with `dbllm {stage.name} --help`"
    if error["type"] == NO_EFFECT:
        problem = f"{error['ctx']['setting']} of step {step} has no effect: "
        return problem + f"it needs {error['ctx']['needs']}", hint
    if not error["loc"]:
        return f"config of step {step}: {error['msg'].removeprefix('Value error, ')}", hint
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return (
            f"stage {stage.name} has no setting {name!r}",
            nearest(name, stage.config.model_fields),
        )
    problem = f"{name} of step {step}: {error['msg']}, got {reprlib.repr(error['input'])}"
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        return problem, nearest(str(error["input"]), choices)
    return problem, hint
