"""Times the packed product on the CPU beside torch, llama.cpp and the memory's read bandwidth.

    python tests/peers/kernel_bench.py --threads 1 2 --llama-cpp llama-venv/bin/python
    python tests/peers/kernel_bench.py --threads 2 --batch 8 32 128 512 --sets avx512

Every contender is timed in turn within one run, on weights that are cold in cache: it goes round
more copies than the last-level cache holds. Figures are medians. llama.cpp multiplies Q2_K in a
process of its own, as files hold it and repacked as it does itself at load. `roof` is the share of
the read bandwidth, measured between the products, that one vector's product reaches.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from line_child import ChildError, openmp_settings
from llama_kernel import LlamaProduct

# llama.cpp's threads stay on their cores too. torch reads it when it is imported.
os.environ |= openmp_settings(2)

import torch
from torch import Tensor

from dbllm_cli.kernels import cpu_kernels, fdb_linear_tiled
from dbllm_cli.machine.cpu_library import library_path

SHAPES = [
    (4096, 4096), (11008, 4096), (4096, 11008), (64, 4096), (1088, 4096),
    (576, 576), (1536, 576), (576, 1536),
]  # fmt: skip
GROUP_SIZE = 64
COLD_BYTES = 200 * 2**20
READ_BYTES = 128 * 2**20
# So that a pool of threads, asleep since its last turn, is awake; the copies stay cold.
WARM_SECONDS = 0.003
Run = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sets", nargs="+", default=["avx512", "avx2", "portable"])
    parser.add_argument("--llama-cpp", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for out, inputs in SHAPES:
            for batch in options.batch:
                with_llama = options.llama_cpp, options.repeats
                rows.append(measure(out, inputs, batch, threads, options.sets, *with_llama))
                print(describe(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def measure(
    out: int,
    inputs: int,
    batch: int,
    threads: int,
    sets: list[str],
    llama: Path | None,
    repeats: int,
) -> dict[str, object]:
    """Median microseconds of every contender, and of reading the weights' bytes."""
    tiles, dense = weights(out, inputs)
    x = torch.randn(batch, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    contenders: dict[str, Run] = {}
    for name in sets:
        if choose(name) is not None:
            contenders[name] = timed(
                lambda i: fdb_linear_tiled(x, tiles[i % len(tiles)], inputs, out, GROUP_SIZE), name
            )
    contenders["torch bfloat16"] = timed(
        lambda i: torch.nn.functional.linear(x, dense[i % len(dense)])
    )
    peers = [] if llama is None else llama_products(llama, out, inputs, batch, threads)
    contenders |= {name_of(peer): peer.run for peer in peers}
    seconds = take_turns(contenders, reader(threads), repeats)
    for peer in peers:
        peer.close()
    medians = {name: statistics.median(times) * 1e6 for name, times in seconds.items()}
    read_bytes_us = medians.pop("read") / READ_BYTES
    size = {name: tiles[0].numel() for name in sets}
    size |= {name_of(peer): peer.copy_bytes for peer in peers}
    empty = call_overhead()
    choose(None)
    roof = {name: size[name] * read_bytes_us / medians[name] for name in medians if name in size}
    return {"out": out, "in": inputs, "batch": batch, "threads": threads, "empty_call_us": empty,
            "read_gb_per_second": 1e-3 / read_bytes_us, "median_us": medians,
            "roof": roof}  # fmt: skip


def take_turns(
    contenders: dict[str, Run], read: Callable[[], float], repeats: int
) -> dict[str, list[float]]:
    """Seconds by name, `read` among them."""
    seconds: dict[str, list[float]] = {name: [] for name in ("read", *contenders)}
    for repeat in range(repeats):
        if repeat % 5 == 0:
            seconds["read"] += [read(), read()]
        for name, run in contenders.items():
            seconds[name].append(run())
    return seconds


def timed(product: Callable[[int], object], instruction_set: str | None = None) -> Run:
    """Runs products on one copy after the other; the last one's seconds."""
    number = 0

    def run() -> float:
        nonlocal number
        if instruction_set is not None:
            choose(instruction_set)
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM_SECONDS:
            product(number)
            number += 1
        begin = time.perf_counter()
        product(number)
        number += 1
        return time.perf_counter() - begin

    return run


def choose(name: str | None) -> str | None:
    """Puts an instruction set in use; the best one for None."""
    function = ctypes.CDLL(str(library_path())).dbllm_choose
    function.restype = ctypes.c_char_p
    chosen: bytes | None = function(None if name is None else name.encode())
    return None if chosen is None else chosen.decode()


def llama_products(
    python: Path, out: int, inputs: int, columns: int, threads: int
) -> list[LlamaProduct]:
    """Both layouts of Q2_K, where llama.cpp has them for the shape."""
    found = []
    for repacked in (False, True):
        try:
            found.append(LlamaProduct(python, out, inputs, columns, threads, COLD_BYTES, repacked))
        except ChildError as error:
            print(f"{out}x{inputs}: {error}")
    return found


def name_of(peer: LlamaProduct) -> str:
    return "Q2_K repacked" if peer.repacked else "Q2_K"


def weights(out: int, inputs: int) -> tuple[list[Tensor], list[Tensor]]:
    """Copies enough to be cold in cache, packed and dense."""
    kernels = cpu_kernels()
    assert kernels is not None, "the kernels are not compiled: see dbllm doctor"
    generator = torch.Generator().manual_seed(1)
    planes = torch.randint(256, (2, out, inputs // 8), generator=generator, dtype=torch.uint8)
    scales = torch.rand(2, out, -(-inputs // GROUP_SIZE), generator=generator).half() * 0.02
    scales[1] *= -1
    tiles = kernels.to_tiles(planes, scales, inputs, GROUP_SIZE)
    dense = torch.randn(out, inputs, generator=generator).bfloat16()
    return copies(tiles), copies(dense)


def copies(tensor: Tensor) -> list[Tensor]:
    size = tensor.numel() * tensor.element_size()
    return [tensor.clone() for _ in range(max(2, min(1200, COLD_BYTES // size)))]


def reader(threads: int) -> Run:
    """Seconds to read READ_BYTES, the faster of with and without prefetching."""
    source = Path(__file__).with_name("read_bandwidth.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        subprocess.run(
            ["cc", "-O3", "-shared", "-fPIC", str(source), "-o", str(library), "-lpthread"],
            check=True,
        )
        function = ctypes.CDLL(str(library)).read_memory
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    # A buffer beyond the cache, so that starting threads costs nothing beside reading it.
    pool = torch.zeros(READ_BYTES, dtype=torch.uint8)

    def read() -> float:
        times = []
        for ahead in (0, 2560):
            begin = time.perf_counter()
            function(pool.data_ptr(), READ_BYTES // 8, ahead, threads)
            times.append(time.perf_counter() - begin)
        return min(times)

    return read


def call_overhead() -> float:
    """Microseconds of a product too small to cost anything."""
    tiles, _ = weights(16, 64)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    times = []
    for _ in range(2000):
        begin = time.perf_counter()
        fdb_linear_tiled(x, tiles[0], 64, 16, GROUP_SIZE)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def describe(row: dict[str, object]) -> str:
    medians, roof = row["median_us"], row["roof"]
    assert isinstance(medians, dict)
    assert isinstance(roof, dict)
    parts = [f"{row['out']}x{row['in']} batch {row['batch']} threads {row['threads']}:"]
    for name, value in medians.items():
        part = f"{name} {value:.1f} us"
        if name in roof:
            part += f" ({medians['torch bfloat16'] / value:.1f}x torch"
            part += f", roof {roof[name]:.2f})" if row["batch"] == 1 else ")"
        parts.append(part)
    read, empty = row["read_gb_per_second"], row["empty_call_us"]
    return "  ".join([*parts, f"read {read:.1f} GB/s", f"empty call {empty:.1f} us"])


if __name__ == "__main__":
    main()
