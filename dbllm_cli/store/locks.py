"""Kernel locks: one process at a time makes one thing, and death frees what it held."""

import errno
import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from dbllm_cli.errors import StageFailedError

_POLL_SECONDS = 0.5


def acquire(
    file: Path, label: str, on_wait: Callable[[str], None] | None = None
) -> Callable[[], None]:
    """Acquire the lock `file` for `label`; the result frees it again.

    Where the filesystem has no locks the work goes on without one: that costs only doubled work.

    Args:
        file: the lock.
        label: what it is held for.
        on_wait: told once which process is waited for; None does not wait.

    Raises:
        StageFailedError: another process holds it, and there is no waiting.
        OSError: the lock file can't be made.
    """
    from filelock import FileLock, Timeout

    holder = _holder(file)
    lock = FileLock(file)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            if on_wait is None:
                raise StageFailedError(
                    f"{label} is held by another run: {_read_holder(holder)}",
                    "leave out --no-wait, or give the same command again when it has ended",
                ) from error
            on_wait(_read_holder(holder))
            lock.acquire(poll_interval=_POLL_SECONDS)
    except NotImplementedError:  # older releases' answer to ENOSYS
        return lambda: None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP):
            return lambda: None
        raise
    try:
        _write_holder(holder, label)
    except OSError:
        lock.release()
        raise
    return lock.release


def forget(file: Path) -> None:
    """Remove a lock that nobody will take again."""
    for left in (file, _holder(file)):
        left.unlink(missing_ok=True)


def _holder(file: Path) -> Path:
    return file.with_suffix(".json")


def _write_holder(file: Path, label: str) -> None:
    held = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "label": label,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file.write_text(json.dumps(held))


def _read_holder(file: Path) -> str:
    try:
        held = json.loads(file.read_text())
        return f"process {held['pid']} on {held['host']}, since {held['since']} ({held['label']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that did not leave its name"
