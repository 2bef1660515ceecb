"""The packed product: one torch operator, `dbllm::fdb_linear`, and the routes behind it."""

from dbllm_cli.kernels.operator import fdb_linear
from dbllm_cli.kernels.reference import dequantize, unpack_planes

__all__ = ["dequantize", "fdb_linear", "unpack_planes"]
