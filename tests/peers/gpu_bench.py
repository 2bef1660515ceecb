"""Times the packed product on a GPU beside torch's dense one and the card's bandwidth.

    python tests/peers/gpu_bench.py --rows 1 4 8 128 1024

A contender is a CUDA graph of products with several layers, together four times the L2 cache:
weights are cold, and Python is not waited for. Graphs are replayed in turn; figures are medians
for a product in microseconds. `roof` is the share of the read bandwidth, measured in the same
turns, that the packed layer's bytes reach.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from dbllm_cli.kernels import dequantize

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
DTYPES = [torch.float16, torch.bfloat16]
GROUP_SIZE = 64
STREAMED_BYTES = 2**29
REPEATS = 30

Call = Callable[..., Tensor]
Layer = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 128, 1024])
    parser.add_argument("--blocks", type=int, nargs=5, help="the fields of kernels.gpu.Blocks")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_bench needs a CUDA GPU, and torch sees none")
    from dbllm_cli.kernels.gpu import Blocks, fdb_linear_gpu

    product = partial(fdb_linear_gpu, blocks=options.blocks and Blocks(*options.blocks))
    torch.set_default_device("cuda")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    results: list[dict[str, object]] = []
    with torch.inference_mode():
        for (out, inputs), dtype in itertools.product(SHAPES, DTYPES):
            turns = range(2 + 4 * cache * 16 // (out * inputs * 5))
            packed = [layer(out, inputs) for _ in turns]
            dense = [torch.randn(out, inputs, dtype=dtype) / 64 for _ in turns]
            for rows in options.rows:
                x = torch.randn(rows, inputs, dtype=dtype)
                check(product(x, *packed[0], None, GROUP_SIZE), x, *packed[0])
                case = {"out": out, "in": inputs, "dtype": str(dtype)[6:], "rows": rows}
                results.append(case | measure(product, x, packed, dense))
    if options.json:
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "results": results}))
    else:
        print(*(f"{name:>9}" for name in results[0]))
        for found in results:
            print(*(f"{value!s:>9}" for value in found.values()))


def layer(out: int, inputs: int) -> Layer:
    planes = torch.randint(256, (2, out, inputs // 8), dtype=torch.uint8)
    scales = torch.rand(2, out, inputs // GROUP_SIZE) * torch.tensor([[[0.02]], [[-0.01]]])
    return planes, scales.half()


def check(y: Tensor, x: Tensor, planes: Tensor, scales: Tensor) -> None:
    """A wrong product has no speed."""
    exact = x.double() @ dequantize(planes, scales, x.shape[1], GROUP_SIZE, torch.float64).t()
    if not (y - exact).norm() < 1e-2 * exact.norm():
        sys.exit(f"the product of {list(x.shape)} in {x.dtype} is wrong")


def measure(product: Call, x: Tensor, packed: list[Layer], dense: list[Tensor]) -> dict[str, float]:
    source = torch.zeros(STREAMED_BYTES // 4)
    calls: dict[str, list[Call]] = {
        "packed": [partial(product, x, *pair, None, GROUP_SIZE) for pair in packed],
        "dense": [partial(linear, x, weight) for weight in dense],
        "read": [source.sum],
        "copy": [partial(torch.empty_like(source).copy_, source)],
    }
    graphs = {name: graph_of(turn) for name, turn in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, graph in graphs.items():
            begin, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / len(calls[name]))
    packed_us, dense_us, read_us, copy_us = map(statistics.median, times.values())
    size = sum(part.nbytes for part in packed[0])
    return {
        "packed": round(packed_us, 2),
        "dense": round(dense_us, 2),
        "read GB/s": round(STREAMED_BYTES / read_us / 1e3),
        "copy GB/s": round(2 * STREAMED_BYTES / copy_us / 1e3),
        "roof": round(size / packed_us / STREAMED_BYTES * read_us, 3),
    }


def graph_of(turn: list[Call]) -> torch.cuda.CUDAGraph:
    turn[0]()  # what is compiled or allocated once must be there before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turn:
            call()
    return graph


if __name__ == "__main__":
    main()
