"""The app, assembled, and the only place where errors become exit codes."""

import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from dbllm_cli.commands import artifacts, doctor, gc, generate, pipelines, stages
from dbllm_cli.commands.doctor import own_version
from dbllm_cli.commands.options import plain_message
from dbllm_cli.console import Console, report
from dbllm_cli.errors import DbllmError, UsageError
from dbllm_cli.pipeline.stopping import noting_interrupts

_INTERRUPTED = 130

app = typer.Typer(
    name="dbllm",
    help="Turn a causal language model into a 2-bit one by the DB-LLM method, and run it.",
    epilog="Start with: dbllm run pipelines/quickstart.yaml --dry-run",
    rich_markup_mode=None,  # boxes would cut long option names short
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().print_line(f"dbllm {own_version()}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
) -> None: ...


for _module in (pipelines, stages, artifacts, gc, generate, doctor):
    _module.register(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    as_json = "--json" in arguments
    console = Console()
    with noting_interrupts() as interrupted:
        try:
            # typer gives back the code of an Exit, and None for a command that came to its end.
            code = app(list(arguments) or ["--help"], prog_name="dbllm", standalone_mode=False)
        except Exception as error:  # noqa: BLE001  a library's broad `except` may have made it
            code = _INTERRUPTED if interrupted() else _failed(console, error, as_json)
    if code == _INTERRUPTED:
        console.error("interrupted", "run the same command again to go on where it was")
    return code or 0


def _failed(console: Console, error: Exception, as_json: bool) -> int:
    if isinstance(error, DbllmError):
        return report(console, error, as_json)
    if isinstance(error, typer.TyperException):
        return report(console, _usage_error(error), as_json)
    return _report_bug(console, error, as_json)


def _usage_error(error: typer.TyperException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "dbllm"
    return UsageError(plain_message(error.format_message()), f"{command} --help")


def _report_bug(console: Console, error: Exception, as_json: bool) -> int:
    console.note("".join(traceback.format_exception(error, limit=-4)).rstrip())
    bug = DbllmError(
        f"this is a bug in dbllm: {type(error).__name__}: {error}",
        "please report it with the lines above and the output of: dbllm doctor",
    )
    return report(console, bug, as_json)
