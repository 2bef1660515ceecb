import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.errors import (
    ArtifactCorruptError,
    ArtifactMissingError,
    ConfigError,
    StageFailedError,
    StoppedError,
)
from dbllm_cli.pipeline.file import Pipeline
from dbllm_cli.pipeline.run import Outcome, run_pipeline, run_stage
from dbllm_cli.progress import SilentProgress
from dbllm_cli.stages.context import Context
from dbllm_cli.stages.spec import AnyStage
from dbllm_cli.store import Artifact, Store, lineage_key

Load = Callable[..., Pipeline]
Metrics = dict[str, Any]
Body = Callable[[Any, Mapping[str, Artifact], Context], Metrics]
SetBody = Callable[[str, Body], None]
Run = Callable[..., Outcome]


@pytest.fixture
def gather(stages: dict[str, AnyStage], store: Store, model: Artifact) -> Run:
    """Run the stage `gather` on the model."""

    def run(letters: int = 3, **options: Any) -> Outcome:
        spec = stages["gather"]
        config = spec.config(letters=letters)  # type: ignore[call-arg]
        return run_stage(
            spec, config, {"model": model}, store, progress=SilentProgress(), **options
        )

    return run


def run(pipeline: Pipeline, store: Store, **options: Any) -> list[Outcome]:
    return run_pipeline(pipeline, store, progress=SilentProgress(), **options).outcomes


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def empty(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def test_a_stage_runs_once_and_is_found_after(gather: Run, store: Store, ran: list[str]) -> None:
    first, second = gather(), gather()
    assert ran == ["gather"]
    assert (first.ran, second.ran) == (True, False)
    assert first.artifact == second.artifact
    assert second.metrics == {"inputs": ["model"]}
    assert json.loads((first.artifact.path / "metrics.json").read_text()) == second.metrics
    assert store.verify(first.artifact) == []


def test_other_settings_make_another_artifact(gather: Run, ran: list[str]) -> None:
    assert gather(3).artifact.path != gather(4).artifact.path
    assert ran == ["gather", "gather"]


def test_how_it_was_made_is_kept_beside_it(gather: Run, ran: list[str]) -> None:
    provenance = gather(device="cpu", step="mine").artifact.manifest["provenance"]
    assert provenance["step"] == "mine"
    assert provenance["device"] == "cpu"
    assert provenance["peak_memory_mib"] > 1
    assert provenance["seconds"] >= 0
    assert provenance["processor_seconds"] >= 0
    assert set(provenance["versions"]) == {"python", "dbllm", "torch", "transformers", "lm_eval"}


def test_nothing_is_left_behind(gather: Run, store: Store, ran: list[str]) -> None:
    gather()
    assert empty(store.root / ".staging")
    assert empty(store.root / ".scratch")


def test_a_failed_stage_keeps_its_scratch_and_resumes_from_it(
    gather: Run, store: Store, set_body: SetBody
) -> None:
    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        checkpoint = ctx.scratch / "step"
        done = int(checkpoint.read_text()) if checkpoint.exists() else 0
        checkpoint.write_text(str(done + 1))
        (ctx.out / "half").write_text("x")
        if done == 0:
            raise RuntimeError("boom")
        return {"resumed_at": done}

    set_body("gather", body)
    with pytest.raises(RuntimeError, match="boom") as caught:
        gather()
    assert caught.value.__notes__ == ["in step gather, stage gather"]
    assert store.artifacts() == []
    assert empty(store.root / ".staging")
    assert gather().metrics == {"resumed_at": 1}
    assert empty(store.root / ".scratch")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "no space left on the disk of the store"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
        (MemoryError(), "gather ran out of memory on cpu"),
        (type("OutOfMemoryError", (RuntimeError,), {})(), "gather ran out of memory on cpu"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "ran out of memory"),
    ],
)
def test_a_lack_of_disk_or_memory_is_told(
    gather: Run, set_body: SetBody, error: Exception, message: str
) -> None:
    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        raise error

    set_body("gather", body)
    with pytest.raises(StageFailedError, match=message) as caught:
        gather()
    assert caught.value.hint


def test_a_figure_that_is_no_number_is_told(gather: Run, store: Store, set_body: SetBody) -> None:
    set_body("gather", lambda config, inputs, ctx: {"loss": float("nan")})
    with pytest.raises(StageFailedError, match="gather ended with a figure that is not a number"):
        gather()
    assert store.artifacts() == []


def test_a_stage_being_made_elsewhere_fails_at_once(
    gather: Run, store: Store, ran: list[str]
) -> None:
    key = lineage_key(gather().artifact.manifest["lineage"])
    with (
        store.lock(key, "gather"),
        pytest.raises(StageFailedError, match="held by another run: process"),
    ):
        gather(force=True, wait=False)


def test_damage_is_told_and_force_makes_it_anew(gather: Run, store: Store, ran: list[str]) -> None:
    path = gather().artifact.path
    (path / "content.json").write_text("")
    with pytest.raises(ArtifactCorruptError) as caught:
        gather()
    assert "--force" in caught.value.hint
    assert store.verify(gather(force=True).artifact) == []


def test_a_store_that_can_not_be_written_is_told(gather: Run, store: Store, ran: list[str]) -> None:
    store.root.write_text("a file")
    with pytest.raises(ConfigError, match="can't be written"):
        gather()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "train needs student"),
        ({"student": "fdb"}, "train needs calibration"),
        ({"student": "eval", "calibration": "calibration"}, "takes fdb as student; .* kind eval"),
        ({"teacher": "fdb"}, "train has no input teacher"),
    ],
)
def test_inputs_that_do_not_fit_are_told(
    stages: dict[str, AnyStage], store: Store, inputs: dict[str, str], message: str
) -> None:
    spec = stages["train"]
    given = {name: Artifact(Path(name), kind, "d", {}) for name, kind in inputs.items()}
    with pytest.raises(ArtifactMissingError, match=message):
        run_stage(spec, spec.config(), given, store, progress=SilentProgress())


def test_a_pipeline_runs_every_step_then_only_what_measures(
    load: Load, store: Store, ran: list[str]
) -> None:
    outcomes = run(load(), store)
    assert [outcome.step for outcome in outcomes] == [
        "gather", "start", "train", "measure", "teacher", "bind", "clock",
    ]  # fmt: skip
    assert outcomes[5].metrics == {"inputs": ["fdb", "evals.0", "evals.1"]}
    ran.clear()
    assert [outcome.ran for outcome in run(load(), store)] == [False] * 6 + [True]
    assert ran == ["clock"]


def test_a_forced_step_with_equal_bytes_leaves_later_steps_up_to_date(
    load: Load, store: Store, ran: list[str]
) -> None:
    run(load(), store)
    ran.clear()
    run(load(), store, force=["start"])
    assert ran == ["start", "clock"]


def test_a_forced_step_with_other_bytes_runs_later_steps(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    run(load(), store)
    ran.clear()

    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        (ctx.out / "content.json").write_text("other")
        return {}

    set_body("start", body)
    run(load(), store, force=["start"])
    assert ran == ["train", "measure", "bind", "clock"]


def test_one_step_alone_runs_on_what_the_store_has(
    load: Load, store: Store, ran: list[str]
) -> None:
    run(load(), store)
    ran.clear()
    outcomes = run(load("", "", "train.steps=80"), store, only="train")
    assert [outcome.step for outcome in outcomes] == ["train"]
    assert ran == ["train"]


def test_an_interrupted_pipeline_goes_on_where_it_was(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    def interrupted(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        raise KeyboardInterrupt

    def whole(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        ran.append("train")
        return {}

    set_body("train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(load(), store)
    ran.clear()
    set_body("train", whole)
    run(load(), store)
    assert ran == ["train", "measure", "measure", "bind", "clock"]


def test_a_second_run_fails_at_the_step_that_is_being_made_where_it_may_not_wait(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        if config.steps == 40:
            held = r"train \(fdb-.*\) is held by another run"
            with pytest.raises(StageFailedError, match=held):
                run(load(), store, wait=False)
            run(load("", "", "train.steps=50"), store)
        ran.append(f"train {config.steps}")
        return {}

    set_body("train", body)
    run(load(), store)
    assert [name for name in ran if name.startswith("train")] == ["train 50", "train 40"]


def test_after_a_failure_steps_that_don_t_need_it_go_on_where_they_may(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        raise StageFailedError("the loss is nan", "lower the rate")

    set_body("train", body)
    ended = run_pipeline(load(), store, progress=SilentProgress(), keep_going=True)
    assert [failure.step for failure in ended.failures] == ["train"]
    assert [outcome.step for outcome in ended.outcomes] == ["gather", "start", "teacher"]
    assert ended.left_out == ["measure", "bind", "clock"]
    with pytest.raises(StageFailedError, match="the loss is nan"):
        run_pipeline(load(), store, progress=SilentProgress())


def test_sigterm_stops_a_run_that_keeps_going(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        raise StoppedError("stopped by SIGTERM")

    set_body("train", body)
    with pytest.raises(StoppedError):
        run_pipeline(load(), store, progress=SilentProgress(), keep_going=True)


def test_after_a_forced_step_the_way_to_go_on_is_told(
    load: Load, store: Store, ran: list[str]
) -> None:
    notes = Notes()
    run_pipeline(load(), store, progress=notes, force=["start"])
    made = next(n for n, line in enumerate(notes.lines) if line.startswith("start: made"))
    assert "leave out --force start" in notes.lines[made + 1]
    assert sum("--force" in line for line in notes.lines) == 1


def test_every_step_tells_how_it_ended(load: Load, store: Store, ran: list[str]) -> None:
    notes = Notes()
    run_pipeline(load(), store, progress=notes)
    run_pipeline(load(), store, progress=notes)
    assert notes.lines[0].startswith("gather: made in 0 s, ")
    assert notes.lines[7].startswith("gather: up to date, ")


def test_a_missing_text_file_stops_before_anything_runs(
    load: Load, store: Store, ran: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.txt"):
        run(load("  start: {", "  more: {stage: gather, inputs: {model: model}, "
                 "config: {text: /nowhere.txt}}\n  start: {"), store)  # fmt: skip
    assert ran == []
