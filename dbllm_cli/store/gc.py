"""What of a store nothing needs any more, and its removal."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dbllm_cli.store.artifact import Artifact
from dbllm_cli.store.disk import disk_errors
from dbllm_cli.store.staging import dead_staging
from dbllm_cli.store.store import Store

_DAY = 86_400


@dataclass(frozen=True)
class Garbage:
    """A folder that may go.

    Attributes:
        path: below the store's root.
        why: why nothing needs it.
        size: bytes of its files.
    """

    path: Path
    why: str
    size: int


def reachable(store: Store, roots: Iterable[Artifact]) -> set[Path]:
    """The folders of the roots and of all that they were made from, as far as the store has it."""
    by_digest: dict[str, list[Artifact]] = {}
    for artifact in store.artifacts():
        if isinstance(artifact, Artifact):
            by_digest.setdefault(artifact.digest, []).append(artifact)
    found: set[Path] = set()
    waiting = list(roots)
    while waiting:
        artifact = waiting.pop()
        if artifact.path not in found:
            found.add(artifact.path)
            for digest in artifact.record.lineage.inputs.values():
                waiting += by_digest.get(digest, [])
    return found


def find_garbage(store: Store, kept: Collection[Path] | None, unused_days: int) -> list[Garbage]:
    """What may go, by path.

    Damaged artifacts stay: `verify` tells of them. Scratch of work that is not finished stays too.

    Args:
        store: the store.
        kept: folders of artifacts that stay; None keeps them all.
        unused_days: imported models that were last used before so many days go.
    """
    return sorted(_garbage(store, kept, unused_days), key=lambda each: each.path)


def unfinished_scratch(store: Store) -> list[Garbage]:
    """Scratch that a stopped run can go on from; it stays."""
    return [each for each in _scratch(store) if each.why == _UNFINISHED]


def collect(store: Store, find: Callable[[], list[Garbage]]) -> list[Garbage]:
    """Remove folders: moved out of the way first, so that a kill leaves each whole or gone.

    Args:
        store: the store.
        find: what may go, asked for once no run is under way and none can begin.

    Returns:
        What was removed.

    Raises:
        StageFailedError: a run is under way in the store, or the disk fails.
        ConfigError: the store can't be written.
    """
    trash = store.root / _TRASH
    with disk_errors(store.root, "removing what is not needed"), store.unused():
        garbage = find()
        trash.mkdir(exist_ok=True)
        for each in garbage:
            each.path.rename(trash / f"{each.path.name}-{uuid.uuid4().hex[:8]}")
        shutil.rmtree(trash)
        return garbage


_TRASH = ".trash"
_UNFINISHED = "unfinished work: the same command goes on from it"


def _garbage(store: Store, kept: Collection[Path] | None, unused_days: int) -> Iterator[Garbage]:
    if kept is not None:
        for artifact in store.artifacts():
            if isinstance(artifact, Artifact) and artifact.path not in kept:
                yield _of(artifact.path, "no pipeline given and no --keep needs it")
    for folder in _folders(store.root / ".replaced"):
        yield _of(folder, "replaced by --force")
    yield from (each for each in _scratch(store) if each.why != _UNFINISHED)
    for parent in (store.root / ".staging", store.root / ".work" / ".staging"):
        for folder in dead_staging(parent):
            yield _of(folder, "left by a run that was killed")
    for folder in _folders(store.root / _TRASH):
        yield _of(folder, "left by a gc that was killed")
    before = time.time() - unused_days * _DAY
    for folder in _folders(store.root / ".work" / "models"):
        if folder.stat().st_mtime < before:
            yield _of(folder, f"an imported model, not used for {unused_days} days")


def _scratch(store: Store) -> Iterator[Garbage]:
    made = {path.name.rpartition("-")[2] for path in _folders(store.root)}
    for folder in _folders(store.root / ".scratch"):
        finished = folder.name in made
        yield _of(folder, "scratch of finished work" if finished else _UNFINISHED)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())


def _of(path: Path, why: str) -> Garbage:
    files = (Path(root) / name for root, _, names in os.walk(path) for name in names)
    return Garbage(path, why, sum(file.lstat().st_size for file in files))
