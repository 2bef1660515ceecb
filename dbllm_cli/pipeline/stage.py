"""Running a stage: an artifact that is there is returned, else it is made under a lock."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dbllm_cli.configs import StageConfig
from dbllm_cli.errors import (
    ArtifactMissingError,
    DbllmError,
    StageFailedError,
)
from dbllm_cli.pipeline.lineage import Lineage, lineage_of
from dbllm_cli.pipeline.provenance import Recorder
from dbllm_cli.pipeline.stopping import stops_on_sigterm
from dbllm_cli.progress import Progress
from dbllm_cli.stages.context import Context, Result, members
from dbllm_cli.stages.spec import AnyStage
from dbllm_cli.store import (
    Artifact,
    Store,
    canonical_json,
    lineage_key,
    read_object,
)
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
    lineage: Lineage

    @property
    def key(self) -> str:
        return lineage_key(self.lineage)

    @property
    def label(self) -> str:
        """What is made, in texts."""
        return f"{self.step} ({self.spec.output}-{self.key[:12]})"

    def found(self) -> Outcome | None:
        """The outcome where the artifact is there and may stay."""
        artifact = None if self.replace else self.store.find(self.spec.output, self.key)
        return None if artifact is None else _outcome(self.step, artifact, ran=False)

    def note_waiting(self, holder: str) -> None:
        self.progress.note(f"{self.label} is being made by {holder}: waiting until it ends")


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
    wait: bool = True,
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
        wait: where another run makes the same, wait until it ends; else fail.

    Raises:
        ArtifactMissingError: an input is missing or of the wrong kind.
        ArtifactCorruptError: the stored artifact or an input is damaged.
        ConfigError: a setting doesn't fit the inputs, a file that the settings name is missing, or
            the store can't be written.
        StageFailedError: the disk or the memory ran out, or another run makes the same and there is
            no waiting.
        StoppedError: SIGTERM came; the same call goes on.
    """
    _check_inputs(spec, inputs)
    config.require_inputs({name.split(".")[0] for name in inputs})
    making = _Making(
        step=step or spec.name,
        spec=spec,
        config=config,
        inputs=inputs,
        store=store,
        progress=progress,
        device=device,
        trust_remote_code=trust_remote_code,
        replace=force or spec.always_runs,
        lineage=lineage_of(spec, config, inputs, store),
    )
    found = making.found()
    if found is not None:
        return found
    with (
        stops_on_sigterm(),
        store.in_use(making.label),
        store.lock(making.key, making.label, making.note_waiting if wait else None),
    ):
        # Another run may have finished it while this one came for the lock.
        return making.found() or _make(making)


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


def _make(making: _Making) -> Outcome:
    store = making.store
    store.require_whole(making.inputs.values(), making.progress)
    recorder = Recorder(making.device)
    scratch = store.scratch(making.key)
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
            staging, making.spec.output, making.lineage, provenance, replace=making.replace
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
    metrics = read_object(artifact, METRICS)
    return Outcome(step, artifact, ran, artifact.record.provenance.seconds, metrics)


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
