"""The protocol through which long work reports to whoever watches; nothing here draws."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One bar: known total, done so far, and figures beside it."""

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        """Add `amount` to what is done and show `figures` (name -> value) beside the bar."""


class Progress(Protocol):
    """Where loops report. `console` draws it for people; `SilentProgress` drops it."""

    def task(
        self, label: str, total: int, done: int = 0, unit: str = "steps"
    ) -> AbstractContextManager[Task]:
        """Open a bar with `total` units of which `done` were finished before (a resumed run)."""

    def note(self, message: str) -> None:
        """Tell one line."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a small table of results."""


class _SilentTask:
    def advance(self, amount: int = 1, **figures: float | str) -> None:
        del amount, figures


class SilentProgress:
    """Reports nothing."""

    @contextmanager
    def task(self, label: str, total: int, done: int = 0, unit: str = "steps") -> Iterator[Task]:
        """See `Progress.task`."""
        del label, total, done, unit
        yield _SilentTask()

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        del message

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See `Progress.table`."""
        del title, columns, rows
