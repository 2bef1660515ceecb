"""The packed product: torch operators, and the routes behind them."""

from dbllm_cli.kernels.cpu import REFERENCE, cpu_kernels
from dbllm_cli.kernels.operator import TILED_DTYPES, fdb_linear, fdb_linear_tiled
from dbllm_cli.kernels.reference import dequantize, unpack_planes

__all__ = [
    "REFERENCE",
    "TILED_DTYPES",
    "cpu_kernels",
    "dequantize",
    "fdb_linear",
    "fdb_linear_tiled",
    "unpack_planes",
]
