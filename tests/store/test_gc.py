import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.errors import StageFailedError
from dbllm_cli.store import Artifact, Store
from dbllm_cli.store.gc import Garbage, collect, find_garbage, reachable, unfinished_scratch


def made(store: Store, kind: str, *inputs: Artifact, **settings: Any) -> Artifact:
    """An artifact made of others."""
    staging = store.staging()
    (staging / "data.bin").write_bytes(bytes(1000))
    lineage = {
        "stage": kind,
        "stage_version": 1,
        "config": settings,
        "inputs": {f"input.{n}": each.digest for n, each in enumerate(inputs)},
    }
    return store.publish(staging, kind, lineage, {"seconds": 0.0}, replace=True)


def whys(store: Store, kept: set[Path] | None, days: int = 30) -> dict[str, str]:
    return {each.path.name: each.why for each in find_garbage(store, kept, days)}


def test_what_an_artifact_was_made_from_stays_with_it(store: Store) -> None:
    text = made(store, "calibration")
    start = made(store, "fdb", text)
    other, packed = made(store, "fdb", text, seed=1), made(store, "packed", start)
    kept = reachable(store, [packed])
    assert kept == {text.path, start.path, packed.path}
    garbage = find_garbage(store, kept, 30)
    assert [each.path for each in garbage] == [other.path]
    assert garbage[0].size > 1000
    collect(store, lambda: garbage)
    assert not other.path.exists()
    assert {each.path for each in store.artifacts()} == kept


def test_without_a_choice_every_artifact_stays(store: Store) -> None:
    made(store, "fdb")
    assert find_garbage(store, None, 30) == []


def test_leftovers_go_and_unfinished_work_stays(store: Store) -> None:
    first = made(store, "fdb")
    made(store, "fdb")  # takes the place of the first, which is kept in .replaced
    key = first.path.name.rpartition("-")[2]
    for name in (key, "f" * 12):
        (store.root / ".scratch" / name).mkdir(parents=True)
        (store.root / ".scratch" / name / "checkpoint").write_text("x")
    (store.root / ".trash" / "half").mkdir(parents=True)
    assert whys(store, None) == {
        f"{first.path.name}-1": "replaced by --force",
        key: "scratch of finished work",
        "half": "left by a gc that was killed",
    }
    assert [each.path.name for each in unfinished_scratch(store)] == ["f" * 12]
    collect(store, lambda: find_garbage(store, None, 30))
    assert whys(store, None) == {}
    assert (store.root / ".scratch" / ("f" * 12) / "checkpoint").is_file()
    assert not (store.root / ".trash").exists()


def test_imported_models_go_by_the_time_of_their_last_use(store: Store) -> None:
    for name, days in (("old", 31), ("new", 29)):
        folder = store.work / "models" / name
        folder.mkdir(parents=True)
        then = time.time() - days * 86_400
        os.utime(folder, (then, then))
    assert list(whys(store, None)) == ["old"]
    assert list(whys(store, None, days=0)) == ["new", "old"]


def test_links_and_files_outside_are_left_alone(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (store.root / ".replaced").mkdir(parents=True)
    (store.root / ".replaced" / "link").symlink_to(outside)
    assert find_garbage(store, set(), 0) == []
    collect(store, list)
    assert (outside / "mine").is_file()


def test_nothing_goes_while_a_run_is_under_way(store: Store) -> None:
    artifact = made(store, "fdb")
    with (
        store.lock("k" * 64, "distill"),
        pytest.raises(StageFailedError, match="a run is under way in the store"),
    ):
        collect(store, lambda: find_garbage(store, set(), 30))
    assert artifact.path.is_dir()


def test_nothing_goes_between_two_steps_of_a_run(store: Store) -> None:
    artifact = made(store, "fdb")
    with store.in_use("pipeline p.yaml"):
        with pytest.raises(StageFailedError, match=r"process .* \(pipeline p\.yaml\)"):
            collect(store, lambda: find_garbage(store, set(), 30))
        with store.in_use("step"):  # as a step of the run does
            pass
    assert artifact.path.is_dir()
    assert not list(store.locks.glob("run-*"))
    collect(store, lambda: find_garbage(store, set(), 30))
    assert not artifact.path.exists()


def test_a_run_that_begins_during_gc_waits_until_it_has_ended(store: Store) -> None:
    begun: list[str] = []

    def use() -> None:
        with store.in_use("run"):
            begun.append("run")

    run = threading.Thread(target=use)

    def find() -> list[Garbage]:
        run.start()
        run.join(timeout=1)
        assert begun == []
        assert not list(store.locks.glob("run-*"))
        return []

    collect(store, find)
    run.join(timeout=30)
    assert begun == ["run"]


def test_the_lock_of_a_killed_run_holds_nothing_back(store: Store) -> None:
    store.locks.mkdir(parents=True)
    (store.locks / "run-0123.lock").touch()
    collect(store, list)
    assert not (store.locks / "run-0123.lock").exists()
