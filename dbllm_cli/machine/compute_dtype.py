"""The dtype that a stage multiplies in, where its settings leave that to the machine."""

import time
from functools import cache

import torch

_SIZE = 512
"""Rows, columns and inputs of the product that is timed: 2 ms at 150 GFLOPS."""


@cache
def faster_dtype(device: str) -> str:
    """bfloat16 where the device multiplies faster in it than in float32, else float32.

    It is measured: what a processor says of itself does not tell. One thread of an Intel Xeon with
    AVX-512 BF16 and no AMX takes 1.8 times as long in bfloat16, one with AVX2 alone 12 times.

    Args:
        device: torch device.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    if kind != "cpu":
        return "bfloat16"
    return min(("bfloat16", "float32"), key=_product_seconds)


def _product_seconds(dtype: str) -> float:
    """The shortest of three, after one that lets the library choose its code."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
