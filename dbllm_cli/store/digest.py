"""Digests of values and files, and a cache so that an unchanged model is hashed once."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

# A file written this lately can change again without a change of its times: it isn't remembered.
_SETTLED_AFTER_NS = 2_000_000_000


def canonical_json(value: object) -> str:
    """The one JSON text of `value`: sorted keys, no blanks.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest_of(value: object) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DigestCache:
    """Digests of files outside the store, remembered by path, size, change time and inode.

    A damaged or unwritable cache file costs only time.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = self._read()

    def sha256(self, path: Path) -> str:
        """Hex sha256 of a file, from the cache when the file has not changed."""
        name = str(path.resolve())
        state = _state(path)
        entry = self._known.get(name)
        if entry is not None and entry[:-1] == state:
            return str(entry[-1])
        digest = file_sha256(path)
        unchanged = _state(path) == state
        if unchanged and time.time_ns() - path.stat().st_mtime_ns > _SETTLED_AFTER_NS:
            self._known[name] = [*state, digest]
            self._write()
        return digest

    def _read(self) -> dict[str, list[int | str]]:
        try:
            entries = json.loads(self._file.read_text())
            return {
                name: entry
                for name, entry in entries.items()
                if isinstance(entry, list) and len(entry) == 4
            }
        except (OSError, ValueError, AttributeError):
            return {}

    def _write(self) -> None:
        # Another process may have added entries since: keep them.
        merged = {**self._read(), **self._known}
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(canonical_json(merged))
            temporary.replace(self._file)
        except OSError:
            return


def files_digest(path: Path, cache: DigestCache, files: Iterable[Path] | None = None) -> str:
    """Digest of a file's bytes, or of a folder's files by relative name and bytes.

    Args:
        path: a file or a folder.
        cache: where digests of unchanged files are remembered.
        files: the files of the folder that count; when absent, all but Python's own caches.

    Raises:
        OSError: a file can't be read.
    """
    if path.is_file():
        return cache.sha256(path)
    if files is None:
        found = (file for file in path.rglob("*") if file.is_file())
        files = (file for file in found if file.parent.name != "__pycache__")
    return digest_of({file.relative_to(path).as_posix(): cache.sha256(file) for file in files})


def _state(path: Path) -> list[int | str]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]
