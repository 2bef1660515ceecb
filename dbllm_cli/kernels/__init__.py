"""The packed product and what goes with it: torch operators, and the routes behind them."""

from dbllm_cli.kernels.attention import attend_one, can_attend_one
from dbllm_cli.kernels.block import PackedBlock
from dbllm_cli.kernels.cpu import TILED_DTYPES, cpu_kernels
from dbllm_cli.kernels.distillation import DistillationTerms, can_distil, distillation_terms
from dbllm_cli.kernels.int8 import dequantize_rows, int8_linear, quantize_rows
from dbllm_cli.kernels.latents import can_round_latents, latent_gradients, latent_levels
from dbllm_cli.kernels.operator import fdb_linear, fdb_linear_tiled, has_gpu_kernel, kernel_name
from dbllm_cli.kernels.packing import pack_planes, unpack_planes
from dbllm_cli.kernels.planes import can_scale_planes, plane_gradients, plane_levels
from dbllm_cli.kernels.reference import dequantize, levels_of, offset_of
from dbllm_cli.machine.cpu_library import REFERENCE

__all__ = [
    "REFERENCE",
    "TILED_DTYPES",
    "DistillationTerms",
    "PackedBlock",
    "attend_one",
    "can_attend_one",
    "can_distil",
    "can_round_latents",
    "can_scale_planes",
    "cpu_kernels",
    "dequantize",
    "dequantize_rows",
    "distillation_terms",
    "fdb_linear",
    "fdb_linear_tiled",
    "has_gpu_kernel",
    "int8_linear",
    "kernel_name",
    "latent_gradients",
    "latent_levels",
    "levels_of",
    "offset_of",
    "pack_planes",
    "plane_gradients",
    "plane_levels",
    "quantize_rows",
    "unpack_planes",
]
