"""Ctrl-C and SIGTERM while a command still imports what it needs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
# The interpreter's own start comes before anything of ours: the signal comes after it.
START = "from dbllm_cli.__main__ import main; print('up', flush=True); main()"


def stopped_after(seconds: float, number: signal.Signals, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command that gets a signal so long after its first line."""
    with subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("seconds", [0.005, 0.05, 0.1])
def test_a_signal_among_the_first_imports_ends_with_its_code(
    number: signal.Signals, seconds: float, tmp_path: Path
) -> None:
    code, errors = stopped_after(seconds, number, "ls", "--store", str(tmp_path))
    assert "Traceback" not in errors
    # The command may have come to its end before.
    assert code == CODES[number] or (code == 0 and "no artifacts" in errors)
    if seconds == 0.005:
        assert code == CODES[number]
        assert "hint: give the same command again" in errors


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("seconds", [0.9])
def test_a_signal_while_torch_is_imported_ends_with_its_code(
    number: signal.Signals, seconds: float, llama_folder: Path, tmp_path: Path
) -> None:
    arguments = ("calibrate", str(llama_folder), "--num-samples", "2000", "--sequence-length", "64")
    code, errors = stopped_after(seconds, number, *arguments, "--store", str(tmp_path / "store"))
    assert "Traceback" not in errors
    assert "bug" not in errors
    assert code == CODES[number]
