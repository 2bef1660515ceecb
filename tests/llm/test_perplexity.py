import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from dbllm_cli.llm import perplexity
from dbllm_cli.llm.perplexity import (
    Window,
    full_windows,
    perplexity_of,
    strided_windows,
    window_losses,
)
from dbllm_cli.progress import Task


def _direct(model: PreTrainedModel, window: Window) -> float:
    """−ln p of the last `scored` tokens, by softmax over float64 logits."""
    with torch.no_grad():
        logits = model(input_ids=window.ids[None], use_cache=False).logits[0].double()
    log_p = logits.log_softmax(-1)
    length = window.ids.shape[0]
    positions = range(length - window.scored, length)
    return -sum(float(log_p[at - 1, window.ids[at]]) for at in positions)


def _stream(count: int) -> list[int]:
    draw = torch.Generator().manual_seed(count)
    ids: list[int] = torch.randint(64, (count,), generator=draw).tolist()
    return ids


def test_full_windows_score_every_prediction(ids: Tensor) -> None:
    cut = full_windows(ids)
    assert [window.scored for window in cut] == [11] * 5
    assert torch.equal(torch.stack([window.ids for window in cut]), ids)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(2, 16), st.data())
def test_strided_windows_score_every_token_but_the_first_once(
    count: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length - 1))
    stream = list(range(count))
    scored = []
    for window in strided_windows(stream, length, stride):
        assert 0 < window.scored < window.ids.shape[0] <= length
        scored += window.ids[-window.scored :].tolist()
    assert scored == stream[1:]


def test_strided_windows_give_each_token_the_most_context() -> None:
    cut = strided_windows(list(range(10)), 6, 2)
    assert [window.ids.tolist() for window in cut] == [
        [0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6, 7],
        [4, 5, 6, 7, 8, 9],
    ]
    assert [window.scored for window in cut] == [5, 2, 2]


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 6)])
def test_a_stride_without_overlap_never_scores_more_than_a_window_predicts(
    length: int, stride: int
) -> None:
    try:
        cut = strided_windows(list(range(13)), length, stride)
    except ValueError:
        return
    assert all(0 < window.scored < window.ids.shape[0] for window in cut)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_losses_of_windows_are_the_cross_entropy(
    llama: PreTrainedModel, ids: Tensor, task: Task, batch_size: int
) -> None:
    cut = full_windows(ids)
    losses = window_losses(llama, cut, batch_size, task)
    assert losses == pytest.approx([_direct(llama, window) for window in cut], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_of_strided_windows_are_those_of_their_last_tokens(
    llama: PreTrainedModel, task: Task, batch_size: int
) -> None:
    cut = strided_windows(_stream(45), 16, 6)
    assert cut[-1].ids.shape[0] != 16
    losses = window_losses(llama, cut, batch_size, task)
    assert losses == pytest.approx([_direct(llama, window) for window in cut], rel=1e-5)


def test_windows_of_mixed_lengths_are_each_scored_in_their_place(
    llama: PreTrainedModel, task: Task
) -> None:
    cut = [Window(torch.tensor(_stream(n)), n - 1) for n in (8, 5, 8, 8)]
    losses = window_losses(llama, cut, 3, task)
    assert losses == pytest.approx([_direct(llama, window) for window in cut], rel=1e-5)


def test_the_size_of_the_chunks_of_logits_changes_nothing(
    llama: PreTrainedModel, ids: Tensor, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = [*full_windows(ids[:2]), Window(ids[2], 4)]
    whole = window_losses(llama, cut, 1, task)
    monkeypatch.setattr(perplexity, "CHUNK_TOKENS", 3)
    assert window_losses(llama, cut, 1, task) == pytest.approx(whole, rel=1e-6)


def test_progress_shows_every_window_and_the_perplexity_so_far(
    llama: PreTrainedModel, ids: Tensor
) -> None:
    calls: list[tuple[int, float]] = []

    class Noting:
        def advance(self, amount: int = 1, **figures: float | str) -> None:
            calls.append((amount, float(figures["perplexity"])))

    losses = window_losses(llama, full_windows(ids), 2, Noting())
    assert [amount for amount, _ in calls] == [2, 2, 1]
    assert calls[-1][1] == pytest.approx(perplexity_of(losses, [11] * 5))


def test_perplexity_weighs_windows_by_their_tokens() -> None:
    assert perplexity_of([2.0, 30.0], [1, 10]) == pytest.approx(math.exp(32 / 11))
    assert perplexity_of([1e6], [1]) == math.inf
