from collections.abc import Callable
from pathlib import Path

import pytest

from dbllm_cli.store import Artifact, Store, disk

Publish = Callable[..., Artifact]


@pytest.fixture
def steps(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every `sync` and `rename`, in order; what lies in the staging folder by its place there."""
    done: list[str] = []
    sync, rename = disk.sync, Path.rename

    def name(path: Path) -> str:
        inner = path.relative_to(store.root).parts
        return "/".join(("new", *inner[2:])) if inner[:1] == (".staging",) else "/".join(inner)

    def watched_sync(path: Path) -> None:
        done.append(f"sync {name(path)}")
        sync(path)

    def watched_rename(path: Path, target: Path) -> Path:
        done.append(f"rename {name(path)} to {name(target)}")
        return rename(path, target)

    monkeypatch.setattr(disk, "sync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    return done


CONTENT = {
    "sync new/inner/data.txt", "sync new/metrics.json", "sync new/manifest.json",
    "sync new/inner", "sync new",
}  # fmt: skip


def test_an_artifact_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    publish: Publish, steps: list[str]
) -> None:
    artifact = publish()
    assert set(steps[:-2]) == CONTENT
    assert steps[-2:] == [f"rename new to {artifact.path.name}", "sync "]


def test_what_is_replaced_is_aside_on_the_disk_before_the_new_one_has_its_name(
    publish: Publish, steps: list[str]
) -> None:
    name = publish("old").path.name
    steps.clear()
    publish("new", replace=True)
    assert set(steps[:-4]) == CONTENT
    assert steps[-4:] == [
        f"rename {name} to .replaced/{name}-1", "sync .replaced", f"rename new to {name}", "sync ",
    ]  # fmt: skip


def test_sync_asks_the_system_for_it_and_closes_what_it_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(disk.os, "open", lambda path, flags: asked.append(f"open {path}") or 7)
    monkeypatch.setattr(disk.os, "fsync", lambda number: asked.append(f"fsync {number}"))
    monkeypatch.setattr(disk.os, "close", lambda number: asked.append(f"close {number}"))
    disk.sync(tmp_path)
    assert asked == [f"open {tmp_path}", "fsync 7", "close 7"]
