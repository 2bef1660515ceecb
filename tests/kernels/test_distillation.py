"""What a token's logits give, against a softmax in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbllm_cli.kernels import can_distil, distillation_terms
from tests.kernels.layers import normal

pytestmark = pytest.mark.usefixtures("instruction_set")


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 5),
    vocabulary=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_entropies_and_gradient_are_those_of_the_softmax(
    tokens: int, vocabulary: int, dtype: torch.dtype, size: float
) -> None:
    student, teacher = ((normal(tokens, vocabulary, seed=s) * size).to(dtype) for s in (0, 1))
    assert can_distil(student, teacher)
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    terms = distillation_terms(student, teacher, gradient=True)
    wanted = (-(p * log_q).sum(-1), -(p * log_p).sum(-1), -(q * log_q).sum(-1))
    for found, expected in zip(terms[:3], wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-5 + 2e-6 * size)
    assert terms.gradient.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(terms.gradient.double(), q - p, rtol=rounding, atol=2e-6)


def test_the_gradient_is_empty_when_not_asked_for() -> None:
    assert distillation_terms(normal(3, 9), normal(3, 9), gradient=False).gradient.numel() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_spoils_its_own_token_alone(bad: float) -> None:
    student = normal(3, 70)
    student[1, 40] = bad
    spoiled = distillation_terms(student, normal(3, 70, seed=1), gradient=True)
    assert spoiled.cross_entropy.isnan().tolist() == [False, True, False]
    assert spoiled.gradient.isnan().any(-1).tolist() == [False, True, False]


def test_one_thread_and_two_give_the_same_bytes() -> None:
    student, teacher = normal(40, 5000), normal(40, 5000, seed=1)
    expected = distillation_terms(student, teacher, gradient=True)
    torch.set_num_threads(2)
    try:
        found = distillation_terms(student, teacher, gradient=True)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_dtypes_and_shapes_are_left_to_torch() -> None:
    logits = normal(2, 8)
    assert not can_distil(logits.half(), logits.half())
    assert not can_distil(logits, logits.bfloat16())
    assert not can_distil(logits, normal(2, 7))
