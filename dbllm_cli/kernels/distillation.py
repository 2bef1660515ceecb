"""Cross-entropy to the teacher, both entropies and the gradient, from logits in one go on the CPU.

Plain torch goes through the logits of both models in float32 some fifteen times for them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dbllm_cli.kernels.cpu import cpu_kernels

_LOGIT_DTYPES = (torch.float32, torch.bfloat16)


class DistillationTerms(NamedTuple):
    """Figures of every token, float32 `[tokens]` in nats, and a gradient.

    Attributes:
        cross_entropy: of the student's prediction to the teacher's.
        teacher_entropy: of the teacher's prediction.
        student_entropy: of the student's.
        gradient: of the cross-entropy to the student's logits, their shape and dtype; empty when
            it was not asked for.
    """

    cross_entropy: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    gradient: Tensor


def can_distil(student: Tensor, teacher: Tensor) -> bool:
    """Whether `distillation_terms` takes these."""
    return (
        student.device.type == teacher.device.type == "cpu"
        and student.dtype == teacher.dtype
        and student.shape == teacher.shape
        and student.dim() == 2
        and student.dtype in _LOGIT_DTYPES
        and cpu_kernels() is not None
    )


def distillation_terms(student: Tensor, teacher: Tensor, gradient: bool) -> DistillationTerms:
    """What a token's logits give.

    Args:
        student: logits, float32 or bfloat16 `[tokens, vocabulary]`.
        teacher: the same shape and dtype.
        gradient: whether to compute it.
    """
    terms, found = torch.ops.dbllm.distillation_cpu(
        student.detach().contiguous(), teacher.detach().contiguous(), gradient
    )
    cross_entropy, teacher_entropy, student_entropy = terms
    return DistillationTerms(cross_entropy, teacher_entropy, student_entropy, found)
