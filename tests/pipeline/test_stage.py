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
)
from dbllm_cli.pipeline.file import Pipeline
from dbllm_cli.pipeline.stage import Outcome, run_stage
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
