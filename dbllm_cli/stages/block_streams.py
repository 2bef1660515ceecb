"""Hidden states between blocks, for the stages that go through a model block by block."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from dbllm_cli.llm.streaming import StreamedModel
from dbllm_cli.stages.resuming import last_checkpoint, save_checkpoint

BlockReport = list[dict[str, float]]
"""The figures of every finished block."""


@dataclass
class BlockStreams:
    """What enters the next block, float32 `[n, tokens, hidden]` on the CPU.

    Attributes:
        teacher: in the teacher.
        student: after the quantized blocks before it.
    """

    teacher: Tensor
    student: Tensor


def begin_streams(
    model: StreamedModel, sequences: Tensor, batch_size: int, scratch: Path
) -> tuple[BlockStreams, BlockReport]:
    """The streams as they enter the first block that is not finished, and the report so far.

    Args:
        model: the teacher.
        sequences: int64 token ids `[n, tokens]`.
        batch_size: sequences at once, whenever blocks run.
        scratch: of the stage.
    """
    entering = model.enter(sequences, batch_size)
    checkpoint = last_checkpoint(scratch, "streams")
    if checkpoint is None:
        return BlockStreams(entering, entering), []
    tensors, state = checkpoint
    report = cast(BlockReport, state["report"])
    return BlockStreams(tensors["teacher"], tensors["student"]), report


def keep_streams(scratch: Path, streams: BlockStreams, report: BlockReport) -> None:
    """Save what a killed run goes on from; the last block's own files must be written before."""
    tensors = {"teacher": streams.teacher, "student": streams.student}
    save_checkpoint(scratch, "streams", len(report) - 1, tensors, {"report": report})
