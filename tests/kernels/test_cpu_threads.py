"""Threads and memory of the compiled kernels, and the variable that chooses them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from dbllm_cli.kernels import fdb_linear_tiled
from dbllm_cli.kernels.cpu import CpuKernels
from tests.kernels.layers import REPOSITORY, normal, random_layer

# -- threads and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_one_and_two_threads_give_the_same_bytes(
    instruction_set: str, dtype: torch.dtype, rows: int
) -> None:
    layer, x = random_layer(4096, 1030, 32, offset=True), normal(rows, 4096, dtype=dtype)
    expected = layer(x)
    torch.set_num_threads(2)
    try:
        results = [layer(x) for _ in range(3)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(result, expected) for result in results)


def test_calls_from_many_threads_do_not_disturb_each_other(instruction_set: str) -> None:
    layer = random_layer(1024, 256, 64)
    tiles = layer.tiles
    inputs = [normal(8, 1024, seed=seed) for seed in range(4)]

    def products(x: Tensor) -> list[Tensor]:
        return [fdb_linear_tiled(x, tiles, 1024, 256, 64) for _ in range(40)]

    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for results, one in zip(pool.map(products, inputs), expected, strict=True):
            assert all(torch.equal(result, one) for result in results)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_calls_leave_no_memory_behind(instruction_set: str) -> None:
    layers = [random_layer(1024, 512, 128, seed=seed) for seed in range(20)]

    def run_all() -> None:
        for layer in layers:
            layer(normal(32, 1024))

    run_all()
    before = _resident_mib()
    for _ in range(20):
        run_all()
    # Inputs, outputs and tiles of these calls are 180 MiB in all.
    assert _resident_mib() - before < 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thread_that_ends_gives_its_work_memory_back(instruction_set: str) -> None:
    layer, x = random_layer(2048, 16, 128), normal(32, 2048)

    def run_in_a_thread() -> None:
        thread = Thread(target=layer, args=(x,))
        thread.start()
        thread.join()

    run_in_a_thread()
    before = _resident_mib()
    for _ in range(60):
        run_in_a_thread()
    # The tables of one call are a mebibyte, or 8 of the portable kernel.
    assert _resident_mib() - before < 30


# -- DBLLM_KERNEL --------------------------------------------------------------------------------

_TELL = """
from dbllm_cli.errors import ConfigError
from dbllm_cli.kernels import cpu_kernels
try:
    kernels = cpu_kernels()
    print("none" if kernels is None else kernels.instruction_set)
except ConfigError as error:
    print("ConfigError:", error.message, error.hint)
"""


def _told_with(value: str) -> str:
    """What a process of its own says, for which DBLLM_KERNEL has this value."""
    environment = os.environ | {"DBLLM_KERNEL": value}
    return subprocess.run(
        [sys.executable, "-c", _TELL],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_reference_can_be_forced() -> None:
    assert _told_with("reference") == "none"


def test_an_instruction_set_can_be_forced(kernels: CpuKernels) -> None:
    assert _told_with("portable") == "portable"


def test_an_instruction_set_that_is_not_there_is_refused_with_the_choices() -> None:
    told = _told_with("nonsense")
    assert told.startswith("ConfigError: DBLLM_KERNEL=nonsense can't be used")
    for choice in ("avx512", "avx2", "portable", "reference"):
        assert choice in told
