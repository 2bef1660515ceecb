"""What the stages share that go through a model block by block: streams, and finished blocks."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from dbllm_cli.blockwise.block_error import relative_token_error
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.fdb.quantized import QuantizedMatrix
from dbllm_cli.llm.blocks import layer_shape
from dbllm_cli.records.checkpoints import keep_tensors, last_checkpoint, save_checkpoint
from dbllm_cli.tensors import TensorFolder

BlockReport = list[dict[str, float]]
"""The figures of every finished block."""


@dataclass
class BlockStreams:
    """What enters the next block, `[n, tokens, hidden]` on the CPU, in the model's dtype.

    Attributes:
        teacher: in the teacher.
        student: after the quantized blocks before it.
        ahead: the teacher's after the next block, where a window of two has run it already; a
            resumed run does not have it.
    """

    teacher: Tensor
    student: Tensor
    ahead: Tensor | None = None


def begin_streams(
    model: StreamedModel,
    sequences: Tensor,
    batch_size: int,
    scratch: Path,
    student: TensorFolder | None = None,
) -> tuple[BlockStreams, BlockReport]:
    """The streams as they enter the first block that is not finished, and the report so far.

    Args:
        model: the teacher.
        sequences: int64 token ids `[n, tokens]`.
        batch_size: sequences at once, whenever blocks run.
        scratch: of the stage.
        student: where the student's own embeddings are; the teacher's when absent.
    """
    entering = model.enter(sequences, batch_size)
    checkpoint = last_checkpoint(scratch, "streams")
    if checkpoint is None:
        if student is None:
            return BlockStreams(entering, entering), []
        model.load_outside(student)
        own = model.enter(sequences, batch_size)
        model.load_outside(model.tensors)
        return BlockStreams(entering, own), []
    tensors, state = checkpoint
    report = cast(BlockReport, state["report"])
    return BlockStreams(tensors["teacher"], tensors["student"]), report


def entering_batch(
    streams: BlockStreams, chosen: Tensor, teacher_share: float, generator: torch.Generator
) -> Tensor:
    """What a batch enters the block with: tokens of the student's, some drawn from the teacher's.

    As QDrop (arXiv 2203.05740) drops the rounding of inputs: a block that sees both learns to leave
    what is right as it is, and is less fitted to the errors of this calibration.

    Args:
        streams: of all sequences.
        chosen: int64 indices of the batch's sequences.
        teacher_share: chance of a token to enter as the teacher has it.
        generator: draws them.

    Returns:
        `[batch, tokens, hidden]` on the CPU.
    """
    student = streams.student[chosen]
    if teacher_share == 0:
        return student
    drawn = torch.rand(student.shape[:-1], generator=generator) < teacher_share
    return torch.where(drawn.unsqueeze(-1), streams.teacher[chosen], student)


def keep_streams(scratch: Path, streams: BlockStreams, report: BlockReport) -> None:
    """Save what a killed run goes on from; the last block's own files must be written before."""
    tensors = {"teacher": streams.teacher, "student": streams.student}
    save_checkpoint(scratch, "streams", len(report) - 1, tensors, {"report": report})


def keep_layers(
    scratch: Path,
    index: int,
    layers: Mapping[str, QuantizedMatrix],
    latents: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a finished block's layers, whole or not at all.

    Args:
        scratch: of the stage.
        index: of the block.
        layers: name within the block -> planes and scales.
        latents: name within the block -> latent weights, where they were trained.
    """
    tensors = {f"{name}.latent": latent for name, latent in (latents or {}).items()}
    for name, matrix in layers.items():
        tensors[f"{name}.weight"], tensors[f"{name}.alpha"] = matrix.weight, matrix.alpha
    keep_tensors(tensors, scratch / f"block-{index}.safetensors")


def finished_layers(
    model: StreamedModel, scratch: Path, group_size: int, levels: str
) -> Iterator[tuple[str, QuantizedMatrix, Tensor | None]]:
    """Full name, planes and scales, and latent weights or None, of every layer that was kept."""
    for index in range(len(model.blocks)):
        tensors = TensorFolder(scratch, f"block-{index}")
        for key in tensors.names():
            if not key.endswith(".alpha"):
                continue
            name = key.removesuffix(".alpha")
            full = f"{model.blocks.name(index)}.{name}"
            in_features, _ = layer_shape(model.model.get_submodule(full))
            weight, alpha = tensors.get(f"{name}.weight"), tensors.get(key)
            latent = tensors.get(f"{name}.latent") if f"{name}.latent" in tensors else None
            matrix = QuantizedMatrix(weight, alpha, in_features, group_size, levels)
            yield full, matrix, latent


def mean_error(output: Tensor, targets: Tensor, batch_size: int) -> float:
    """Relative error of a block's output, `[n, tokens, hidden]` both, batch by batch."""
    parts = zip(output.split(batch_size), targets.split(batch_size), strict=True)
    errors = [float(relative_token_error(o, t)) * len(o) for o, t in parts]
    return math.fsum(errors) / len(output)
