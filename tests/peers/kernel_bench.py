"""Times the packed product on the CPU beside torch's dense one and the memory's read bandwidth.

    python tests/peers/kernel_bench.py --threads 1 2 --batch 1 8 32 128 512

Every contender is timed in turn within one run, on weights that are cold in cache: it goes round
more copies than the last-level cache holds. Figures are medians; `roof` is the share of the read
bandwidth, measured between the products, that one vector's product reaches.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dbllm_cli.kernels import cpu_kernels, fdb_linear_tiled
from dbllm_cli.kernels.cpu import library_path

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (64, 4096), (576, 1536), (1536, 576)]
GROUP_SIZE = 64
COLD_BYTES = 200 * 2**20
READ_BYTES = 128 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sets", nargs="+", default=["avx512", "avx2", "portable"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for out, inputs in SHAPES:
            for batch in options.batch:
                row = measure(out, inputs, batch, threads, options.sets, options.repeats)
                rows.append(row)
                if not options.json:
                    print(describe(row), flush=True)
    if options.json:
        print(json.dumps(rows))


def measure(
    out: int, inputs: int, batch: int, threads: int, sets: list[str], repeats: int
) -> dict[str, object]:
    choose = ctypes.CDLL(str(library_path())).dbllm_choose
    choose.restype = ctypes.c_char_p
    tiles, dense = weights(out, inputs)
    read = reader(threads)
    x = torch.randn(batch, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    contenders: dict[str, Callable[[int], object]] = {}
    for name in sets:
        if choose(name.encode()) is not None:
            contenders[name] = lambda i, name=name: (
                choose(name.encode()),
                fdb_linear_tiled(x, tiles[i % len(tiles)], inputs, out, GROUP_SIZE),
            )
    contenders["torch bfloat16"] = lambda i: torch.nn.functional.linear(x, dense[i % len(dense)])
    seconds: dict[str, list[float]] = {name: [] for name in ("read", *contenders)}
    # A buffer beyond the cache, so that starting threads costs nothing beside reading it.
    pool = torch.zeros(READ_BYTES, dtype=torch.uint8)
    for repeat in range(repeats):
        if repeat % 5 == 0:
            for _ in range(2):
                begin = time.perf_counter()
                read(pool)
                seconds["read"].append(time.perf_counter() - begin)
        for number, (name, run) in enumerate(contenders.items()):
            begin = time.perf_counter()
            # Every contender meets copies that none has just read.
            run(repeat * len(contenders) + number)
            if repeat % 5:  # not just after the reader has emptied every cache
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) * 1e6 for name, times in seconds.items()}
    medians["read"] *= tiles[0].numel() / READ_BYTES
    empty = call_overhead()
    choose(None)
    return {"out": out, "in": inputs, "batch": batch, "threads": threads, "empty_call_us": empty,
            "tile_bytes": tiles[0].numel(), "median_us": medians}  # fmt: skip


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
    return [tensor.clone() for _ in range(max(2, min(400, COLD_BYTES // size)))]


def reader(threads: int) -> Callable[[Tensor], object]:
    source = Path(__file__).with_name("read_bandwidth.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        subprocess.run(
            ["cc", "-O3", "-shared", "-fPIC", str(source), "-o", str(library), "-lpthread"],
            check=True,
        )
        function = ctypes.CDLL(str(library)).read_memory
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda tensor: function(tensor.data_ptr(), tensor.numel() // 8, threads)


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
    medians = row["median_us"]
    assert isinstance(medians, dict)
    parts = [f"{row['out']}x{row['in']} batch {row['batch']} threads {row['threads']}:"]
    for name, value in medians.items():
        part = f"{name} {value:.1f} us"
        if name not in ("read", "torch bfloat16"):
            part += f" ({medians['torch bfloat16'] / value:.1f}x torch"
            part += f", roof {medians['read'] / value:.2f})" if row["batch"] == 1 else ")"
        parts.append(part)
    return "  ".join([*parts, f"empty call {row['empty_call_us']:.1f} us"])


if __name__ == "__main__":
    main()
