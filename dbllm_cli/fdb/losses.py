"""The losses: relative block error for reconstruct; KD, DAD and next-token for distill.

The distillation losses work token by token on chunks of the final hidden states, so that the
float32 logits of a whole batch never exist at once. Their gradient to a token's hidden state is
scaled by that token's weight afterwards, so one pass over the logits is enough although the weights
of a sequence depend on all its tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from dbllm_cli.kernels import DistillationTerms, can_distil, distillation_terms

Head = Callable[[Tensor], Tensor]
"""Final hidden states `[tokens, hidden]` to logits `[tokens, vocabulary]`."""

CHUNK_TOKENS = 256
"""Tokens whose logits exist at once."""


def relative_token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖output − target‖² / ‖target‖².

    A plain mean square serves the first token alone: its hidden state is so large in LLaMA-like
    models that it is nearly all of the error.

    Args:
        output: a block's output `[..., hidden]`.
        target: the full-precision block's output, the same shape.

    Returns:
        float32 scalar.
    """
    target = target.to(torch.float32)
    error = (output.to(torch.float32) - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp(min=1e-12)).mean()


@dataclass(frozen=True)
class DistillationLoss:
    """Which loss distill trains on.

    Attributes:
        kind: `kd`, cross-entropy to the teacher's distribution; `dad`, the same weighted per token
            by ambiguity^gamma (Deviation-Aware Distillation; the paper's formula is not public,
            this form is ours); `ce`, cross-entropy to the next token.
        ambiguity: `teacher` or `student` entropy, their `product`, or the `cross`-entropy.
        gamma: exponent; 0 is plain distillation.
        plain_weight: weight of the plain term that dad adds.
    """

    kind: str
    ambiguity: str = "teacher"
    gamma: float = 0.5
    plain_weight: float = 0.0

    def token_weights(self, teacher: Tensor, student: Tensor, cross: Tensor) -> Tensor:
        """Weight of each token from its ambiguity, detached; mean 1 (+ plain_weight) per sequence.

        Args:
            teacher: entropy of the teacher's prediction, nats `[batch, tokens]`.
            student: entropy of the student's prediction.
            cross: cross-entropy of the student to the teacher.
        """
        if self.kind != "dad":
            return torch.ones_like(cross)
        ambiguity = {
            "teacher": teacher,
            "student": student,
            "product": teacher * student,
            "cross": cross,
        }[self.ambiguity].detach()
        weights = ambiguity.clamp(min=1e-6) ** self.gamma
        return weights / weights.mean(-1, keepdim=True) + self.plain_weight


@dataclass(frozen=True)
class LossAndGradient:
    """A batch's loss and what to backpropagate.

    Attributes:
        loss: mean over tokens of the weighted loss, float32 scalar.
        plain: mean over tokens of the unweighted loss.
        gradient: of `loss` with respect to the student's hidden states, their shape and dtype.
    """

    loss: Tensor
    plain: Tensor
    gradient: Tensor


def _next_token_terms(logits: Tensor, labels: Tensor, gradient: bool) -> DistillationTerms:
    """The cross-entropy to the next token in place of the teacher's; no teacher's entropy."""
    log_q = log_softmax(logits.detach().to(torch.float32), dim=-1)
    q = log_q.exp()
    found = q - one_hot(labels, log_q.shape[-1]) if gradient else log_q[:0]
    losses = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return DistillationTerms(losses, torch.zeros_like(losses), -(q * log_q).sum(-1), found)


def _distillation_terms(student: Tensor, teacher: Tensor, gradient: bool) -> DistillationTerms:
    if can_distil(student, teacher):
        return distillation_terms(student, teacher, gradient)
    log_q = log_softmax(student.detach().to(torch.float32), dim=-1)
    log_p = log_softmax(teacher.to(torch.float32), dim=-1)
    q, p = log_q.exp(), log_p.exp()
    return DistillationTerms(
        -(p * log_q).sum(-1),
        -(p * log_p).sum(-1),
        -(q * log_q).sum(-1),
        q - p if gradient else q[:0],
    )


def _token_terms(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, heads: tuple[Head, Head]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient to hidden, teacher entropy and student entropy of each token of a chunk."""
    wanted = torch.is_grad_enabled()
    leaf = student.detach().requires_grad_(wanted)
    logits = heads[0](leaf)
    with torch.no_grad():
        if teacher is None:
            assert labels is not None
            terms = _next_token_terms(logits, labels, wanted)
        else:
            terms = _distillation_terms(logits, heads[1](teacher), wanted)
    if wanted:
        (gradient,) = torch.autograd.grad(logits, leaf, terms.gradient.to(logits.dtype))
    else:
        gradient = torch.zeros_like(leaf)
    return terms.cross_entropy, gradient, terms.teacher_entropy, terms.student_entropy


def distillation_loss(
    settings: DistillationLoss,
    student: Tensor,
    teacher: Tensor,
    input_ids: Tensor,
    heads: tuple[Head, Head],
) -> LossAndGradient:
    """The loss of a batch and its gradient to the student's hidden states.

    Under `torch.no_grad()` the gradient is zero and costs nothing.

    Args:
        settings: which loss.
        student: the student's final hidden states `[batch, tokens, hidden]`.
        teacher: the teacher's, the same shape; not read by `ce`.
        input_ids: tokens `[batch, tokens]`; read by `ce` only.
        heads: student's and teacher's map from hidden states to logits.
    """
    next_token = settings.kind == "ce"
    length = student.shape[1] - 1 if next_token else student.shape[1]
    rows = []
    for sequence in range(student.shape[0]):
        chunks = []
        for start in range(0, length, CHUNK_TOKENS):
            span = slice(start, min(start + CHUNK_TOKENS, length))
            following = slice(span.start + 1, span.stop + 1)
            chunks.append(
                _token_terms(
                    student[sequence, span],
                    None if next_token else teacher[sequence, span],
                    input_ids[sequence, following] if next_token else None,
                    heads,
                )
            )
        rows.append(tuple(torch.cat(parts) for parts in zip(*chunks, strict=True)))
    losses, gradients, teacher_entropy, student_entropy = (
        torch.stack(parts) for parts in zip(*rows, strict=True)
    )
    weights = settings.token_weights(teacher_entropy, student_entropy, losses)
    scale = weights / losses.numel()
    gradient = torch.zeros_like(student)
    gradient[:, :length] = (gradients * scale.unsqueeze(-1)).to(student.dtype)
    return LossAndGradient((losses * scale).sum(), losses.mean(), gradient)
