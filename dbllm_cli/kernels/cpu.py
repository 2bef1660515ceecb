"""The compiled CPU kernels of `csrc/`: found, chosen for this processor, registered with torch.

`DBLLM_KERNEL` forces an instruction set, or `reference` for none: plain torch unpacks the planes
at every call. Without the compiled library, or with a torch before 2.10, the reference is all; a
library that is there and can't be used is warned of.
"""

import ctypes
import os
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dbllm_cli.errors import ConfigError
from dbllm_cli.kernels.reference import offset_of
from dbllm_cli.machine.cpu_library import INSTRUCTION_SETS, REFERENCE, VARIABLE, library_path

TILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the compiled kernels take."""

_WORD_INPUTS = 32
_BLOCK_ROWS = 64
_LAYOUT = 3

# The operators are defined here and implemented by the library, for CPU tensors alone.
_OPERATORS = torch.library.Library("dbllm", "FRAGMENT")
_OPERATORS.define(
    "fdb_linear_tiled(Tensor x, Tensor tiles, int out_features, int group_size) -> Tensor"
)
_OPERATORS.define("int8_linear_cpu(Tensor x, Tensor weight) -> Tensor")
_OPERATORS.define(
    "attend_one_cpu(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor"
)
_OPERATORS.define(
    "distillation_cpu(Tensor student, Tensor teacher, bool gradient) -> (Tensor, Tensor)"
)
_OPERATORS.define(
    "plane_levels_cpu(Tensor planes, Tensor alpha, int in_features, int group_size, bool bfloat16)"
    " -> Tensor"
)
_OPERATORS.define(
    "plane_gradients_cpu(Tensor dense, Tensor planes, Tensor alpha, int group_size) -> Tensor"
)
_OPERATORS.define(
    "latent_levels_cpu(Tensor latent, Tensor alpha, Tensor cells, int group_size, bool bfloat16)"
    " -> Tensor"
)
_OPERATORS.define(
    "latent_gradients_cpu(Tensor dense, Tensor latent, Tensor alpha, Tensor cells, int group_size)"
    " -> (Tensor, Tensor)"
)
_OPERATORS.define(
    "block_before_cache(Tensor hidden, Tensor norm, Tensor q, Tensor k, Tensor v, Tensor q_bias,"
    " Tensor k_bias, Tensor v_bias, Tensor q_norm, Tensor k_norm, Tensor cos, Tensor sin,"
    " int heads, int key_heads, int head_dim, int group_size, float eps)"
    " -> (Tensor, Tensor, Tensor)"
)
_OPERATORS.define(
    "block_after_cache(Tensor hidden, Tensor query, Tensor key, Tensor value, Tensor mask,"
    " Tensor o, Tensor norm, Tensor gate, Tensor up, Tensor down, int intermediate, int group_size,"
    " float eps, float scale) -> Tensor"
)


class CpuKernels:
    """The loaded library.

    Attributes:
        instruction_set: the one in use.
    """

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self._tile = library.dbllm_tile
        self._tile.restype = None
        self._tile.argtypes = [*[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 3, ctypes.c_int]
        self._bytes = library.dbllm_tiles_bytes
        self._bytes.restype = ctypes.c_int64
        self._bytes.argtypes = [ctypes.c_int64] * 3

    def tiles_bytes(self, in_features: int, out_features: int, group_size: int) -> int:
        """How long the tiles of a layer are."""
        length: int = self._bytes(in_features, out_features, group_size)
        return length

    def fits(self, group_size: int) -> bool:
        """Whether there is a kernel for this group size: a multiple of 32."""
        return group_size % _WORD_INPUTS == 0

    def to_tiles(self, weight: Tensor, scales: Tensor, in_features: int, group_size: int) -> Tensor:
        """Planes and scales in the layout of the kernels (`csrc/fdb.h`).

        It takes as many bytes as they, but for rows that fill the last tile of 16 (of offsets, the
        last block of 64) and inputs that fill the last word of 32.

        Args:
            weight: planes, uint8 `[2, out, ceil(in / 8)]` on the CPU.
            scales: and the offset where there is one, float16 `[2 or 3, out, groups]` on the CPU.
            in_features: inputs of the layer.
            group_size: a multiple of 32.

        Returns:
            uint8 `[bytes]`.
        """
        weight, scales = weight.contiguous(), scales.to(torch.float16).contiguous()
        shape = (in_features, weight.shape[1], group_size)
        tiles = torch.zeros(self.tiles_bytes(*shape), dtype=torch.uint8, device="cpu")
        self._tile(*shape, weight.data_ptr(), scales.data_ptr(), tiles.data_ptr(), 1)
        offset = offset_of(scales)
        return tiles if offset is None else torch.cat((tiles, _offset_blocks(offset)))

    def from_tiles(
        self, tiles: Tensor, in_features: int, out_features: int, group_size: int
    ) -> tuple[Tensor, Tensor]:
        """The inverse of `to_tiles`: planes and scales."""
        row_bytes = -(-in_features // 8)
        length = self.tiles_bytes(in_features, out_features, group_size)
        tiles, blocks = tiles.cpu().tensor_split([length])
        weight = torch.zeros(2, out_features, row_bytes, dtype=torch.uint8, device="cpu")
        groups = -(-in_features // group_size)
        scales = torch.zeros(2, out_features, groups, dtype=torch.float16, device="cpu")
        shape = (in_features, out_features, group_size)
        self._tile(*shape, weight.data_ptr(), scales.data_ptr(), tiles.data_ptr(), 0)
        if len(blocks) > 0:
            scales = torch.cat((scales, _offsets_of_blocks(blocks, out_features, groups)))
        return weight, scales


def _offset_blocks(beta: Tensor) -> Tensor:
    """Offsets float16 `[out, groups]` as bytes, group by group in every block of rows."""
    out_features, groups = beta.shape
    padded = torch.nn.functional.pad(beta, (0, 0, 0, -out_features % _BLOCK_ROWS))
    blocks = padded.view(-1, _BLOCK_ROWS, groups).transpose(1, 2)
    return blocks.contiguous().flatten().view(torch.uint8)


def _offsets_of_blocks(blocks: Tensor, out_features: int, groups: int) -> Tensor:
    """The inverse of `_offset_blocks`: `[1, out, groups]`."""
    halves = blocks.view(torch.float16).view(-1, groups, _BLOCK_ROWS)
    return halves.transpose(1, 2).reshape(1, -1, groups)[:, :out_features]


@cache
def cpu_kernels() -> CpuKernels | None:
    """The kernels for this processor; None where the reference is used.

    Raises:
        ConfigError: DBLLM_KERNEL names an instruction set that is not there.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted == REFERENCE:
        return None
    loaded = _load(wanted)
    if isinstance(loaded, CpuKernels):
        return loaded
    if wanted is not None:
        raise ConfigError(
            f"{VARIABLE}={wanted} can't be used: {loaded}",
            f"one of {', '.join((*INSTRUCTION_SETS, REFERENCE))}; "
            "dbllm doctor says which are there",
        )
    if library_path() is not None:
        slow = "packed layers run in plain torch, several times slower"
        warnings.warn(f"the CPU kernels can't be used: {loaded}; {slow}", stacklevel=2)
    return None


def refusal() -> str | None:
    """Why a compiled library that is there can't be used; None where it can."""
    loaded = _load(None)
    return loaded if isinstance(loaded, str) and library_path() is not None else None


def torch_library() -> Path:
    """Torch's own library, whose functions the operators call."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"


def _load(wanted: str | None) -> CpuKernels | str:
    """The kernels, or why there are none."""
    path = library_path()
    if path is None:
        return "the kernels are not compiled"
    library = ctypes.CDLL(str(path))
    if getattr(library, "dbllm_layout", lambda: 0)() != _LAYOUT:
        return "they were compiled from other sources: pip install -e . again"
    library.dbllm_choose.restype = library.dbllm_register.restype = ctypes.c_char_p
    chosen = library.dbllm_choose(None if wanted is None else wanted.encode())
    if chosen is None:
        return "this processor does not have it"
    lacking = library.dbllm_register(str(torch_library()).encode())
    if lacking is not None:
        return f"torch {torch.__version__} lacks {lacking.decode()}"
    return CpuKernels(library, chosen.decode())
