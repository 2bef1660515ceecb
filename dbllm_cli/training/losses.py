"""The losses of distill: KD, DAD and next-token.

They work token by token on chunks of the final hidden states, so that the logits of a whole batch
never exist at once. The weights of a sequence depend on all its tokens, so DAD goes through the
logits twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from dbllm_cli.kernels import DistillationTerms, can_distil, distillation_terms
from dbllm_cli.llm.heads import CHUNK_TOKENS, Head


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
        head_gradients: of `loss` with respect to the parameters of the student's head that train.
    """

    loss: Tensor
    plain: Tensor
    gradient: Tensor
    head_gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Heads:
    """The maps from final hidden states to logits.

    Attributes:
        student: the student's.
        teacher: the teacher's.
        trained: parameters of the student's that take a gradient.
    """

    student: Head
    teacher: Head
    trained: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Batch:
    """Hidden states of both models `[batch, tokens, hidden]`; labels stand in for the teacher."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    heads: Heads

    @property
    def predictions(self) -> tuple[int, int]:
        """Sequences, and tokens of each that predict something."""
        batch, tokens = self.student.shape[:2]
        return batch, tokens if self.labels is None else tokens - 1

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Sequence and tokens whose logits exist at once."""
        batch, length = self.predictions
        for sequence in range(batch):
            for start in range(0, length, CHUNK_TOKENS):
                yield sequence, slice(start, min(start + CHUNK_TOKENS, length))

    def terms(
        self, logits: Tensor, sequence: int, span: slice, gradient: bool
    ) -> DistillationTerms:
        """What the student's logits of a chunk give."""
        if self.labels is not None:
            following = self.labels[sequence, span.start + 1 : span.stop + 1]
            return _next_token_terms(logits, following, gradient)
        teacher = self.heads.teacher(self.teacher[sequence, span])
        return _distillation_terms(logits, teacher, gradient)

    @torch.no_grad()
    def figures(self) -> Tensor:
        """Loss, teacher's and student's entropy of every prediction `[3, batch, tokens]`."""
        found = [
            torch.stack(self.terms(self.heads.student(self.student[at]), *at, gradient=False)[:3])
            for at in self.chunks()
        ]
        # Before torch 2.10 the cache keeps the head cast without a graph, which gradients need.
        torch.clear_autocast_cache()
        batch, length = self.predictions
        return torch.cat(found, 1).view(3, batch, length)

    def gradients(self, scale: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Losses `[batch, tokens]`, and gradients of their sum times `scale` of the same shape."""
        losses, hidden = torch.empty_like(scale), torch.zeros_like(self.student)
        trained = tuple(torch.zeros_like(parameter) for parameter in self.heads.trained)
        for at in self.chunks():
            leaf = self.student[at].detach().requires_grad_()
            logits = self.heads.student(leaf)
            with torch.no_grad():
                terms = self.terms(logits, *at, gradient=True)
                towards = (terms.gradient * scale[at].unsqueeze(-1)).to(logits.dtype)
            found = torch.autograd.grad(logits, (leaf, *self.heads.trained), towards)
            losses[at], hidden[at] = terms.cross_entropy, found[0]
            for total, part in zip(trained, found[1:], strict=True):
                total.add_(part)
        return losses, hidden, trained


def _next_token_terms(logits: Tensor, labels: Tensor, gradient: bool) -> DistillationTerms:
    """The cross-entropy to the next token in place of the teacher's; no teacher's entropy."""
    log_q = log_softmax(logits.detach().to(torch.float32), dim=-1)
    q = log_q.exp()
    losses = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropy = -(q * log_q).sum(-1)
    minus_one = -torch.ones_like(losses).unsqueeze(-1)
    found = q.scatter_add_(-1, labels.unsqueeze(-1), minus_one) if gradient else q[:0]
    return DistillationTerms(losses, torch.zeros_like(losses), entropy, found)


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


def distillation_loss(
    settings: DistillationLoss, student: Tensor, teacher: Tensor, input_ids: Tensor, heads: Heads
) -> LossAndGradient:
    """The loss of a batch and its gradients to the student's hidden states and head.

    Under `torch.no_grad()` the gradients are zero and cost nothing.

    Args:
        settings: which loss.
        student: the student's final hidden states `[batch, tokens, hidden]`.
        teacher: the teacher's, the same shape; not read by `ce`.
        input_ids: tokens `[batch, tokens]`; read by `ce` only.
        heads: student's and teacher's map from hidden states to logits.
    """
    batch = _Batch(student, teacher, input_ids if settings.kind == "ce" else None, heads)
    train = torch.is_grad_enabled()
    weights = torch.ones(batch.predictions, device=student.device)
    if settings.kind == "dad" or not train:
        losses, teacher_entropy, student_entropy = batch.figures()
        weights = settings.token_weights(teacher_entropy, student_entropy, losses)
    scale = weights / weights.numel()
    if train:
        losses, hidden, trained = batch.gradients(scale)
    else:
        hidden, trained = torch.zeros_like(student), ()
    return LossAndGradient((losses * scale).sum(), losses.mean(), hidden, trained)
