"""One command per stage, made from what `stages.spec` and its config model say about it."""

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from dbllm_cli.commands.options import (
    DeviceOption,
    JsonOption,
    ModelRevisionOption,
    NoWaitOption,
    StoreOption,
    TrustOption,
    build_config,
    config_parameters,
)
from dbllm_cli.console import Console, ConsoleProgress, seconds_text
from dbllm_cli.pipeline.stage import Outcome, run_stage
from dbllm_cli.stages.spec import STAGES, AnyStage, Slot
from dbllm_cli.store import Artifact, Store, resolve_input
from dbllm_cli.store.store import DEFAULT_ROOT

ForceOption = Annotated[bool, typer.Option("--force", help="run again and replace what is there")]


def register(app: typer.Typer) -> None:
    """Add a command for every stage."""
    for spec in STAGES.values():
        app.command(spec.name, help=spec.help)(_command(spec))


def _command(spec: AnyStage) -> Callable[..., None]:
    def command(**values: Any) -> None:
        _run(spec, values)

    # typer reads the parameters from here.
    command.__signature__ = Signature(_parameters(spec))  # type: ignore[attr-defined]
    return command


def _parameters(spec: AnyStage) -> list[Parameter]:
    running: dict[str, tuple[Any, Any]] = {
        "store": (StoreOption, DEFAULT_ROOT),
        "device": (DeviceOption, "cpu"),
        "force": (ForceOption, False),
        "trust_remote_code": (TrustOption, False),
        "no_wait": (NoWaitOption, False),
        "json": (JsonOption, False),
    }
    if _takes_model(spec):
        running["model_revision"] = (ModelRevisionOption, None)
    return [
        *(_slot_parameter(slot) for slot in spec.inputs),
        *config_parameters(spec.config),
        *(
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in running.items()
        ),
    ]


def _slot_parameter(slot: Slot) -> Parameter:
    default: Any
    annotation: Any
    if slot.many:
        default = typer.Option([], help=slot.help, metavar="<artifact>, repeatable")
        annotation = list[str]
    else:
        given = ... if slot.required else None
        default = typer.Argument(given, help=slot.help, metavar=slot.name.upper())
        annotation = str if slot.required else str | None
    return Parameter(slot.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _takes_model(spec: AnyStage) -> bool:
    return any("model" in slot.kinds for slot in spec.inputs)


def _run(spec: AnyStage, values: Mapping[str, Any]) -> None:
    config = build_config(spec.config, values, spec.name)
    store = Store(values["store"])
    console = Console()
    outcome = run_stage(
        spec,
        config,
        _open_inputs(spec, values, store),
        store,
        progress=ConsoleProgress(console),
        device=values["device"],
        force=values["force"],
        trust_remote_code=values["trust_remote_code"],
        wait=not values["no_wait"],
    )
    _show(console, spec, outcome, values["json"])


def _open_inputs(spec: AnyStage, values: Mapping[str, Any], store: Store) -> dict[str, Artifact]:
    revision = values.get("model_revision")
    inputs = {}
    for slot in spec.inputs:
        given = values[slot.name]
        if slot.many:
            for index, reference in enumerate(given):
                inputs[f"{slot.name}.{index}"] = resolve_input(reference, slot.kinds, store)
        elif given is not None:
            inputs[slot.name] = resolve_input(given, slot.kinds, store, revision)
    return inputs


def _show(console: Console, spec: AnyStage, outcome: Outcome, as_json: bool) -> None:
    done = f"done in {seconds_text(outcome.seconds)}" if outcome.ran else "up to date"
    console.note(f"{spec.name}: {done}")
    figures = [(name, value) for name, value in outcome.metrics.items() if is_figure(name, value)]
    if figures:
        console.note_table("", ("figure", "value"), figures)
    if as_json:
        console.print_json(outcome_json(outcome))
    else:
        console.print_line(str(outcome.artifact.path))


def is_figure(name: str, value: object) -> bool:
    """Whether a metric is for people and fits one cell of a table."""
    is_digest = name.endswith("_digest") or name == "comparable"
    return isinstance(value, int | float | str) and not is_digest


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as programs read it."""
    artifact = outcome.artifact
    return {
        "path": str(artifact.path),
        "kind": artifact.kind,
        "digest": artifact.digest,
        "ran": outcome.ran,
        "seconds": outcome.seconds,
        "metrics": outcome.metrics,
    }
