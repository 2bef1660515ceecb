"""Running a pipeline: what is there is skipped, the rest is made step by step."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from dbllm_cli.errors import DbllmError, StoppedError
from dbllm_cli.pipeline.file import Pipeline
from dbllm_cli.pipeline.plan import gather, plan_pipeline
from dbllm_cli.pipeline.stage import Outcome, run_stage
from dbllm_cli.pipeline.stopping import stops_on_sigterm
from dbllm_cli.pipeline.wiring import MODEL
from dbllm_cli.progress import Progress
from dbllm_cli.store import Store, resolve_model


@dataclass(frozen=True)
class Failure:
    """A step that failed while others went on."""

    step: str
    error: DbllmError


@dataclass(frozen=True)
class PipelineRun:
    """How the steps of a pipeline ended.

    Attributes:
        outcomes: of the steps that are there now, in order.
        failures: steps that failed, in order.
        left_out: steps that need the artifact of one that failed.
    """

    outcomes: list[Outcome]
    failures: list[Failure]
    left_out: list[str]


def run_pipeline(
    pipeline: Pipeline,
    store: Store,
    *,
    progress: Progress,
    device: str = "cpu",
    force: Collection[str] = (),
    only: str | None = None,
    trust_remote_code: bool = False,
    wait: bool = True,
    keep_going: bool = False,
) -> PipelineRun:
    """Run every step of a pipeline that is not up to date.

    Args:
        pipeline: the pipeline.
        store: where its artifacts go.
        progress: where its stages report.
        device: torch device.
        force: steps to run though they are up to date.
        only: the one step to run, on what the store has.
        trust_remote_code: let transformers run code that comes with a model.
        wait: where another run makes the same, wait until it ends; else fail.
        keep_going: after a failure go on with the steps that don't need what failed.

    Raises:
        DbllmError: as `plan_pipeline`, `resolve_model` and, not with `keep_going`, `run_stage`.
    """
    make = partial(
        run_stage,
        store=store,
        progress=progress,
        device=device,
        trust_remote_code=trust_remote_code,
        wait=wait,
    )
    with stops_on_sigterm(), store.in_use(f"pipeline {pipeline.path}"):
        known = {MODEL: resolve_model(pipeline.model.path, pipeline.model.revision, store)}
        run = PipelineRun([], [], [])
        for planned in plan_pipeline(pipeline, store, force, only):
            step, forced = planned.step, planned.step.name in force
            inputs = gather(step, known)
            if planned.action == "left out" or inputs is None:
                if planned.artifact is not None:
                    known[step.name] = planned.artifact
                elif planned.action != "left out":
                    run.left_out.append(step.name)
                continue
            try:
                outcome = make(step.stage, step.config, inputs, force=forced, step=step.name)
            except DbllmError as error:
                if not keep_going or isinstance(error, StoppedError):
                    raise
                progress.note(f"{step.name}: failed: {error.message}")
                run.failures.append(Failure(step.name, error))
                continue
            known[step.name] = outcome.artifact
            run.outcomes.append(outcome)
            _tell(outcome, progress, forced=forced and only is None)
        return run


def _tell(outcome: Outcome, progress: Progress, forced: bool) -> None:
    done = f"made in {outcome.seconds:.0f} s" if outcome.ran else "up to date"
    progress.note(f"{outcome.step}: {done}, {outcome.artifact.path}")
    if forced:
        progress.note(f"to go on from here after a stop, leave out --force {outcome.step}")
