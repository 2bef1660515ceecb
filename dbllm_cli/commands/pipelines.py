"""`run`, `status` and `schema`: pipeline files."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dbllm_cli.commands.options import (
    DeviceOption,
    JsonOption,
    NoWaitOption,
    StoreOption,
    TrustOption,
)
from dbllm_cli.commands.stages import is_figure, outcome_json
from dbllm_cli.console import Console, ConsoleProgress, seconds_text, value_text
from dbllm_cli.pipeline.file import Pipeline, load_pipeline
from dbllm_cli.pipeline.plan import PlannedStep, plan_pipeline
from dbllm_cli.pipeline.run import PipelineRun, run_pipeline
from dbllm_cli.pipeline.schema import pipeline_schema
from dbllm_cli.store import Store
from dbllm_cli.store.store import DEFAULT_ROOT

PipelineArgument = Annotated[
    Path, typer.Argument(metavar="PIPELINE", help="pipeline file, e.g. pipelines/quickstart.yaml")
]
ForceStepOption = Annotated[
    list[str],
    typer.Option("--force", metavar="STEP", help="run this step again; may be repeated"),
]
OnlyOption = Annotated[
    str | None, typer.Option("--only", metavar="STEP", help="run this step alone")
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="STEP.KEY=VALUE",
        help="change a setting of the file, e.g. distill.steps=80; may be repeated",
    ),
]


def register(app: typer.Typer) -> None:
    """Add `run`, `status` and `schema`."""
    for name, command in (("run", run), ("status", status), ("schema", schema)):
        app.command(name)(command)


def run(
    pipeline: PipelineArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only tell what would run, and why")
    ] = False,
    force: ForceStepOption = [],  # noqa: B006  typer makes a new list for each call
    only: OnlyOption = None,
    set_: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_ROOT,
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    no_wait: NoWaitOption = False,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="after a failure run the steps that don't need it"),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run the steps of a pipeline file that are not up to date."""
    loaded = load_pipeline(pipeline, set_)
    opened = Store(store)
    console = Console()
    if dry_run:
        _show_plan(console, loaded, plan_pipeline(loaded, opened, force, only), json)
        return
    ended = run_pipeline(
        loaded,
        opened,
        progress=ConsoleProgress(console),
        device=device,
        force=force,
        only=only,
        trust_remote_code=trust_remote_code,
        wait=not no_wait,
        keep_going=keep_going,
    )
    _show_run(console, loaded, ended, json)
    if ended.failures:
        first = ended.failures[0]
        names = ", ".join(failure.step for failure in ended.failures)
        console.error(
            f"failed: {names}; the first, {first.step}: {first.error.message}", first.error.hint
        )
        raise typer.Exit(first.error.exit_code)


def status(
    pipeline: PipelineArgument,
    set_: SetOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_ROOT,
    json: JsonOption = False,
) -> None:
    """Tell which steps of a pipeline file would run, and why."""
    loaded = load_pipeline(pipeline, set_)
    _show_plan(Console(), loaded, plan_pipeline(loaded, Store(store)), json)


def schema() -> None:
    """Print the JSON schema of pipeline files, for editors."""
    Console().print_json(pipeline_schema())


def _show_plan(
    console: Console, pipeline: Pipeline, plan: list[PlannedStep], as_json: bool
) -> None:
    if as_json:
        steps = [_planned_json(planned) for planned in plan]
        console.print_json({"pipeline": str(pipeline.path), "steps": steps})
        return
    rows = [
        (planned.step.name, planned.action, ", ".join(planned.reasons), planned.folder)
        for planned in plan
    ]
    console.print_table(("step", "action", "why", "artifact"), rows)


def _planned_json(planned: PlannedStep) -> dict[str, Any]:
    return {
        "step": planned.step.name,
        "stage": planned.step.stage.name,
        "action": planned.action,
        "reasons": list(planned.reasons),
        "key": planned.key,
        "path": str(planned.folder) if planned.folder else None,
    }


def _show_run(console: Console, pipeline: Pipeline, run: PipelineRun, as_json: bool) -> None:
    if as_json:
        steps = [{"step": outcome.step, **outcome_json(outcome)} for outcome in run.outcomes]
        failed = [
            {"step": each.step, "message": each.error.message, "exit_code": each.error.exit_code}
            for each in run.failures
        ]
        console.print_json(
            {
                "pipeline": str(pipeline.path),
                "steps": steps,
                "failed": failed,
                "left_out": run.left_out,
            }
        )
        return
    rows: list[tuple[object, ...]] = [
        (
            outcome.step,
            "made" if outcome.ran else "up to date",
            seconds_text(outcome.seconds),
            f"{outcome.artifact.record.provenance.peak_memory_mib:.0f} MiB",
            outcome.artifact.path,
            _figures(outcome.metrics),
        )
        for outcome in run.outcomes
    ]
    rows += [(each.step, "failed", "", "", "", each.error.message) for each in run.failures]
    rows += [(name, "left out", "", "", "", "needs a step that failed") for name in run.left_out]
    console.print_table(("step", "", "time", "peak memory", "artifact", "figures"), rows)


def _figures(metrics: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value_text(value)}"
        for name, value in metrics.items()
        if is_figure(name, value)
    )
