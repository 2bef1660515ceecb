"""The packed product: torch operators, and the routes behind them."""

from dbllm_cli.kernels.attention import attend_one, can_attend_one
from dbllm_cli.kernels.block import PackedBlock
from dbllm_cli.kernels.cpu import REFERENCE, TILED_DTYPES, cpu_kernels
from dbllm_cli.kernels.int8 import dequantize_rows, int8_linear, quantize_rows
from dbllm_cli.kernels.operator import fdb_linear, fdb_linear_tiled, has_gpu_kernel
from dbllm_cli.kernels.reference import dequantize, unpack_planes

__all__ = [
    "REFERENCE",
    "TILED_DTYPES",
    "PackedBlock",
    "attend_one",
    "can_attend_one",
    "cpu_kernels",
    "dequantize",
    "dequantize_rows",
    "fdb_linear",
    "fdb_linear_tiled",
    "has_gpu_kernel",
    "int8_linear",
    "quantize_rows",
    "unpack_planes",
]
