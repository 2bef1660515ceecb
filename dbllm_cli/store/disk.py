"""What the operating system says about a disk, as errors that a user can mend."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbllm_cli.errors import ConfigError, StageFailedError

_NOT_WRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
}  # fmt: skip


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that no space is left, also where a library wraps it in its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return os.strerror(errno.ENOSPC) in str(error)


def disk_full_error(root: Path, doing: str) -> StageFailedError:
    """The error for a full disk under the store."""
    return StageFailedError(
        f"no space left on the disk of the store {root} while {doing}",
        "free some space, or name a store on another disk with --store FOLDER; "
        "then the same command again goes on",
    )


@contextmanager
def disk_errors(root: Path, doing: str) -> Iterator[None]:
    """Turn the failures of writing to the store `root` into errors for people.

    Raises:
        StageFailedError: the disk is full or failing.
        ConfigError: the store can't be written.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(root, doing) from error
        reason = error.strerror or str(error)
        if error.errno in _NOT_WRITABLE:
            raise ConfigError(
                f"the store {root} can't be written while {doing}: {reason}",
                "name a folder that you may write to with --store FOLDER or DBLLM_STORE",
            ) from error
        raise StageFailedError(
            f"writing to the store {root} failed while {doing}: {reason}",
            "check the disk, or name a store on another one with --store FOLDER",
        ) from error


def rename_durably(part: Path, path: Path, aside: Path | None = None) -> None:
    """Give a file or folder that is whole its name: it is whole after a loss of power too.

    Args:
        part: the file or folder under its temporary name.
        path: its name.
        aside: where what has that name now is moved first.

    Raises:
        OSError: the disk is full or failing, or something has that name.
    """
    _sync_all(part)
    if aside is not None:
        path.rename(aside)
        sync(aside.parent)
    part.rename(path)
    sync(path.parent)


def _sync_all(path: Path) -> None:
    """`sync` a file, or a folder with all that is in it, files first."""
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    for each in sorted(found, key=Path.is_dir):
        sync(each)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
