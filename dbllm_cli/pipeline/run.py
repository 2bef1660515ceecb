"""Running a stage or a pipeline: what is there is skipped, the rest is made under a lock."""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from dbllm_cli.configs import StageConfig
from dbllm_cli.errors import (
    ArtifactCorruptError,
    ArtifactMissingError,
    DbllmError,
    StageFailedError,
)
from dbllm_cli.pipeline.file import Pipeline
from dbllm_cli.pipeline.lineage import Lineage, lineage_of
from dbllm_cli.pipeline.plan import gather, plan_pipeline
from dbllm_cli.pipeline.provenance import Recorder
from dbllm_cli.pipeline.stopping import stops_on_sigterm
from dbllm_cli.pipeline.wiring import MODEL
from dbllm_cli.progress import Progress
from dbllm_cli.stages.context import Context, Result, members
from dbllm_cli.stages.spec import AnyStage
from dbllm_cli.store import Artifact, Store, canonical_json, digest_of, lineage_key, resolve_model
from dbllm_cli.store.disk import disk_errors, disk_full_error, is_disk_full

METRICS = "metrics.json"


@dataclass(frozen=True)
class Outcome:
    """What a step ended with.

    Attributes:
        step: the step's name; the stage's for a single command.
        artifact: its artifact.
        ran: False when the artifact was there already.
        seconds: how long the making took, now or then; of a run that was resumed, its last part.
        metrics: what the stage measured.
    """

    step: str
    artifact: Artifact
    ran: bool
    seconds: float
    metrics: dict[str, Any]


@dataclass(frozen=True)
class _Making:
    """Everything that the making of one artifact needs."""

    step: str
    spec: AnyStage
    config: StageConfig
    inputs: Mapping[str, Artifact]
    store: Store
    progress: Progress
    device: str
    trust_remote_code: bool
    replace: bool


def run_stage(
    spec: AnyStage,
    config: StageConfig,
    inputs: Mapping[str, Artifact],
    store: Store,
    *,
    progress: Progress,
    device: str = "cpu",
    force: bool = False,
    trust_remote_code: bool = False,
    step: str | None = None,
) -> Outcome:
    """Make what `spec` makes of these settings and inputs, or return it when it is there.

    Args:
        spec: the stage.
        config: its settings.
        inputs: artifacts by slot; the members of a slot that takes many as `slot.0`, `slot.1`, …
        store: where the artifact goes.
        progress: where the stage reports.
        device: torch device.
        force: make it again though it is there.
        trust_remote_code: let transformers run code that comes with a model.
        step: the step's name in a pipeline; the stage's name when absent.

    Raises:
        ArtifactMissingError: an input is missing or of the wrong kind.
        ArtifactCorruptError: the stored artifact is damaged.
        ConfigError: a setting doesn't fit the inputs, a file that the settings name is missing, or
            the store can't be written.
        StageFailedError: another run makes the same, or the disk or the memory ran out.
        StoppedError: SIGTERM came; the same call goes on.
    """
    _check_inputs(spec, inputs)
    config.require_inputs({name.split(".")[0] for name in inputs})
    lineage = lineage_of(spec, config, inputs, store)
    key = lineage_key(lineage)
    again = force or spec.always_runs
    making = _Making(
        step or spec.name, spec, config, inputs, store, progress, device, trust_remote_code, again
    )
    found = None if again else store.find(spec.output, key)
    if found is not None:
        return _outcome(making.step, found, ran=False)
    with stops_on_sigterm(), store.lock(key, f"{making.step} ({spec.output}-{key[:12]})"):
        # Another run may have finished it while this one came for the lock.
        found = None if again else store.find(spec.output, key)
        if found is not None:
            return _outcome(making.step, found, ran=False)
        return _make(making, lineage)


def run_pipeline(
    pipeline: Pipeline,
    store: Store,
    *,
    progress: Progress,
    device: str = "cpu",
    force: Collection[str] = (),
    only: str | None = None,
    trust_remote_code: bool = False,
) -> list[Outcome]:
    """Run every step of a pipeline that is not up to date; what each step ended with, in order.

    Args:
        pipeline: the pipeline.
        store: where its artifacts go.
        progress: where its stages report.
        device: torch device.
        force: steps to run though they are up to date.
        only: the one step to run, on what the store has.
        trust_remote_code: let transformers run code that comes with a model.

    Raises:
        DbllmError: all that `run_stage`, `plan_pipeline` and `resolve_model` raise.
        StageFailedError: also when another run of this pipeline is under way.
    """
    label = f"pipeline {pipeline.path}"
    with stops_on_sigterm(), store.lock(_lock_key(pipeline), label):
        model = resolve_model(pipeline.model.path, pipeline.model.revision, store)
        known = {MODEL: model}
        outcomes: list[Outcome] = []
        for planned in plan_pipeline(pipeline, store, force, only):
            step = planned.step
            inputs = gather(step, known)
            if planned.action == "left out" or inputs is None:
                if planned.artifact is not None:
                    known[step.name] = planned.artifact
                continue
            outcome = run_stage(
                step.stage,
                step.config,
                inputs,
                store,
                progress=progress,
                device=device,
                force=step.name in force,
                trust_remote_code=trust_remote_code,
                step=step.name,
            )
            known[step.name] = outcome.artifact
            done = f"made in {outcome.seconds:.0f} s" if outcome.ran else "up to date"
            progress.note(f"{step.name}: {done}, {outcome.artifact.path}")
            if step.name in force and only is None:
                progress.note(f"to go on from here after a stop, leave out --force {step.name}")
            outcomes.append(outcome)
        return outcomes


def _lock_key(pipeline: Pipeline) -> str:
    """Of a file and what `--set` makes of it: other settings may run beside it."""
    configs = {step.name: step.config.model_dump(mode="json") for step in pipeline.steps}
    return digest_of([str(pipeline.path.resolve()), asdict(pipeline.model), configs])


def _check_inputs(spec: AnyStage, inputs: Mapping[str, Artifact]) -> None:
    slots = {slot.name: slot for slot in spec.inputs}
    for name, artifact in inputs.items():
        slot = slots.get(name.split(".")[0])
        if slot is None:
            raise ArtifactMissingError(
                f"{spec.name} has no input {name}; its inputs are {', '.join(slots)}"
            )
        if artifact.kind not in slot.kinds:
            raise ArtifactMissingError(
                f"{spec.name} takes {' or '.join(slot.kinds)} as {name}; {artifact.path} is of "
                f"kind {artifact.kind}",
                f"see what each input is with `dbllm {spec.name} --help`",
            )
    for slot in spec.inputs:
        if slot.required and not members(inputs, slot.name):
            raise ArtifactMissingError(
                f"{spec.name} needs {slot.name}: {slot.help}",
                f"see what each input is with `dbllm {spec.name} --help`",
            )


def _make(making: _Making, lineage: Lineage) -> Outcome:
    store, key = making.store, lineage_key(lineage)
    recorder = Recorder(making.device)
    scratch = store.scratch(key)
    staging = store.staging()
    try:
        context = Context(
            out=staging,
            scratch=scratch,
            work=store.work,
            progress=making.progress,
            device=making.device,
            trust_remote_code=making.trust_remote_code,
        )
        with _resource_errors(making):
            result: Result[Any] = making.spec.body()(making.config, making.inputs, context)
        with disk_errors(store.root, f"writing {METRICS}"):
            text = _metrics_text(making.step, result.metrics)
            (staging / METRICS).write_text(text, encoding="utf-8")
        provenance = {
            "step": making.step,
            "settings": making.config.model_dump(mode="json"),
            **recorder.record(scratch, result.environment),
        }
        artifact = store.publish(
            staging, making.spec.output, lineage, provenance, replace=making.replace
        )
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return _outcome(making.step, artifact, ran=True)


def _metrics_text(step: str, metrics: dict[str, Any]) -> str:
    try:
        return canonical_json(metrics)
    except (ValueError, TypeError) as error:
        raise StageFailedError(
            f"{step} ended with a figure that is not a number: {error}",
            "a diverged training does this: try a lower learning rate, or compute_dtype float32",
        ) from error


def _outcome(step: str, artifact: Artifact, *, ran: bool) -> Outcome:
    try:
        metrics = json.loads((artifact.path / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError(
            f"artifact {artifact.path} is damaged: its {METRICS} can't be read: {error}",
            f"see all of the damage with `dbllm verify {artifact.path}`",
        ) from error
    seconds = float(artifact.manifest["provenance"].get("seconds", 0.0))
    return Outcome(step, artifact, ran, seconds, metrics)


@contextmanager
def _resource_errors(making: _Making) -> Iterator[None]:
    try:
        yield
    except DbllmError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_full_error(making.store.root, f"running {making.step}") from error
        if _is_out_of_memory(error):
            raise StageFailedError(
                f"{making.step} ran out of memory on {making.device}",
                "lower batch_size or sequence_length; the step then begins anew",
            ) from error
        error.add_note(f"in step {making.step}, stage {making.spec.name}")
        raise


def _is_out_of_memory(error: Exception) -> bool:
    # torch's own class and message, told by name so that torch isn't imported here.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
