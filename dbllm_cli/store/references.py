"""What people call an artifact or a model by, as a path."""

from pathlib import Path

from dbllm_cli.errors import ArtifactMissingError

_SHOWN_LENGTH = 200


def path_of(reference: str | Path, folder: Path | None = None) -> Path:
    """The path that a reference would have, whether something is there or not.

    Args:
        reference: a path, or any other name.
        folder: where a relative one starts; the current folder when absent.

    Raises:
        ArtifactMissingError: nothing can be there: no system holds such a name, or the way to it is
            closed to this user.
    """
    try:
        if not str(reference):
            raise ValueError("an empty name")
        path = Path(reference).expanduser()
        path = folder / path if folder is not None else path
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArtifactMissingError(
            f"nothing can be opened at {shown(reference)!r}: {reason}",
            "check the name; list the artifacts with `dbllm ls`",
        ) from error
    return path


def shown(reference: str | Path) -> str:
    """A reference for a message: whatever was typed, in one line that every terminal can show."""
    text = str(reference).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"
