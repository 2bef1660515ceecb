from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dbllm_cli.training import losses
from dbllm_cli.training.losses import (
    DistillationLoss,
    Heads,
    LossAndGradient,
    distillation_loss,
)

BATCH, TOKENS, HIDDEN, VOCABULARY = 2, 7, 6, 11
AMBIGUITIES = ("teacher", "student", "product", "cross")
SETTINGS = [
    DistillationLoss("kd"),
    DistillationLoss("ce"),
    *(DistillationLoss("dad", ambiguity, 0.7, 0.3) for ambiguity in AMBIGUITIES),
]


@dataclass(frozen=True)
class _Batch:
    student: Tensor
    teacher: Tensor
    ids: Tensor
    student_head: Tensor
    teacher_head: Tensor

    def loss(self, settings: DistillationLoss) -> LossAndGradient:
        trained = (self.student_head,) if self.student_head.requires_grad else ()
        heads = Heads(
            lambda hidden: hidden @ self.student_head.to(hidden.dtype),
            lambda hidden: hidden @ self.teacher_head.to(hidden.dtype),
            trained,
        )
        return distillation_loss(settings, self.student, self.teacher, self.ids, heads)


def _batch() -> _Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
    shape = (BATCH, TOKENS, HIDDEN)
    return _Batch(
        normal(*shape),
        normal(*shape) * 1.5,
        ids,
        normal(HIDDEN, VOCABULARY),
        normal(HIDDEN, VOCABULARY),
    )


def _direct(settings: DistillationLoss, batch: _Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, plain loss, gradients to hidden states and head, by autograd in float64."""
    hidden = batch.student.double().requires_grad_()
    head = batch.student_head.detach().double().requires_grad_()
    q = (hidden @ head).softmax(-1)
    p = (batch.teacher.double() @ batch.teacher_head.double()).softmax(-1)
    if settings.kind == "ce":
        chosen = q[:, :-1].gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
        token_losses = -chosen.log()
    else:
        token_losses = -(p * q.log()).sum(-1)
    weights = torch.ones_like(token_losses)
    if settings.kind == "dad":
        entropy_p, entropy_q = -(p * p.log()).sum(-1), -(q * q.log()).sum(-1)
        ambiguity = {
            "teacher": entropy_p,
            "student": entropy_q,
            "product": entropy_p * entropy_q,
            "cross": token_losses,
        }[settings.ambiguity]
        power = ambiguity.detach() ** settings.gamma
        weights = power / power.mean(1, keepdim=True) + settings.plain_weight
    loss = (weights * token_losses).mean()
    gradients = torch.autograd.grad(loss, (hidden, head))
    return loss.detach(), token_losses.mean().detach(), *gradients


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.ambiguity}")
def test_loss_and_gradient_equal_autograd_through_the_formula(settings: DistillationLoss) -> None:
    batch = _batch()
    result = batch.loss(settings)
    loss, plain, gradient, _ = _direct(settings, batch)
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(result.plain) == pytest.approx(float(plain), rel=1e-5)
    assert torch.allclose(result.gradient.double(), gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.ambiguity}")
@pytest.mark.parametrize("chunk", [2, 100])
def test_a_head_that_trains_gets_its_gradient(
    settings: DistillationLoss, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    batch = _batch()
    batch.student_head.requires_grad_()
    (found,) = batch.loss(settings).head_gradients
    assert torch.allclose(found.double(), _direct(settings, batch)[3], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.ambiguity}")
@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_the_size_of_the_chunks_changes_nothing(
    settings: DistillationLoss, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _batch().loss(settings)
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    parts = _batch().loss(settings)
    assert torch.allclose(parts.loss, whole.loss, rtol=1e-6)
    assert torch.allclose(parts.gradient, whole.gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("settings", SETTINGS)
def test_without_gradients_the_losses_are_the_same_and_none_is_computed(
    settings: DistillationLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = _batch().loss(settings)
    monkeypatch.delattr(torch.autograd, "grad")
    with torch.no_grad():
        measured = _batch().loss(settings)
    assert (measured.loss, measured.plain) == (trained.loss, trained.plain)
    assert not measured.gradient.any()


@pytest.mark.parametrize("ambiguity", AMBIGUITIES)
def test_dad_weights_have_mean_one_in_each_sequence_and_grow_with_ambiguity(ambiguity: str) -> None:
    entropies = torch.rand(3, 2, 9, generator=torch.Generator().manual_seed(0)) + 0.1
    weights = DistillationLoss("dad", ambiguity, 0.5).token_weights(*entropies)
    assert torch.allclose(weights.mean(-1), torch.ones(2), rtol=1e-5)
    measure = dict(zip(("teacher", "student", "cross"), entropies, strict=True))
    measure["product"] = entropies[0] * entropies[1]
    order = measure[ambiguity][0].argsort()
    assert torch.equal(weights[0].argsort(), order)


def test_the_weight_of_the_plain_term_is_added_to_every_token() -> None:
    entropies = torch.rand(3, 2, 9) + 0.1
    bare = DistillationLoss("dad", gamma=0.5).token_weights(*entropies)
    added = DistillationLoss("dad", gamma=0.5, plain_weight=0.25).token_weights(*entropies)
    assert torch.allclose(added, bare + 0.25)


def test_tokens_without_any_ambiguity_leave_the_weights_finite() -> None:
    zeros = torch.zeros(1, 4)
    weights = DistillationLoss("dad", "product", 2.0).token_weights(zeros, zeros, zeros)
    assert torch.allclose(weights, torch.ones(1, 4))


@pytest.mark.parametrize("ambiguity", AMBIGUITIES)
def test_dad_with_gamma_zero_is_plain_distillation(ambiguity: str) -> None:
    dad = _batch().loss(DistillationLoss("dad", ambiguity, 0.0))
    kd = _batch().loss(DistillationLoss("kd"))
    assert torch.allclose(dad.loss, kd.loss)
    assert torch.allclose(dad.gradient, kd.gradient, rtol=1e-5, atol=1e-9)


def test_the_gradient_vanishes_where_student_and_teacher_agree() -> None:
    batch = _batch()
    same = _Batch(batch.teacher, batch.teacher, batch.ids, batch.teacher_head, batch.teacher_head)
    assert same.loss(DistillationLoss("dad", "cross", 1.0)).gradient.abs().max() < 1e-6


def test_next_token_loss_leaves_the_last_token_without_gradient() -> None:
    gradient = _batch().loss(DistillationLoss("ce")).gradient
    assert gradient[:, :-1].abs().sum(-1).min() > 0
    assert not gradient[:, -1].any()


def test_the_gradient_has_the_dtype_of_the_hidden_states_and_the_loss_is_float32() -> None:
    batch = _batch()
    half = _Batch(
        batch.student.bfloat16(),
        batch.teacher.bfloat16(),
        batch.ids,
        batch.student_head,
        batch.teacher_head,
    )
    result = half.loss(DistillationLoss("kd"))
    assert result.gradient.dtype == torch.bfloat16
    assert result.loss.dtype == torch.float32
    reference = batch.loss(DistillationLoss("kd")).gradient
    assert torch.allclose(
        result.gradient.float(), reference, atol=2e-2 * float(reference.abs().max())
    )
