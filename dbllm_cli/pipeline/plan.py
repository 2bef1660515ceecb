"""What a pipeline would run, and why: nothing is made here, and no torch is needed."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError, ConfigError, DbllmError
from dbllm_cli.pipeline.file import Pipeline, Step
from dbllm_cli.pipeline.lineage import keyed_config, lineage_of
from dbllm_cli.pipeline.nearest import nearest
from dbllm_cli.pipeline.wiring import MODEL
from dbllm_cli.store import Artifact, LineageRecord, Store, lineage_key, resolve_model

Action = Literal["run", "up to date", "left out"]


_NEVER_RUN = "never run"


@dataclass(frozen=True)
class PlannedStep:
    """What a run would do with a step.

    Attributes:
        step: the step.
        action: run, up to date, or left out (by --only).
        reasons: why it runs; empty otherwise.
        key: its artifact's key; None while an input is still to be made.
        folder: where its artifact is or will be; None without a key.
        artifact: its artifact, where it is there and stays.
    """

    step: Step
    action: Action
    reasons: tuple[str, ...]
    key: str | None
    folder: Path | None
    artifact: Artifact | None = None


def plan_pipeline(
    pipeline: Pipeline,
    store: Store,
    force: Collection[str] = (),
    only: str | None = None,
) -> list[PlannedStep]:
    """Say for every step whether it would run, and why.

    Args:
        pipeline: the pipeline.
        store: where its artifacts are.
        force: steps to run though they are up to date.
        only: the one step to run; the others are left out.

    Raises:
        ConfigError: a step named by `force` or `only`, or a file named by a setting, is missing.
        ArtifactMissingError: the model is missing, or an input of the step `only`.
        ArtifactCorruptError: an artifact is damaged.
    """
    names = [step.name for step in pipeline.steps]
    for name in (*force, *((only,) if only else ())):
        if name not in names:
            raise ConfigError(f"{pipeline.path} has no step {name!r}", nearest(name, names))
    beside = [name for name in force if only not in (None, name)]
    if beside:
        raise ConfigError(
            f"--force {beside[0]} has no effect beside --only {only}", f"use --only {beside[0]}"
        )
    model = resolve_model(pipeline.model.path, pipeline.model.revision, store, download=False)
    made = [item for item in store.artifacts() if isinstance(item, Artifact)]
    known: dict[str, Artifact] = {} if model is None else {MODEL: model}
    plan: list[PlannedStep] = []
    unusable: dict[str, DbllmError] = {}
    for step in pipeline.steps:
        left_out = only is not None and step.name != only
        try:
            planned = _planned(step, known, store, made, step.name in force, left_out)
        except (ConfigError, ArtifactCorruptError) as error:
            if not left_out:
                raise
            planned = PlannedStep(step, "left out", (), None, None)
            unusable[step.name] = error
        if step.name == only:
            _require_inputs(step, known, unusable)
        if planned.artifact is not None:
            known[step.name] = planned.artifact
        plan.append(planned)
    return plan


def gather(step: Step, known: Mapping[str, Artifact]) -> dict[str, Artifact] | None:
    """The artifacts that feed `step`, as a stage takes them; None when one isn't known."""
    inputs: dict[str, Artifact] = {}
    for name, source in _wires(step):
        if source not in known:
            return None
        inputs[name] = known[source]
    return inputs


def _wires(step: Step) -> list[tuple[str, str]]:
    many = {slot.name for slot in step.stage.inputs if slot.many}
    return [
        (f"{slot}.{number}" if slot in many else slot, source)
        for slot, sources in step.inputs.items()
        for number, source in enumerate(sources)
    ]


def _planned(
    step: Step,
    known: Mapping[str, Artifact],
    store: Store,
    made: list[Artifact],
    forced: bool,
    left_out: bool,
) -> PlannedStep:
    inputs = gather(step, known)
    key = folder = artifact = None
    if inputs is not None:
        key = lineage_key(lineage_of(step.stage, step.config, inputs, store))
        folder = store.folder(step.stage.output, key)
        again = not left_out and (forced or step.stage.always_runs)
        artifact = None if again else store.find(step.stage.output, key)
    if left_out:
        return PlannedStep(step, "left out", (), key, folder, artifact)
    if artifact is not None:
        return PlannedStep(step, "up to date", (), key, folder, artifact)
    reasons = ["forced"] if forced else []
    if step.stage.always_runs:
        reasons.append("always measures")
    unknown = dict.fromkeys(source for _, source in _wires(step) if source not in known)
    if MODEL in unknown:
        reasons.append("model not downloaded yet")
    waiting = [f"input step {source!r} will run" for source in unknown if source != MODEL]
    changes = _changes(step, known, store, made) if not reasons or inputs is None else []
    # That a step never ran is reason enough: the steps before it say the rest.
    reasons += changes if changes == [_NEVER_RUN] else waiting + changes
    return PlannedStep(step, "run", tuple(reasons), key, folder)


def _changes(
    step: Step, known: Mapping[str, Artifact], store: Store, made: list[Artifact]
) -> list[str]:
    now = LineageRecord(
        stage=step.stage.name,
        stage_version=step.stage.version,
        config=keyed_config(step.config, store),
        inputs={name: known[source].digest for name, source in _wires(step) if source in known},
    )
    past = [
        artifact
        for artifact in made
        if artifact.record.provenance.step == step.name
        and artifact.record.lineage.stage == step.stage.name
    ]
    if not past:
        return [_NEVER_RUN]
    differences = [
        _differences(artifact.record.lineage, now, step)
        for artifact in sorted(past, key=_started, reverse=True)
    ]
    return min(differences, key=len)


def _differences(then: LineageRecord, now: LineageRecord, step: Step) -> list[str]:
    found = []
    if then.stage_version != now.stage_version:
        found.append(f"stage version changed: {then.stage_version} -> {now.stage_version}")
    for name, value in now.config.items():
        old = then.config.get(name)
        if name not in then.config:
            found.append(f"setting added: {name}")
        elif old != value:
            found.append(f"setting changed: {name} {_shown(old)} -> {_shown(value)}")
    found += [f"setting removed: {name}" for name in then.config if name not in now.config]
    wires = {name for name, _ in _wires(step)}
    for name in sorted(wires | set(then.inputs)):
        if name not in wires:
            found.append(f"input removed: {name}")
        elif name not in then.inputs:
            found.append(f"input added: {name}")
        elif name in now.inputs and then.inputs[name] != now.inputs[name]:
            found.append(f"input changed: {name}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"file {str(value['sha256'])[:8]}"
    return str(value)


def _started(artifact: Artifact) -> str:
    return artifact.record.provenance.started or ""


def _require_inputs(
    step: Step, known: Mapping[str, Artifact], unusable: Mapping[str, DbllmError]
) -> None:
    missing = [source for _, source in _wires(step) if source not in known and source != MODEL]
    for source in missing:
        if source in unusable:
            raise unusable[source]
    if missing:
        raise ArtifactMissingError(
            f"step {step.name} needs the artifact of {', '.join(dict.fromkeys(missing))}, which is "
            "not in the store",
            f"run it first with `--only {missing[0]}`, or run without --only",
        )
