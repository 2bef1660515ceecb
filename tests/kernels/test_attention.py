"""Attention of one query against a plain softmax in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbllm_cli.kernels import attend_one, can_attend_one
from tests.kernels.layers import normal

pytestmark = pytest.mark.usefixtures("instruction_set")


def _expected(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> np.ndarray:
    q, k, v = (tensor.double().numpy() for tensor in (query, key, value))
    shared = q.shape[1] // k.shape[1]
    out = np.zeros((q.shape[0], 1, q.shape[1], v.shape[-1]))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = scale * (k[b, h // shared] @ q[b, h, 0])
            if mask is not None:
                scores = np.where(mask.numpy()[b % len(mask), 0, 0], scores, -np.inf)
            weights = np.exp(scores - scores.max())
            out[b, 0, h] = weights @ v[b, h // shared] / weights.sum()
    return out


def _score_error(query: Tensor, key: Tensor, scale: float) -> float:
    """What a float32 score may be off by: half a bit of the sum of its terms' magnitudes.

    Where two scores are near each other, the result moves by up to twice as much of the values.
    """
    shared = query.shape[1] // key.shape[1]
    terms = query.double().abs() @ key.double().abs().repeat_interleave(shared, 1).mT
    return float(terms.max()) * scale * 2**-24


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    shared=st.integers(1, 5),
    positions=st.integers(1, 150),
    dim=st.sampled_from([1, 8, 15, 16, 40, 64, 128, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    masks=st.integers(0, 3),
    size=st.sampled_from([1e-20, 1.0, 30.0]),
)
def test_the_result_is_the_softmax_of_the_scores(
    batch: int,
    key_heads: int,
    shared: int,
    positions: int,
    dim: int,
    dtype: torch.dtype,
    masks: int,
    size: float,
) -> None:
    query = (normal(batch, key_heads * shared, 1, dim) * size).to(dtype)
    key, value = (normal(batch, key_heads, positions, dim, seed=s, dtype=dtype) for s in (1, 2))
    mask = None
    if masks:
        mask = normal(min(masks, batch), 1, 1, positions, seed=3) > 0
        mask = mask if len(mask) == batch else mask[:1]
        mask[..., -1] = True
    assert can_attend_one(query, key, value, mask)
    out, expected = (
        attend_one(query, key, value, mask, 0.3),
        _expected(query, key, value, mask, 0.3),
    )
    assert (out.dtype, out.shape) == (dtype, (batch, 1, key_heads * shared, dim))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-3}[dtype]
    tolerance += 2 * _score_error(query, key, 0.3)
    largest = np.abs(value.double().numpy()).max()
    assert np.abs(out.double().numpy() - expected).max() <= tolerance * largest


def test_keys_and_values_may_lie_apart() -> None:
    cache = normal(2, 7, 3, 2, 40, dtype=torch.bfloat16)
    key, value = (cache[:, :, :, i].transpose(1, 2) for i in range(2))
    query = normal(2, 1, 6, 40, seed=1, dtype=torch.bfloat16).transpose(1, 2)
    assert can_attend_one(query, key, value, None)
    apart = attend_one(query, key, value, None, 1.0)
    assert torch.equal(apart, attend_one(query, key.contiguous(), value.contiguous(), None, 1.0))


def test_a_sequence_with_every_position_hidden_gives_zeros() -> None:
    query, key = normal(1, 2, 1, 16), normal(1, 2, 5, 16)
    assert not attend_one(query, key, key, torch.zeros(1, 1, 1, 5, dtype=torch.bool), 1.0).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_spoils_its_own_heads_alone(bad: float) -> None:
    query, key, value = normal(1, 4, 1, 16), normal(1, 2, 40, 16), normal(1, 2, 40, 16, seed=1)
    key[0, 1, 7, 3] = bad
    query[0, :, 0, 3] = 1  # so that inf is the largest score
    spoiled = attend_one(query, key, value, None, 1.0).isnan().all(-1)
    assert spoiled.flatten().tolist() == [False, False, True, True]


def test_a_hidden_number_that_is_not_finite_does_no_harm() -> None:
    query, key = normal(1, 2, 1, 16), normal(1, 2, 9, 16)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 4] = False
    expected = attend_one(query, key, key.clone(), mask, 1.0)
    spoiled = key.clone()
    spoiled[:, :, 4] = torch.nan
    assert torch.equal(attend_one(query, spoiled, key, mask, 1.0), expected)


def test_one_thread_and_two_give_the_same_bytes() -> None:
    query, key = normal(1, 32, 1, 128), normal(1, 32, 300, 128, seed=1)
    expected = attend_one(query, key, key, None, 0.1)
    torch.set_num_threads(2)
    try:
        assert torch.equal(attend_one(query, key, key, None, 0.1), expected)
    finally:
        torch.set_num_threads(1)


def test_what_the_kernel_does_not_do_is_left_to_torch() -> None:
    query, key = normal(2, 4, 1, 16), normal(2, 2, 9, 16)
    assert can_attend_one(query, key, key, None)
    assert not can_attend_one(normal(2, 4, 2, 16), key, key, None)
    assert not can_attend_one(query.half(), key.half(), key.half(), None)
    assert not can_attend_one(query.bfloat16(), key, key, None)
    assert not can_attend_one(query, key, normal(2, 2, 9, 8), None)
    assert not can_attend_one(query, normal(2, 2, 16, 9).mT, key, None)
    assert not can_attend_one(query, key[:, :, :0], key[:, :, :0], None)
    assert not can_attend_one(query[:0], key[:0], key[:0], None)
    assert not can_attend_one(normal(2, 5, 1, 16), key, key, None)
    assert not can_attend_one(query, key, key, torch.zeros(2, 1, 1, 9))
    assert not can_attend_one(query, key, key, torch.ones(2, 4, 1, 9, dtype=torch.bool))
    assert not can_attend_one(query.requires_grad_(), key, key, None)
