"""The packed product on a GPU, in Triton: planes and scales are read as files hold them.

Both kernels unpack a tile of `w = alpha1·b1 + alpha2·b2 + beta` (DB-LLM, arXiv 2402.11960, Flexible
Dual Binarization; beta where there is an offset) in registers and never write the dense matrix:
one adds products as they come, for the few rows of decoding, the other multiplies on tensor cores.
All sums are float32, and their order depends on dtype and shapes alone.

Importing this module imports Triton.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbllm_cli.kernels.reference import offset_of

DECODE_ROWS = 4
"""Up to so many rows of x, no tensor cores: blocks large enough for them are too few for a GPU."""


class Blocks(NamedTuple):
    """What one program of a kernel does, and how.

    Attributes:
        rows: rows of x, a power of two.
        outputs: rows of the weights, a power of two.
        inputs: columns read in one step, a power of two.
        warps: warps of 32 threads.
        stages: steps whose loads are under way at once.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def choose_blocks(rows: int, dtype: torch.dtype) -> Blocks:
    """Blocks by the number of rows: no timing, so equal calls give equal bits.

    They come from reading the code that Triton makes of them for sm_80 and sm_90: few
    instructions for a weight, no registers spilled, and no more shared memory than the 99 KiB
    of consumer cards. They have not been timed.
    """
    if rows <= DECODE_ROWS:
        return Blocks(triton.next_power_of_2(rows), 8, 1024, warps=4, stages=3)
    if dtype == torch.float32:
        # Tensor cores round float32: these products are made one by one, out of registers.
        return Blocks(16, 32, 32, 4, 3) if rows <= 16 else Blocks(64, 64, 32, 8, 3)
    if rows <= 16:
        return Blocks(16, 32, 128, warps=4, stages=3)
    if rows <= 64:
        return Blocks(64, 64, 64, warps=4, stages=3)
    return Blocks(128, 128, 64, warps=8, stages=3)


def fdb_linear_gpu(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    blocks: Blocks | None = None,
) -> Tensor:
    """The product, as `dbllm_cli.kernels.operator.fdb_linear`.

    Args:
        x: input, float32, bfloat16 or float16 `[..., in]`, with any strides.
        weight: planes b1 and b2, uint8 `[2, out, ceil(in / 8)]`, least significant bit first.
        scales: scales alpha1 and alpha2, and the offset beta where there is one, floating
            `[2 or 3, out, groups]`.
        bias: `[out]`, or None.
        group_size: inputs that share their scales, a multiple of 8; the last group may be shorter.
        blocks: in place of `choose_blocks`.

    Returns:
        `[..., out]` of x's dtype. As in the reference, an input that is not finite gives NaN
        where its weight is 0; from five rows on, weights are rounded to x's dtype.

    Raises:
        ValueError: the tensors do not fit each other, or groups do not end with a byte.
    """
    in_features, out_features = x.shape[-1], weight.shape[1]
    groups = -(-in_features // group_size)
    for name, tensor, shape in (
        ("planes", weight, (2, out_features, -(-in_features // 8))),
        ("scales", scales, (2 if offset_of(scales) is None else 3, out_features, groups)),
        ("a bias", bias, (out_features,)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.device != x.device):
            raise ValueError(
                f"{in_features} inputs on {x.device} in groups of {group_size} take {name} "
                f"{list(shape)} there, not {list(tensor.shape)} on {tensor.device}"
            )
    if group_size % 8:
        raise ValueError(f"groups of {group_size} do not end with a byte")
    flat = x.reshape(-1, in_features).contiguous()
    result = flat.new_empty(len(flat), out_features)
    if result.numel():
        blocks = blocks or choose_blocks(len(flat), x.dtype)
        with torch.cuda.device_of(flat):
            _launch(
                result, flat, weight.contiguous(), scales.contiguous(), bias, group_size, blocks
            )
    return result.view(*x.shape[:-1], out_features)


def _launch(
    result: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    blocks: Blocks,
) -> None:
    rows, in_features = x.shape
    out_features = weight.shape[1]
    # A word must not reach into the next row or the next group.
    wide = weight.shape[-1] % 4 == 0 and group_size % 32 == 0 and weight.storage_offset() % 4 == 0
    bits, words = (32, weight.view(torch.int32)) if wide else (8, weight)
    kernel = _decode if rows <= DECODE_ROWS else _prefill
    grid = (triton.cdiv(out_features, blocks.outputs), triton.cdiv(rows, blocks.rows))
    kernel[grid](
        result,
        x,
        words,
        scales,
        None if bias is None else bias.contiguous(),
        rows,
        in_features,
        out_features,
        words.shape[-1],
        scales.shape[-1],
        # Whole planes are beyond 32 bits in a large layer: Triton takes these as 64 bits then.
        words.shape[1] * words.shape[2],
        scales.shape[1] * scales.shape[2],
        bits=bits,
        group_words=group_size // bits,
        whole=in_features % blocks.inputs == 0,
        offset=offset_of(scales) is not None,
        block_rows=blocks.rows,
        block_out=blocks.outputs,
        block_words=blocks.inputs // bits,
        stages=blocks.stages,
        num_warps=blocks.warps,
        enable_fp_fusion=True,  # without it every multiply-add is two instructions
    )


@triton.jit  # type: ignore[untyped-decorator]
def _load(pointers: tl.tensor, inside: tl.tensor, whole: tl.constexpr) -> tl.tensor:
    return tl.load(pointers) if whole else tl.load(pointers, mask=inside, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(
    weight: tl.tensor,
    scales: tl.tensor,
    output: tl.tensor,
    word: tl.tensor,
    row_words: tl.tensor,
    groups: tl.tensor,
    plane_words: tl.tensor,
    plane_groups: tl.tensor,
    bits: tl.constexpr,
    group_words: tl.constexpr,
    whole: tl.constexpr,
    offset: tl.constexpr,
) -> tl.tensor:
    """Weights of these outputs `[outs]` and words `[words]`: float32 `[bits, outs, words]`.

    The bits come first: then Triton keeps the bits of a word in the thread that has loaded it,
    and shifts are constants. As the last dimension they would be spread over the threads.
    """
    inside = word[None, :] < row_words
    at = weight + output[:, None] * row_words + word[None, :]
    words1 = _load(at, inside, whole)
    words2 = _load(at + plane_words, inside, whole)
    at = scales + output[:, None] * groups + (word // group_words)[None, :]
    scales1 = _load(at, inside, whole).to(tl.float32)
    scales2 = _load(at + plane_groups, inside, whole).to(tl.float32)
    shift = tl.arange(0, bits)[:, None, None]
    on1 = ((words1[None, :, :] >> shift) & 1) != 0
    on2 = ((words2[None, :, :] >> shift) & 1) != 0
    weights = tl.where(on1, scales1[None, :, :], 0.0) + tl.where(on2, scales2[None, :, :], 0.0)
    if offset:
        beta = _load(at + 2 * plane_groups, inside, whole).to(tl.float32)
        weights += beta[None, :, :]
    return weights


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    result: tl.tensor,
    total: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    out_features: tl.tensor,
) -> None:
    """Write sums `[rows, outs]` with the bias, rounded once."""
    if bias is not None:
        inside = output < out_features
        total += tl.load(bias + output, mask=inside, other=0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (output < out_features)[None, :]
    at = result + row[:, None].to(tl.int64) * out_features + output[None, :]
    tl.store(at, total.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _decode(
    result: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    row_words: tl.tensor,
    groups: tl.tensor,
    plane_words: tl.tensor,
    plane_groups: tl.tensor,
    bits: tl.constexpr,
    group_words: tl.constexpr,
    whole: tl.constexpr,
    offset: tl.constexpr,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_words: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Few rows: products are added as they come, word by word, and words once at the end."""
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    output = tl.program_id(0) * block_out + tl.arange(0, block_out)
    # What lies beyond is read from the last row again and never stored: no mask in the loop.
    read_row = tl.minimum(row, rows - 1).to(tl.int64)
    read_output = tl.minimum(output, out_features - 1).to(tl.int64)
    partial = tl.zeros([block_rows, block_out, block_words], tl.float32)
    for start in tl.range(0, row_words, block_words, num_stages=stages):
        word = start + tl.arange(0, block_words)
        column = (word * bits)[None, :] + tl.arange(0, bits)[:, None]
        at = x + read_row[:, None, None] * in_features + column[None, :, :]
        inputs = _load(at, (column < in_features)[None, :, :], whole).to(tl.float32)
        weights = _unpack(
            weight, scales, read_output, word, row_words, groups, plane_words, plane_groups,
            bits, group_words, whole, offset,
        )  # fmt: skip
        partial += tl.sum(inputs[:, :, None, :] * weights[None, :, :, :], 1)
    _store(result, tl.sum(partial, 2), bias, row, output, rows, out_features)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _prefill(
    result: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    row_words: tl.tensor,
    groups: tl.tensor,
    plane_words: tl.tensor,
    plane_groups: tl.tensor,
    bits: tl.constexpr,
    group_words: tl.constexpr,
    whole: tl.constexpr,
    offset: tl.constexpr,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_words: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Many rows: weights are rounded to x's dtype and multiplied on tensor cores."""
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    output = tl.program_id(0) * block_out + tl.arange(0, block_out)
    read_row = tl.minimum(row, rows - 1).to(tl.int64)
    read_output = tl.minimum(output, out_features - 1).to(tl.int64)
    total = tl.zeros([block_rows, block_out], tl.float32)
    for start in tl.range(0, row_words, block_words, num_stages=stages):
        column = start * bits + tl.arange(0, block_words * bits)
        at = x + read_row[:, None] * in_features + column[None, :]
        inputs = _load(at, (column < in_features)[None, :], whole)
        weights = _unpack(
            weight, scales, read_output, start + tl.arange(0, block_words), row_words, groups,
            plane_words, plane_groups, bits, group_words, whole, offset,
        )  # fmt: skip
        weights = tl.permute(weights.to(x.dtype.element_ty), (2, 0, 1))
        weights = tl.reshape(weights, [block_words * bits, block_out])
        total = tl.dot(inputs, weights, total, input_precision="ieee")
    _store(result, total, bias, row, output, rows, out_features)
