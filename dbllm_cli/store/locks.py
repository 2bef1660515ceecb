"""Kernel locks: one process at a time makes one thing, and death frees what it held."""

import errno
import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from dbllm_cli.errors import StageFailedError


def take(file: Path, label: str) -> Callable[[], None]:
    """Take the lock `file` for `label` without waiting; the result frees it again.

    Where the filesystem has no locks the work goes on without one: that costs only doubled work.

    Raises:
        StageFailedError: another process holds it.
        OSError: the lock file can't be made.
    """
    from filelock import FileLock, Timeout

    holder = file.with_suffix(".json")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise StageFailedError(
            f"{label} is held by another run: {_read_holder(holder)}",
            "wait until it ends, or stop it; then give the same command again",
        ) from error
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
