"""The C code of the kernels, without torch, under AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dbllm_cli

SOURCES = Path(dbllm_cli.__file__).parent / "kernels" / "csrc"
PROGRAM = Path(__file__).parent / "csrc_test.c"
FLOATS_PROGRAM = Path(__file__).parent / "csrc_floats_test.c"
FLAGS = ("-std=c11", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def _compile(sources: list[Path], program: Path) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CC", "cc").split()
    command = [*compiler, *FLAGS, f"-I{SOURCES}", *map(str, sources), "-lm", "-o", str(program)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _run(program: Path) -> subprocess.CompletedProcess[str]:
    # Leaks are looked for by ptrace, which containers may forbid; nothing here allocates.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [str(program)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def _sanitizers(tmp_path: Path) -> None:
    """Skips the test where a program with sanitizers can't be built and run."""
    compiler = os.environ.get("CC", "cc").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C compiler {compiler}")
    source, program = tmp_path / "empty.c", tmp_path / "empty"
    source.write_text("int main(void) { return 0; }\n")
    if _compile([source], program).returncode or _run(program).returncode:
        pytest.skip("the compiler lacks the libraries of the sanitizers")


@pytest.mark.slow
@pytest.mark.usefixtures("_sanitizers")
def test_the_kernels_keep_to_their_buffers_and_are_right(tmp_path: Path) -> None:
    program = tmp_path / "csrc_test"
    sources = [path for path in sorted(SOURCES.glob("*.c")) if not path.name.startswith("torch_")]
    compiled = _compile([*sources, PROGRAM], program)
    assert compiled.returncode == 0, compiled.stderr
    finished = _run(program)
    assert finished.returncode == 0, finished.stderr
    told = dict(line.split(": ") for line in finished.stdout.splitlines())
    assert set(told) == {"avx512", "avx2", "neon", "portable"}
    assert set(told.values()) <= {"right", "not here"}
    assert told["portable"] == "right"


@pytest.mark.usefixtures("_sanitizers")
def test_half_formats_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    program = tmp_path / "csrc_floats_test"
    compiled = _compile([FLOATS_PROGRAM], program)
    assert compiled.returncode == 0, compiled.stderr
    finished = _run(program)
    assert finished.returncode == 0, finished.stderr
