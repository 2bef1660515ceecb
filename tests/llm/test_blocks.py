from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.blocks import (
    capture_calls,
    find_blocks,
    is_linear,
    layer_shape,
    logits_after,
    matrix_of,
    same_arguments,
    select_layers,
)
from tests.llm.conftest import VOCABULARY, llama_config, random_model

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GATED: dict[str, Any] = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: list[PreTrainedConfig] = [
    llama_config(),
    MistralConfig(**_GATED, sliding_window=4),
    Qwen2Config(**_GATED),
    Qwen3Config(**_GATED, head_dim=8),
    Gemma2Config(**_GATED, head_dim=8, sliding_window=4),
    Gemma3TextConfig(**_GATED, head_dim=8, sliding_window=4),
    OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    GPTNeoXConfig(**_SIZES, intermediate_size=48),
    GPT2Config(**_SIZES),
    PhiConfig(**_SIZES, intermediate_size=48),
    # Blocks of these give tuples, which the models take apart.
    BloomConfig(**_SIZES),
    CodeGenConfig(**_SIZES, rotary_dim=4),
    FalconConfig(**_SIZES),
    GPTJConfig(**_SIZES, rotary_dim=4),
    GPTNeoConfig(**_SIZES, attention_types=[[["global", "local"], 1]]),
    MptConfig(**_SIZES),
]


def _own_blocks(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What enters and leaves each block in the model's own forward."""
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def hook(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Any) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])
        leaving.append(out[0] if isinstance(out, tuple) else out)

    handles = [
        block.register_forward_hook(hook, with_kwargs=True) for block in find_blocks(model).modules
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return entering, leaving


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_replayed_calls_give_the_outputs_of_the_model_s_own_blocks(
    config: PreTrainedConfig, ids: Tensor
) -> None:
    model = random_model(config)
    blocks = find_blocks(model)
    entering, leaving = _own_blocks(model, ids)
    hidden, calls = capture_calls(model, blocks, ids)
    assert torch.equal(hidden, entering[0])
    for block, call, expected in zip(blocks.modules, calls, leaving, strict=True):
        with torch.no_grad():
            hidden = call.run(block, hidden)
        assert torch.equal(hidden, expected)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_logits_after_the_last_block_are_the_model_s_own_and_take_gradients(
    config: PreTrainedConfig, ids: Tensor
) -> None:
    model = random_model(config)
    expected = model(input_ids=ids).logits
    last = _own_blocks(model, ids)[1][-1].requires_grad_()
    logits = logits_after(model, find_blocks(model), last)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert last.grad is not None
    assert last.grad.shape == last.shape


def test_capturing_leaves_the_model_as_it_was(llama: PreTrainedModel, ids: Tensor) -> None:
    before = llama(input_ids=ids).logits
    capture_calls(llama, find_blocks(llama), ids)
    assert torch.equal(llama(input_ids=ids).logits, before)
    assert not any("forward" in vars(block) for block in find_blocks(llama).modules)


def test_arguments_are_the_same_where_all_their_values_are() -> None:
    first = ((torch.arange(3), None), {"length": 3, "flag": True})
    assert same_arguments(first, ((torch.arange(3), None), {"length": 3, "flag": True}))
    assert not same_arguments(first, ((torch.arange(3) + 1, None), {"length": 3, "flag": True}))
    assert not same_arguments(first, ((torch.arange(3), None), {"length": 4, "flag": True}))
    assert not same_arguments(first, ((torch.arange(3), 0), {"length": 3, "flag": True}))
    assert not same_arguments(first, ((torch.arange(3), None), {"length": 3}))


def test_a_model_that_leaves_out_a_block_is_refused(ids: Tensor) -> None:
    model = random_model(llama_config())
    model.config.num_hidden_layers = 2
    with pytest.raises(ConfigError, match="does not run each of its 3 blocks once"):
        capture_calls(model, find_blocks(model), ids)
    assert not any("forward" in vars(block) for block in find_blocks(model).modules)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_blocks_and_their_layers_are_found_and_embeddings_and_head_stay_out(
    config: PreTrainedConfig,
) -> None:
    model = random_model(config)
    blocks = find_blocks(model)
    assert len(blocks) == config.get_text_config().num_hidden_layers
    assert model.get_submodule(blocks.name(1)) is blocks.modules[1]
    layers = dict(blocks.linear_layers())
    everything = {name for name, module in model.named_modules() if is_linear(module)}
    assert everything - set(layers) <= {"lm_head", "embed_out"}
    assert all(model.get_submodule(name) is module for name, module in layers.items())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="Sequential has no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_conv1d_is_turned_to_out_by_in_and_back() -> None:
    conv, linear = Conv1D(6, 4), nn.Linear(4, 6)
    assert layer_shape(conv) == layer_shape(linear) == (4, 6)
    matrix = matrix_of(conv, conv.weight.detach())
    assert matrix.shape == (6, 4)
    assert matrix.is_contiguous()
    assert torch.equal(matrix_of(conv, matrix), conv.weight)
    assert matrix_of(linear, linear.weight) is linear.weight


def test_layers_are_selected_by_wildcards(llama: PreTrainedModel) -> None:
    blocks = find_blocks(llama)
    assert len(select_layers(blocks, ["*"], [])) == 3 * 7
    chosen = select_layers(blocks, ["*.mlp.*", "*.q_proj"], ["*.0.*", "*down_proj"])
    assert set(chosen) == {
        f"model.layers.{index}.{name}"
        for index in (1, 2)
        for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj")
    }


def test_a_selection_of_nothing_is_refused_and_shows_a_name(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="no linear layer matches") as raised:
        select_layers(find_blocks(llama), ["*.attention.*"], [])
    assert "model.layers.0.self_attn.q_proj" in raised.value.hint


def test_states_of_a_few_selected_layers_are_no_fused_experts() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=256, num_hidden_layers=4)
    blocks = find_blocks(random_model(config))
    assert len(select_layers(blocks, ["*.0.*"], [])) == 4


def test_fused_experts_are_refused_by_name_unless_excluded() -> None:
    blocks = find_blocks(random_model(MixtralConfig(**_GATED, num_local_experts=2)))
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.mlp\.experts .* fused into"
    ) as raised:
        select_layers(blocks, ["*"], [])
    assert "--exclude '*.experts'" in raised.value.hint
    assert select_layers(blocks, ["*"], ["*experts*"])
