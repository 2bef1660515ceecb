import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dbllm_cli.blockwise.layer_inputs import layers_by_input, uncalled_layers, weighted_gram
from dbllm_cli.llm.blocks import find_blocks
from tests.tiny_models import FAMILIES


class _Block(nn.Module):
    """Two layers on the same input, one on another, one for long batches only, one never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late, self.first, self.second = (nn.Linear(4, 4) for _ in range(3))
        self.rare, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(x) + self.second(x)
        if x.shape[1] > 2:
            inner = inner + self.rare(inner)
        return self.late(inner.tanh())


NAMES = ["late", "first", "second", "rare", "never"]


def test_layers_come_in_the_order_of_their_calls_and_by_what_they_share() -> None:
    block = _Block()
    met = layers_by_input(block, NAMES, lambda: block(torch.randn(1, 3, 4)))
    assert met == [["first", "second"], ["rare"], ["late"]]
    assert not any(part._forward_pre_hooks for part in block.modules())


def test_tokens_count_by_their_weights() -> None:
    block = _Block()
    batches = [torch.randn(2, 3, 4), torch.randn(1, 3, 4)]
    weights = [torch.rand(2, 3), torch.rand(1, 3)]
    gram = weighted_gram(block.second, 4, weights, batches, block)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for batch, own in zip(batches, weights, strict=True):
        for x, weight in zip(batch.reshape(-1, 4), own.flatten(), strict=True):
            expected += float(weight) * torch.outer(x, x).double()
    assert torch.allclose(gram.double(), expected, rtol=1e-5)


def test_a_layer_that_misses_a_batch_keeps_to_the_weights_of_the_others() -> None:
    block = _Block()
    batches = [torch.randn(1, 2, 4), torch.randn(1, 3, 4)]
    weights = [torch.full((1, 2), 100.0), torch.ones(1, 3)]
    gram = weighted_gram(block.rare, 4, weights, batches, block)
    inner = block.first(batches[1]) + block.second(batches[1])
    expected = inner.detach().reshape(-1, 4).T @ inner.detach().reshape(-1, 4)
    assert torch.allclose(gram, expected, rtol=1e-4, atol=1e-5)


def test_the_block_runs_no_further_than_the_layer() -> None:
    block = _Block()
    block.late = None  # type: ignore[assignment]
    gram = weighted_gram(block.rare, 4, [torch.ones(1, 3)], [torch.randn(1, 3, 4)], block)
    assert gram.any()
    assert not block.rare._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_without_weights_to_see_which_layers_it_calls(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    names = [name for name, _ in find_blocks(model).linear_layers()]
    assert uncalled_layers(model, names) == []
    # Only a forward that came to its end can tell of it.
    model.get_submodule(find_blocks(model).name(0)).register_module("spare", nn.Linear(2, 2))
    spare = f"{find_blocks(model).name(0)}.spare"
    assert uncalled_layers(model, [*names, spare]) == [spare]
