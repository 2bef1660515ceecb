import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbllm_cli.machine import compute_dtype
from dbllm_cli.machine.compute_dtype import DTYPES, faster_dtype, kept_file

CODE = "from dbllm_cli.machine.compute_dtype import faster_dtype; print(faster_dtype('cpu'))"


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    faster_dtype.cache_clear()
    yield
    faster_dtype.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the next measurements give; those that were made are taken out."""
    answers = ["float32", "bfloat16", "bfloat16"]
    monkeypatch.setattr(compute_dtype, "_measured", lambda: answers.pop(0))
    return answers


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is told to use AVX2 alone")
def test_a_processor_without_bfloat16_multiplies_in_float32() -> None:
    # It would take twelve times as long in bfloat16.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "float32"
    (name,) = json.loads(kept_file().read_text())
    assert name.endswith("ONEDNN_MAX_CPU_ISA AVX2")


def test_the_choice_is_measured_once_and_kept(measured: list[str]) -> None:
    assert faster_dtype("cpu") == "float32"
    faster_dtype.cache_clear()  # as in another process
    assert faster_dtype("cpu") == "float32"
    assert len(measured) == 2


def test_another_processor_is_measured_anew(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert faster_dtype("cpu") == "float32"
    faster_dtype.cache_clear()
    monkeypatch.setattr(compute_dtype, "processor", lambda: "another one")
    assert faster_dtype("cpu") == "bfloat16"
    assert set(json.loads(kept_file().read_text()).values()) == {"float32", "bfloat16"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '"x"'])
def test_a_damaged_cache_costs_a_measurement(measured: list[str], content: str) -> None:
    kept_file().parent.mkdir(parents=True)
    kept_file().write_text(content)
    assert faster_dtype("cpu") == "float32"
    faster_dtype.cache_clear()
    assert faster_dtype("cpu") == "float32"
    assert len(measured) == 2


def test_a_cache_that_can_t_be_written_costs_a_measurement_in_every_run(
    measured: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    assert faster_dtype("cpu") == "float32"
    faster_dtype.cache_clear()
    assert faster_dtype("cpu") == "bfloat16"


def test_what_is_measured_is_one_of_the_two() -> None:
    assert faster_dtype("cpu") in DTYPES
