"""Folders in which a process makes something whole before it takes its place."""

import os
import shutil
import socket
import uuid
from pathlib import Path


def new_staging(parent: Path) -> Path:
    """A new empty folder of this process; those that dead processes left are cleared away.

    Args:
        parent: a folder for such folders alone, which is made where it is not there.
    """
    for left in dead_staging(parent):
        shutil.rmtree(left, ignore_errors=True)
    staging = parent / f"{_host()}+{os.getpid()}+{uuid.uuid4().hex[:8]}"
    staging.mkdir(parents=True)
    return staging


def dead_staging(parent: Path) -> list[Path]:
    """The folders that dead processes of this machine left in `parent`, sorted."""
    found = sorted(parent.glob(f"{_host()}+*"))
    return [left for left in found if not _is_alive(left.name.split("+")[1])]


def _host() -> str:
    """Where a process number means something: containers of one host name each count their own."""
    namespace = Path("/proc/self/ns/pid")
    number = f".{namespace.stat().st_ino}" if namespace.exists() else ""
    return socket.gethostname() + number


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
