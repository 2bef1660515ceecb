"""Data goes to stdout and words to stderr, on a terminal and off it."""

import json
import re

import pytest

from dbllm_cli.console import Console, ConsoleProgress, report, seconds_text, size_text, value_text
from dbllm_cli.errors import ConfigError

Captured = pytest.CaptureFixture[str]
COLOUR = re.compile(r"\x1b\[[\d;]*3[0-7]")


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress sees; tests move it."""
    now = [100.0]
    monkeypatch.setattr("dbllm_cli.console.time.monotonic", lambda: now[0])
    return now


def test_data_goes_to_stdout_and_words_to_stderr(capsys: Captured) -> None:
    console = Console()
    console.print_line("data")
    console.note("word")
    console.note_table("title", ("a",), [(1,)])

    captured = capsys.readouterr()
    assert captured.out == "data\n"
    assert "word" in captured.err
    assert "title" in captured.err


def test_json_keeps_other_alphabets_and_refuses_nan(capsys: Captured) -> None:
    Console().print_json({"text": "née", "value": 1e-7})

    written = capsys.readouterr().out
    assert "née" in written
    assert json.loads(written) == {"text": "née", "value": 1e-7}
    with pytest.raises(ValueError, match="not JSON compliant"):
        Console().print_json({"loss": float("nan")})


def test_a_table_off_a_terminal_is_never_cut(capsys: Captured) -> None:
    wide = "x" * 300
    Console().print_table(("name", "value"), [(wide, 0.123456), ("b", None)])

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == [wide, "0.1235"]


def test_a_long_word_off_a_terminal_stays_on_one_line(capsys: Captured) -> None:
    Console().note("word " * 100)

    assert len(capsys.readouterr().err.splitlines()) == 1


def test_brackets_and_colons_are_plain_text(capsys: Captured) -> None:
    console = Console()
    console.note("[bold]x[/bold] :smile:")
    console.print_table(("[red]",), [("[0]",)])

    captured = capsys.readouterr()
    assert "[bold]x[/bold] :smile:" in captured.err
    assert "[red]" in captured.out
    assert "[0]" in captured.out


def test_a_terminal_gets_colour(terminal: None, capsys: Captured) -> None:
    Console().error("broken", "mend it")

    assert COLOUR.search(capsys.readouterr().err)


def test_no_color_is_respected(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    Console().error("broken", "mend it")

    assert not COLOUR.search(capsys.readouterr().err)


def test_off_a_terminal_there_are_no_control_characters(capsys: Captured) -> None:
    console = Console()
    console.error("broken", "mend it")
    console.print_table(("a",), [(1,)])
    with ConsoleProgress(console).task("work", total=2) as task:
        task.advance(2)

    captured = capsys.readouterr()
    assert "\x1b" not in captured.err + captured.out


def test_an_error_is_its_message_its_hint_and_its_code(capsys: Captured) -> None:
    code = report(Console(), ConfigError("x is wrong", "write y"), as_json=False)

    captured = capsys.readouterr()
    assert code == 3
    assert captured.err == "error: x is wrong\nhint: write y\n"
    assert captured.out == ""


def test_an_error_is_told_to_programs_too(capsys: Captured) -> None:
    report(Console(), ConfigError("x is wrong", "write y"), as_json=True)

    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "error": {
            "type": "ConfigError",
            "message": "x is wrong",
            "hint": "write y",
            "exit_code": 3,
        }
    }
    assert "error: x is wrong" in captured.err


def test_progress_off_a_terminal_tells_the_end(capsys: Captured, clock: list[float]) -> None:
    with ConsoleProgress(Console()).task("distill", total=4, unit="steps") as task:
        task.advance(loss=1.25)
        clock[0] += 5
        task.advance(3, loss=1.23456, tokens_per_second="70/s")

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "distill: 4/4 steps, 5.0 s, loss 1.235 tokens per second 70/s\n"


def test_progress_off_a_terminal_tells_a_line_every_ten_seconds_and_the_end_once(
    capsys: Captured, clock: list[float]
) -> None:
    with ConsoleProgress(Console()).task("distill", total=10) as task:
        for _ in range(10):
            clock[0] += 5
            task.advance()

    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "distill: 2/10 steps, 0.2 steps/s, 40 s left",
        "distill: 4/10 steps, 0.2 steps/s, 30 s left",
        "distill: 6/10 steps, 0.2 steps/s, 20 s left",
        "distill: 8/10 steps, 0.2 steps/s, 10 s left",
        "distill: 10/10 steps, 50 s",
    ]


def test_time_left_of_a_resumed_run_counts_only_its_own_steps(
    capsys: Captured, clock: list[float]
) -> None:
    with ConsoleProgress(Console()).task("distill", total=20, done=10) as task:
        clock[0] += 20
        task.advance(5)
        task.advance(5)

    assert (
        capsys.readouterr().err.splitlines()[0] == "distill: 15/20 steps, 0.25 steps/s, 20 s left"
    )


def test_a_failed_task_does_not_say_that_it_ended(capsys: Captured) -> None:
    with (
        pytest.raises(RuntimeError),
        ConsoleProgress(Console()).task("distill", total=4),
    ):
        raise RuntimeError

    assert capsys.readouterr().err == ""


def test_bars_on_a_terminal_show_label_count_and_figures(terminal: None, capsys: Captured) -> None:
    with ConsoleProgress(Console()).task("distill", total=4, done=1, unit="steps") as task:
        task.advance(3, loss=1.23456)

    captured = capsys.readouterr()
    assert captured.out == ""
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", captured.err).splitlines()[-1]
    assert last.startswith("distill")
    assert "4/4 steps" in last
    assert "loss 1.235" in last


def test_a_bar_inside_another_goes_away_at_its_end(terminal: None, capsys: Captured) -> None:
    progress = ConsoleProgress(Console())
    with progress.task("blocks", total=1) as outer:
        with progress.task("block 0", total=1) as inner:
            inner.advance()
        progress.note("block 0 done")
        outer.advance()
    with progress.task("again", total=1) as task:
        task.advance()

    first, again = capsys.readouterr().err.split("again", 1)
    last_frame = [frame for frame in first.split("\x1b[2K") if "steps" in frame][-1]
    assert "blocks" in last_frame
    assert "block 0" not in last_frame
    assert "1/1" in again


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"), (12.4, "12 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)  # fmt: skip
def test_durations_read_well(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_500_000_000, "2.5 GB")]
)
def test_sizes_read_well(size: int, text: str) -> None:
    assert size_text(size) == text


def test_cells_read_well() -> None:
    assert [value_text(value) for value in (None, 1.23456, 7, "x", True)] == [
        "", "1.235", "7", "x", "True",
    ]  # fmt: skip
