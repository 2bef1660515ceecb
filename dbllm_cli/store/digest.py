"""Digests of values and files, and a cache so that an unchanged model is hashed once."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from dbllm_cli.store.json_file import parse_json, read_bytes

# A file written this lately can change again without a change of its times: it isn't remembered.
_SETTLED_AFTER_NS = 2_000_000_000
# A smaller file is hashed in less time than it takes to remember it.
_REMEMBERED_FROM_BYTES = 2**20


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
    """Digests of large files, remembered by path, size, change time and inode.

    What a failing disk changes without a change of these is seen by `dbllm verify` alone. A damaged
    or unwritable cache file costs only time.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = self._read()

    def sha256(self, path: Path) -> str:
        """Hex sha256 of a file, from the cache when the file has not changed.

        Raises:
            OSError: it can't be read.
        """
        known = self._remembered(path)
        if known is not None:
            return known
        state = _state(path)
        digest = file_sha256(path)
        size, written, _ = state
        settled = _state(path) == state and time.time_ns() - written > _SETTLED_AFTER_NS
        if settled and size >= _REMEMBERED_FROM_BYTES:
            self._known[str(path.resolve())] = [*state, digest]
            self._write()
        return digest

    def remembers(self, path: Path) -> bool:
        """Whether `sha256` would be answered from the cache."""
        try:
            return self._remembered(path) is not None
        except OSError:
            return False

    def _remembered(self, path: Path) -> str | None:
        entry = self._known.get(str(path.resolve()))
        return str(entry[-1]) if entry is not None and entry[:-1] == [*_state(path)] else None

    def _read(self) -> dict[str, list[int | str]]:
        try:
            entries = parse_json(read_bytes(self._file))
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


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
