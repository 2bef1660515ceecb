"""Every command line ends with the exit code that says how it went."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli import errors
from dbllm_cli.app import run
from dbllm_cli.stages.spec import STAGES, StageSpec

Captured = pytest.CaptureFixture[str]
FailWith = Callable[[BaseException], None]
ROOT = Path(__file__).parents[1]
CODES = {
    errors.DbllmError: 1,
    errors.UsageError: 2,
    errors.ConfigError: 3,
    errors.ArtifactMissingError: 4,
    errors.ArtifactCorruptError: 5,
    errors.StageFailedError: 6,
    errors.StoppedError: 75,
}


OTHERS = ("run", "status", "schema", "ls", "show", "verify", "generate", "doctor")


@pytest.fixture
def fail_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FailWith:
    """Makes `dbllm calibrate model` end with an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")

    def arrange(error: BaseException) -> None:
        def body(config: object, inputs: Mapping[str, object], context: object) -> dict[str, Any]:
            raise error

        monkeypatch.setattr(StageSpec, "body", lambda self: body)

    return arrange


@pytest.mark.parametrize(("error", "code"), CODES.items(), ids=str)
def test_every_error_has_its_exit_code(
    error: type[errors.DbllmError], code: int, fail_with: FailWith, capsys: Captured
) -> None:
    fail_with(error("it went wrong", "do this"))

    assert run(["calibrate", "model"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: it went wrong\nhint: do this\n"


@pytest.mark.parametrize(("error", "code"), CODES.items(), ids=str)
def test_every_error_is_an_object_with_json(
    error: type[errors.DbllmError], code: int, fail_with: FailWith, capsys: Captured
) -> None:
    fail_with(error("it went wrong", "do this"))

    assert run(["calibrate", "model", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "type": error.__name__,
            "message": "it went wrong",
            "hint": "do this",
            "exit_code": code,
        }
    }


def test_a_bug_ends_with_1_its_place_and_a_request_to_report_it(
    fail_with: FailWith, capsys: Captured
) -> None:
    fail_with(ZeroDivisionError("by nothing"))

    assert run(["calibrate", "model"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "test_main.py" in captured.err
    assert "error: this is a bug in dbllm: ZeroDivisionError: by nothing" in captured.err
    assert "report it" in captured.err
    assert len(captured.err.splitlines()) < 20


def test_ctrl_c_ends_with_130(fail_with: FailWith, capsys: Captured) -> None:
    fail_with(KeyboardInterrupt())

    assert run(["calibrate", "model"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "same command again" in captured.err


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        (["calibrat"], "Did you mean 'calibrate'?", "dbllm --help"),
        (["calibrate"], "Missing argument 'MODEL'", "dbllm calibrate --help"),
        (["calibrate", "m", "--sed", "1"], "--seed", "dbllm calibrate --help"),
        (["calibrate", "m", "--seed", "x"], "--seed", "dbllm calibrate --help"),
        (["calibrate", "m", "--seed", "-1"], "--seed", "dbllm calibrate --help"),
        (["run"], "Missing argument 'PIPELINE'", "dbllm run --help"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_a_hint(
    arguments: list[str], problem: str, hint: str, capsys: Captured
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err
    assert f"hint: {hint}\n" in captured.err


def test_a_wrong_command_line_is_an_object_with_json(capsys: Captured) -> None:
    assert run(["ls", "--jsn", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_no_arguments_give_the_help(capsys: Captured) -> None:
    assert run([]) == 0
    captured = capsys.readouterr()
    assert "Usage: dbllm" in captured.out
    for command in (*STAGES, *OTHERS):
        assert f"\n  {command} " in captured.out


def test_the_version_is_told(capsys: Captured) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dbllm ")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["distill", "--help"], ["ls"], ["verify"], ["schema"], ["doctor"]],
    ids=" ".join,
)
def test_what_needs_no_model_imports_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from dbllm_cli.app import run; run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'pandas'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dbllm_cli", "show", "nothing"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "arguments", [("ls",), ("ls", "--json"), ("verify",), ("verify", "--json")]
)
def test_a_path_that_is_no_text_is_printed_as_the_bytes_that_it_is(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "artifacts" / os.fsdecode(b"fdb-\xff")).mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "dbllm_cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )

    assert done.returncode == (5 if "verify" in arguments else 0), done.stderr
    assert b"artifacts/fdb-\xff" in done.stdout
