"""The store: a folder of finished artifacts, and the places where unfinished ones are made."""

import difflib
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dbllm_cli.errors import ArtifactMissingError, DbllmError, StageFailedError
from dbllm_cli.progress import Progress
from dbllm_cli.store import locks
from dbllm_cli.store.artifact import Artifact
from dbllm_cli.store.digest import DigestCache, file_sha256
from dbllm_cli.store.disk import disk_errors, rename_durably
from dbllm_cli.store.integrity import find_problems, require_whole
from dbllm_cli.store.manifest import (
    MANIFEST,
    build_manifest,
    corrupt,
    lineage_key,
    manifest_text,
    read_manifest,
)
from dbllm_cli.store.references import path_of, shown
from dbllm_cli.store.staging import new_staging

DEFAULT_ROOT = Path("artifacts")
_KEY_LENGTH = 12
_RUN_LOCK, _GC_LOCK = "run-", "gc.lock"


@dataclass(frozen=True)
class DamagedArtifact:
    """A folder of the store that can't be opened, and why."""

    path: Path
    error: DbllmError


class Store:
    """Artifacts under one root. Opening writes nothing; making does, and importing a model."""

    def __init__(self, root: Path = DEFAULT_ROOT) -> None:
        self.root = root

    def folder(self, kind: str, key: str) -> Path:
        """Where the artifact of this kind and key is, or will be."""
        return self.root / f"{kind}-{key[:_KEY_LENGTH]}"

    def find(self, kind: str, key: str) -> Artifact | None:
        """The finished artifact with this key, checked; None when it was never made.

        Raises:
            ArtifactCorruptError: it is there, and damaged.
        """
        folder = self.folder(kind, key)
        if not folder.exists():
            return None
        if not (folder / MANIFEST).exists():
            raise corrupt(folder, f"it has no {MANIFEST}")
        artifact = self._opened(folder)
        if lineage_key(artifact.manifest["lineage"]) != key:
            raise corrupt(folder, "it was made from other inputs than its name says")
        return artifact

    def open(self, reference: str | Path, kinds: tuple[str, ...] = ()) -> Artifact:
        """Open an artifact by its path or its folder's name in the store.

        Raises:
            ArtifactMissingError: it is not there, or not one of `kinds`.
            ArtifactCorruptError: it is damaged.
        """
        wanted = " or ".join(kinds) or "artifact"
        places = (path_of(reference), path_of(reference, self.root))
        folder = next((path for path in places if path.is_dir()), None)
        if folder is None:
            raise ArtifactMissingError(
                f"no {wanted} at {shown(reference)}", self._nearest(str(reference), kinds)
            )
        artifact = self._opened(folder)
        if kinds and artifact.kind not in kinds:
            raise ArtifactMissingError(
                f"{folder} is of kind {artifact.kind}; {wanted} is needed here",
                self._nearest("", kinds),
            )
        return artifact

    def artifacts(self) -> list[Artifact | DamagedArtifact]:
        """Every artifact of the store by name; those that can't be opened come with the reason."""
        found: list[Artifact | DamagedArtifact] = []
        for folder in self._folders():
            try:
                found.append(self._opened(folder))
            except DbllmError as error:
                found.append(DamagedArtifact(folder, error))
        return found

    def verify(self, artifact: Artifact) -> list[str]:
        """Hash every file of an artifact; what is wrong, a line each, empty when all is well."""
        return list(find_problems(artifact, file_sha256))

    def require_whole(self, artifacts: Collection[Artifact], progress: Progress) -> None:
        """Check the hashes of artifacts that will be read; see `integrity.require_whole`.

        Raises:
            ArtifactCorruptError: one is damaged.
        """
        require_whole(artifacts, self.digests, progress)

    @property
    def locks(self) -> Path:
        """Where the locks of what is being made are."""
        return self.root / ".locks"

    @property
    def work(self) -> Path:
        """The store's own work area, made when asked for."""
        return self._made(self.root / ".work")

    def scratch(self, key: str) -> Path:
        """Where the making of `key` keeps what it needs to resume; made when asked for."""
        return self._made(self.root / ".scratch" / key[:_KEY_LENGTH])

    @cached_property
    def digests(self) -> DigestCache:
        """Remembered digests of large files."""
        return DigestCache(self.root / ".cache" / "digests.json")

    @contextmanager
    def lock(
        self, key: str, label: str, on_wait: Callable[[str], None] | None = None
    ) -> Iterator[None]:
        """Keep other processes from making `key` meanwhile.

        Args:
            key: of the artifact.
            label: what is being made.
            on_wait: told once which process is waited for; None does not wait.

        Raises:
            StageFailedError: another process is making it, and there is no waiting.
            ConfigError: the store can't be written.
        """
        with self._held(f"{key[:_KEY_LENGTH]}.lock", label, on_wait):
            yield

    @contextmanager
    def in_use(self, label: str) -> Iterator[None]:
        """Keep `gc` from removing anything meanwhile; waits for one that is under way.

        Raises:
            ConfigError: the store can't be written.
        """
        name = f"{_RUN_LOCK}{uuid.uuid4().hex[:12]}.lock"
        with ExitStack() as held:
            # gc holds this one from before it looks at those of runs until it has ended.
            with self._held(_GC_LOCK, label, lambda _: None):
                held.callback(locks.forget, self.locks / name)
                held.enter_context(self._held(name, label))
            yield

    @contextmanager
    def unused(self) -> Iterator[None]:
        """Hold back runs that begin; for `gc`, which removes what a run could be reading.

        Raises:
            StageFailedError: a run is under way.
            ConfigError: the store can't be written.
        """
        with self._held(_GC_LOCK, "gc", lambda _: None):
            for file in sorted(self.locks.glob("*.lock")):
                if file.name != _GC_LOCK:
                    self._require_free(file)
            yield

    def _require_free(self, file: Path) -> None:
        try:
            with self._held(file.name, "it"):
                pass
        except StageFailedError as error:
            raise StageFailedError(
                f"a run is under way in the store {self.root}: {error.message}",
                "wait until it ends, or stop it; then give the same command again",
            ) from error
        if file.name.startswith(_RUN_LOCK):  # of a run that was killed
            locks.forget(file)

    @contextmanager
    def _held(
        self, name: str, label: str, on_wait: Callable[[str], None] | None = None
    ) -> Iterator[None]:
        file = self._made(self.locks) / name
        with disk_errors(self.root, "taking a lock"):
            release = locks.acquire(file, label, on_wait)
        try:
            yield
        finally:
            release()

    def staging(self) -> Path:
        """A new empty folder to make an artifact in; those of dead processes are cleared away."""
        with disk_errors(self.root, "making a folder to write in"):
            return new_staging(self.root / ".staging")

    def publish(
        self,
        staging: Path,
        kind: str,
        lineage: dict[str, Any],
        provenance: dict[str, Any],
        *,
        replace: bool = False,
    ) -> Artifact:
        """Make the content of `staging` an artifact, at once and for good.

        Args:
            staging: a folder from `staging()`, complete.
            kind: the artifact's kind.
            lineage: what it was made from; gives its key.
            provenance: how it was made; not part of its digest.
            replace: move one with this key aside first; else that one stays and is returned.

        Raises:
            StageFailedError: the disk is full, or the stage left something that is not a file.
            ConfigError: the store can't be written.
        """
        key = lineage_key(lineage)
        target = self.folder(kind, key)
        _refuse_links(staging)
        with disk_errors(self.root, f"writing {target.name}"):
            manifest = build_manifest(staging, kind, lineage, provenance)
            (staging / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
            aside = self._place_aside(target) if replace and target.exists() else None
            if aside is not None or not target.exists():
                rename_durably(staging, target, aside)
        return self._opened(target)

    def _place_aside(self, target: Path) -> Path:
        replaced = self._made(self.root / ".replaced")
        taken = {path.name for path in replaced.iterdir()}
        number = next(n for n in range(1, len(taken) + 2) if f"{target.name}-{n}" not in taken)
        return replaced / f"{target.name}-{number}"

    def _opened(self, folder: Path) -> Artifact:
        # What was downloaded lies in the hub's cache as links; the store itself holds only files.
        outside = folder.parent.resolve() != self.root.resolve()
        manifest = read_manifest(folder, links=outside)
        return Artifact(folder, manifest["kind"], manifest["digest"], manifest)

    def _made(self, folder: Path) -> Path:
        with disk_errors(self.root, f"making the folder {folder.name}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return sorted(
            path
            for path in self.root.iterdir()
            if path.is_dir() and not path.name.startswith(".") and "-" in path.name
        )

    def _nearest(self, name: str, kinds: tuple[str, ...]) -> str:
        names = [
            folder.name
            for folder in self._folders()
            if not kinds or folder.name.rsplit("-", 1)[0] in kinds
        ]
        near = difflib.get_close_matches(Path(name).name, names, n=1, cutoff=0.4) if name else names
        found = f"did you mean {self.root / near[0]}? " if near else ""
        return f"{found}list the artifacts with `dbllm ls --store {self.root}`"


def _refuse_links(staging: Path) -> None:
    for path in staging.rglob("*"):
        if path.is_symlink():
            raise StageFailedError(
                f"the stage left a link, {path.name}, where an artifact holds only files",
                "this is a bug of the stage: please report it",
            )
