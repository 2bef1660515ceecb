"""Where output goes: data on stdout, words and bars for people on stderr. All of rich is here."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as BarTask
from rich.progress import TaskID as BarId
from rich.table import Table
from rich.text import Text

from dbllm_cli.errors import DbllmError
from dbllm_cli.progress import Task

_SECONDS_BETWEEN_LINES = 10.0
_UNLIMITED_WIDTH = 10_000


class Console:
    """The one output object of the commands."""

    def __init__(self) -> None:
        self.people = _rich_console(stderr=True)
        self._data = _rich_console(stderr=False)

    def print_line(self, text: str) -> None:
        """One line of data on stdout."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def print_json(self, data: object) -> None:
        """One JSON document on stdout."""
        self.print_line(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))

    def print_table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table of data on stdout, never cut short when stdout is not a terminal."""
        self._data.print(_table(columns, rows))

    def print_stream(self, pieces: Iterable[str]) -> None:
        """Text on stdout as it comes, with a line end after the last piece."""
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        self.print_line("")

    def note(self, message: str) -> None:
        """One line for people, on stderr."""
        self.people.print(message, soft_wrap=True)

    def note_table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]
    ) -> None:
        """A table for people, on stderr."""
        if title:
            self.note(title)
        self.people.print(_table(columns, rows))

    def error(self, message: str, hint: str = "") -> None:
        """What is wrong and the way out, for people, on stderr."""
        self._labelled("error", "bold red", message)
        if hint:
            self._labelled("hint", "cyan", hint)

    def json_error(self, name: str, message: str, hint: str, exit_code: int) -> None:
        """The same error as a JSON object on stdout, for programs."""
        error = {"type": name, "message": message, "hint": hint, "exit_code": exit_code}
        self.print_json({"error": error})

    def _labelled(self, label: str, style: str, text: str) -> None:
        self.people.print(Text(f"{label}:", style), text, soft_wrap=True)


class ConsoleProgress:
    """Draws `Progress` on a console: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None

    @contextmanager
    def task(self, label: str, total: int, done: int = 0, unit: str = "steps") -> Iterator[Task]:
        """See `Progress.task`. A bar inside another one goes away when it is finished."""
        if not self._console.people.is_terminal:
            lines = _LineTask(self._console, label, total, done, unit)
            yield lines
            lines.finish()
        elif self._bars is None:
            with _bars(self._console.people) as bars:
                self._bars = bars
                try:
                    yield _BarTask(bars, label, total, done, unit)
                finally:
                    self._bars = None
        else:
            bar = _BarTask(self._bars, label, total, done, unit)
            try:
                yield bar
            finally:
                bar.remove()

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        self._console.note(message)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See `Progress.table`."""
        self._console.note_table(title, columns, rows)


class _BarTask:
    def __init__(self, bars: Progress, label: str, total: int, done: int, unit: str) -> None:
        self._bars = bars
        self._id: BarId = bars.add_task(label, total=total, completed=done, unit=unit, figures="")

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self._bars.update(self._id, advance=amount)
        if figures:
            self._bars.update(self._id, figures=_figures(figures))

    def remove(self) -> None:
        self._bars.remove_task(self._id)


class _LineTask:
    def __init__(self, console: Console, label: str, total: int, done: int, unit: str) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._done = self._done_before = done
        self._unit = unit
        self._figures = ""
        self._started = self._last_line = time.monotonic()

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self._done += amount
        if figures:
            self._figures = _figures(figures)
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES and self._done < self._total:
            self._last_line = now
            rate = (self._done - self._done_before) / max(now - self._started, 1e-9)
            left = seconds_text((self._total - self._done) / max(rate, 1e-9))
            self._line(f"{_rate_text(rate, self._unit)}, {left} left")

    def finish(self) -> None:
        self._line(seconds_text(time.monotonic() - self._started))

    def _line(self, seconds: str) -> None:
        parts = [f"{self._done}/{self._total} {self._unit}", seconds, self._figures]
        self._console.note(f"{self._label}: {', '.join(part for part in parts if part)}")


def seconds_text(seconds: float) -> str:
    """A duration for people: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size_text(size: int) -> str:
    """A number of bytes for people, in decimal units."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def value_text(value: object) -> str:
    """A cell of a table: floats to four digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(console: Console, error: DbllmError, as_json: bool) -> int:
    """Show an error in the one format there is; returns its exit code."""
    console.error(error.message, error.hint)
    if as_json:
        console.json_error(type(error).__name__, error.message, error.hint, error.exit_code)
    return error.exit_code


def _rich_console(stderr: bool) -> RichConsole:
    # Names and paths may hold brackets and colons: no markup, no emoji, no guessed colours.
    console = RichConsole(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _UNLIMITED_WIDTH
    return console


class _RateColumn(ProgressColumn):
    """Units per second, once they are known."""

    def render(self, task: BarTask) -> Text:
        return Text("" if task.speed is None else _rate_text(task.speed, task.fields["unit"]))


def _rate_text(rate: float, unit: str) -> str:
    return f"{rate:.3g} {unit}/s" if rate < 100 else f"{rate:.0f} {unit}/s"


def _bars(console: RichConsole) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        _RateColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    cells = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = bool(cells) and all(isinstance(row[index], int | float) for row in cells)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        table.add_row(*(value_text(value) for value in row))
    return table


def _figures(figures: dict[str, float | str]) -> str:
    return " ".join(
        f"{name.replace('_', ' ')} {value_text(value)}" for name, value in figures.items()
    )
