"""The hidden states between two blocks, in the teacher and in the student."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dbllm_cli.blockwise.block_error import relative_token_error


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


def mean_error(output: Tensor, targets: Tensor, batch_size: int) -> float:
    """Relative error of a block's output, `[n, tokens, hidden]` both, batch by batch."""
    parts = zip(output.split(batch_size), targets.split(batch_size), strict=True)
    errors = [float(relative_token_error(o, t)) * len(o) for o, t in parts]
    return math.fsum(errors) / len(output)
