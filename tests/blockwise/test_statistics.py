from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, PreTrainedConfig, PreTrainedModel

from dbllm_cli.blockwise.statistics import input_mean_squares
from dbllm_cli.llm.blocks import find_blocks
from dbllm_cli.progress import Task
from tests.llm.conftest import VOCABULARY, llama_config, random_model

_FAMILIES = [
    llama_config(),
    GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
]


def _reference(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Per layer, the mean over tokens of squared inputs over the block output's mean square."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep_input(name: str) -> Any:
        def hook(module: object, args: tuple[Tensor, ...], output: object) -> None:
            inputs[name] = args[0].double().flatten(0, -2)

        return hook

    def keep_output(name: str) -> Any:
        def hook(module: object, args: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs[name] = hidden.double().flatten(0, -2)

        return hook

    blocks = find_blocks(model)
    handles = [m.register_forward_hook(keep_input(name)) for name, m in blocks.linear_layers()]
    for index, block in enumerate(blocks.modules):
        handles.append(block.register_forward_hook(keep_output(blocks.name(index))))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    result = defaultdict(lambda: torch.zeros(0))
    for name, entering in inputs.items():
        block = next(key for key in outputs if name.startswith(f"{key}."))
        weights = 1 / (outputs[block] ** 2).mean(-1)
        result[name] = (weights[:, None] * entering**2).sum(0) / weights.sum()
    return dict(result)


@pytest.mark.parametrize("config", _FAMILIES, ids=lambda config: config.model_type)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_statistics_weigh_each_token_by_the_size_of_the_block_s_output(
    config: PreTrainedConfig, batch_size: int, ids: Tensor, task: Task
) -> None:
    model = random_model(config)
    means = input_mean_squares(model, ids, batch_size, task)
    expected = _reference(model, ids)
    assert set(means) == {name for name, _ in find_blocks(model).linear_layers()} == set(expected)
    for name, mean in means.items():
        assert mean.dtype == torch.float32
        assert torch.allclose(mean.double(), expected[name], rtol=1e-4)


def test_no_hook_stays_on_the_model(ids: Tensor, task: Task) -> None:
    # A model of its own: transformers leaves hooks of its own on one asked for hidden states.
    model = random_model(llama_config())
    input_mean_squares(model, ids, 2, task)
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
