import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dbllm_cli.kernels import cpu_kernels
from dbllm_cli.kernels.cpu import CpuKernels
from dbllm_cli.machine.cpu_library import library_path

_LACKING = "the CPU kernels are not compiled, or DBLLM_KERNEL asks for the reference"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def kernels() -> CpuKernels:
    """The compiled kernels; the test is skipped where there are none."""
    found = cpu_kernels()
    if found is None:
        pytest.skip(_LACKING)
    return found


def _choose(name: str) -> bool:
    """Switch this process over to another instruction set, where the processor has it."""
    choose: Any = ctypes.CDLL(str(library_path())).dbllm_choose
    choose.restype = ctypes.c_char_p
    return choose(name.encode()) is not None


def _supported() -> list[str]:
    found = cpu_kernels()
    if found is None:
        return []
    names = [name for name in ("avx512", "avx2", "neon", "portable") if _choose(name)]
    _choose(found.instruction_set)
    return names


@pytest.fixture(
    scope="module",
    params=_supported() or [pytest.param("none", marks=pytest.mark.skip(reason=_LACKING))],
)
def instruction_set(request: pytest.FixtureRequest, kernels: CpuKernels) -> Iterator[str]:
    """One instruction set of this processor after the other is in use; then the best one again."""
    name: str = request.param
    assert _choose(name)
    yield name
    _choose(kernels.instruction_set)
