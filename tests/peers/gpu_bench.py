"""Times the packed product on a GPU beside torch's dense one and the card's bandwidth.

    python tests/peers/gpu_bench.py --rows 1 2 4 8 16 128 1024

Every contender is a CUDA graph of its product with each of several layers, which together are
four times the L2 cache: weights are cold, and no call is waited for. Graphs are replayed in turn;
figures are medians for one product. `eager` is the time of calls as Python makes them. `roof` is
the share of the read bandwidth, measured between the products, that the packed layer's bytes reach.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from dbllm_cli.kernels import dequantize, fdb_linear

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
DTYPES = [torch.float16, torch.bfloat16]
GROUP_SIZE = 64
STREAMED_BYTES = 2**29
OTHER_BLOCKS = [
    (4, 1024, 4, 3),
    (16, 1024, 4, 3),
    (8, 1024, 4, 4),
    (32, 128, 4, 4),
    (64, 128, 4, 3),
]

Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 128, 1024])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true", help="try OTHER_BLOCKS too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_bench needs a CUDA GPU, and torch sees none")
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    results = []
    with torch.inference_mode():
        for out, inputs in SHAPES:
            packed = [layer(out, inputs) for _ in range(copies(out * inputs * 5 // 16))]
            for dtype in DTYPES:
                count = copies(out * inputs * 2)
                dense = [torch.randn(out, inputs, dtype=dtype) / 64 for _ in range(count)]
                for rows in options.rows:
                    x = torch.randn(rows, inputs, dtype=dtype)
                    check(x, *packed[0])
                    calls = contenders(x, packed, dense, options.sweep)
                    found = {"out": out, "in": inputs, "dtype": str(dtype), "rows": rows}
                    results.append(found | measure(calls, packed[0], options.repeats))
                    if not options.json:
                        print(describe(results[-1]), flush=True)
    if options.json:
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "results": results}))


def layer(out: int, inputs: int) -> tuple[Tensor, Tensor]:
    planes = torch.randint(256, (2, out, inputs // 8), dtype=torch.uint8)
    scales = torch.rand(2, out, inputs // GROUP_SIZE) * torch.tensor([[[0.02]], [[-0.01]]])
    return planes, scales.half()


def copies(size: int) -> int:
    return max(2, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // size))


def check(x: Tensor, planes: Tensor, scales: Tensor) -> None:
    """A wrong product has no speed."""
    exact = x.double() @ dequantize(planes, scales, x.shape[1], GROUP_SIZE, torch.float64).t()
    error = (fdb_linear(x, planes, scales, None, GROUP_SIZE) - exact).norm() / exact.norm()
    if not error < 1e-2:
        sys.exit(f"the product of {list(x.shape)} in {x.dtype} is off by {float(error):.1e}")


def contenders(
    x: Tensor, packed: list[tuple[Tensor, Tensor]], dense: list[Tensor], sweep: bool
) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = {
        "packed": [partial(fdb_linear, x, *pair, None, GROUP_SIZE) for pair in packed],
        "dense": [partial(linear, x, weight) for weight in dense],
    }
    if sweep:
        from dbllm_cli.kernels.gpu import DECODE_ROWS, Blocks, choose_blocks, fdb_linear_gpu

        usual = choose_blocks(len(x), x.dtype)
        for other in OTHER_BLOCKS:
            if (other[1] == 1024) == (len(x) <= DECODE_ROWS):
                product = partial(fdb_linear_gpu, x, blocks=Blocks(usual.rows, *other))
                calls[str(other)] = [
                    partial(product, weight=planes, alpha=scales, bias=None, group_size=GROUP_SIZE)
                    for planes, scales in packed
                ]
    return calls


def measure(
    calls: dict[str, list[Call]], packed: tuple[Tensor, Tensor], repeats: int
) -> dict[str, object]:
    source = torch.zeros(STREAMED_BYTES // 4)
    target = torch.empty_like(source)
    turns = calls | {"read": [source.sum], "copy": [partial(target.copy_, source)]}
    graphs = {name: graph_of(turn) for name, turn in turns.items()}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats):
        for name, graph in graphs.items():
            times[name].append(seconds(graph) / len(turns[name]))
    median = {name: statistics.median(taken) for name, taken in times.items()}
    size = sum(part.numel() * part.element_size() for part in packed)
    return {
        "us": {name: median[name] * 1e6 for name in calls},
        "eager_us": {name: eager(calls[name]) * 1e6 for name in ("packed", "dense")},
        "read_gb_per_s": STREAMED_BYTES / median["read"] / 1e9,
        "copy_gb_per_s": 2 * STREAMED_BYTES / median["copy"] / 1e9,
        "roof": size / median["packed"] / (STREAMED_BYTES / median["read"]),
    }


def graph_of(turn: list[Call]) -> torch.cuda.CUDAGraph:
    for call in turn:  # what is compiled or allocated once must be there before
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turn:
            call()
    graph.replay()
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def eager(turn: list[Call], rounds: int = 5) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in turn * rounds:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / len(turn) / rounds


def describe(found: dict[str, object]) -> str:
    return (
        "{out:>5}x{in:<5} {dtype:<14} rows {rows:<5}".format(**found)
        + " ".join(f"{name} {value:.1f}" for name, value in found["us"].items())
        + " us, eager "
        + " ".join(f"{name} {value:.1f}" for name, value in found["eager_us"].items())
        + " us, read {read_gb_per_s:.0f} copy {copy_gb_per_s:.0f} GB/s, roof {roof:.2f}".format(
            **found
        )
    )


if __name__ == "__main__":
    main()
