"""Every failure a user can mend, as one error with what is wrong, the way out, and an exit code."""

from typing import ClassVar


class DbllmError(Exception):
    """A failure with a message for people.

    Args:
        message: what is wrong, naming the thing.
        hint: the way out, most often the next command to type.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class UsageError(DbllmError):
    """The command line is not one that dbllm takes."""

    exit_code = 2


class ConfigError(DbllmError):
    """A setting, a pipeline file or an input named by one can't be used."""

    exit_code = 3


class ArtifactMissingError(DbllmError):
    """An artifact or model is not there, or is of another kind than is needed."""

    exit_code = 4


class ArtifactCorruptError(DbllmError):
    """An artifact or model is there but its content is damaged."""

    exit_code = 5


class StageFailedError(DbllmError):
    """A stage could not finish its work."""

    exit_code = 6


class StoppedError(DbllmError):
    """SIGTERM asked the run to stop; the same command goes on where it was."""

    exit_code = 75
