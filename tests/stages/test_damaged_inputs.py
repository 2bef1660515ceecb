"""No stage reads damage: one changed byte in any file of any input ends it before it starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.stages.spec import STAGES, StageSpec
from dbllm_cli.store import Artifact
from dbllm_cli.store.manifest import build_manifest, manifest_text
from tests.conftest import Workshop

FLIPS_PER_FILE = 3
INPUTS = {
    "init-fdb": {"model": "llama", "calibration": "calibration"},
    "reconstruct": {"student": "start", "model": "llama", "calibration": "calibration"},
    "distill": {"student": "start", "model": "llama", "calibration": "calibration"},
    "pack": {"fdb": "start", "evals.0": "evaluated"},
    "eval-ppl": {"model": "start", "calibration": "calibration"},
    "eval-tasks": {"model": "packed"},
    "bench": {"model": "llama", "packed": "packed"},
}


@pytest.fixture(scope="module")
def made(
    workshop: Workshop, llama: Artifact, calibration: Artifact, start: Artifact
) -> dict[str, Artifact]:
    evaluated = workshop.make("eval-ppl", {"model": start, "calibration": calibration})
    return {
        "llama": llama,
        "calibration": calibration,
        "start": start,
        "evaluated": evaluated,
        "packed": workshop.make("pack", {"fdb": start}),
    }


@pytest.fixture
def no_stage_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(*given: Any) -> None:
        pytest.fail("the stage began")

    monkeypatch.setattr(StageSpec, "body", lambda spec: body)


def changed(path: Path, where: int) -> Callable[[], None]:
    """Flip a bit of byte `where`; what undoes it."""
    before = path.read_bytes()
    path.write_bytes(before[:where] + bytes([before[where] ^ 16]) + before[where + 1 :])
    return lambda: path.write_bytes(before) and None


def test_every_stage_that_reads_artifacts_is_tried() -> None:
    assert set(INPUTS) == set(STAGES) - {"calibrate"}


@pytest.mark.parametrize("stage", INPUTS)
def test_a_changed_byte_of_an_input_ends_a_stage_before_it_starts(
    fresh: Workshop, made: dict[str, Artifact], no_stage_begins: None, stage: str
) -> None:
    generator = np.random.default_rng(0)
    copies = {
        slot: shutil.copytree(made[name].path, fresh.store.root / made[name].path.name)
        for slot, name in INPUTS[stage].items()
        if name != "llama"
    }

    def run() -> None:
        opened = {slot: fresh.store.open(path) for slot, path in copies.items()}
        models = {slot: made[name] for slot, name in INPUTS[stage].items() if name == "llama"}
        fresh.run(stage, opened | models)

    for folder in copies.values():
        for path in sorted(folder.rglob("*.*")):
            for _ in range(FLIPS_PER_FILE):
                where = int(generator.integers(path.stat().st_size))
                undo = changed(path, where)
                with pytest.raises(ArtifactCorruptError) as caught:
                    run()
                assert folder.name in caught.value.message, (path, where)
                assert caught.value.hint
                undo()
    with pytest.raises(pytest.fail.Exception, match="the stage began"):
        run()


SHAPES: list[Any] = [[], None, {}, {"a": 1}, {"a": {"weights": "many"}}, {"a": {"weights": 0}}]


@pytest.mark.parametrize("content", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("slot", "name"),
    [("fdb", "layers.json"), ("evals.0", "metrics.json"), ("evals.0", "windows.json")],
)
def test_figures_of_another_shape_under_right_hashes_are_damage_too(
    fresh: Workshop, made: dict[str, Artifact], slot: str, name: str, content: Any
) -> None:
    inputs = {slot: made[name] for slot, name in INPUTS["pack"].items()}
    whole = inputs[slot]
    folder = shutil.copytree(whole.path, fresh.store.root / whole.path.name)
    (folder / name).write_text(json.dumps(content))
    manifest = build_manifest(folder, whole.kind, whole.manifest["lineage"], {})
    (folder / "manifest.json").write_text(manifest_text(manifest))
    with pytest.raises(ArtifactCorruptError, match=name):
        fresh.run("pack", inputs | {slot: fresh.store.open(folder)})
