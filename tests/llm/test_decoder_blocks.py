"""Decoding with the kernels of attention and of whole blocks, against transformers' own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.kernels import PackedBlock, cpu_kernels
from dbllm_cli.llm.attention import NAME, use_cpu_attention
from dbllm_cli.llm.blocks import find_blocks
from dbllm_cli.llm.decoder_blocks import use_block_kernels
from tests.llm.packed_models import packed_model, served_model
from tests.tiny_models import FAMILIES

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not compiled")

_LLAMA_LIKE = ["llama", "mistral", "qwen2", "qwen3"]


def _logits(model: PreTrainedModel, **options: Any) -> Tensor:
    """Of generated tokens that follow two prompts, one padded on the left."""
    prompts = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(prompts)
    seen[1, :4] = 0
    written: Any = model.generate(  # type: ignore[operator]
        prompts,
        attention_mask=seen,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **options,
    )
    return torch.stack(written.logits)


def _same(logits: Tensor, expected: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def _fused(model: PreTrainedModel) -> int:
    return sum("forward" in vars(layer) for layer in find_blocks(model).modules)


@pytest.mark.parametrize("levels", ["plain", "offset"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_gives_the_logits_of_transformers_own_operators(
    family: str, cache: str, levels: str
) -> None:
    options = {"cache_implementation": cache, "disable_compile": True}
    model = served_model(family, levels=levels)
    assert model.config._attn_implementation in (NAME, "eager")
    assert _fused(model) == (2 if family.partition("-")[0] in _LLAMA_LIKE else 0)
    expected = _logits(packed_model(family, levels=levels), **options)
    assert _same(_logits(model, **options), expected)


@pytest.mark.parametrize("family", _LLAMA_LIKE)
def test_in_bfloat16_the_logits_are_at_least_as_near_to_float32(family: str) -> None:
    expected = _logits(packed_model(family))
    served, plain = (_logits(f(family, torch.bfloat16)) for f in (served_model, packed_model))
    # After the first token that differs the sequences have nothing in common.
    nearest = [(logits[0].float() - expected[0]).norm() for logits in (served, plain)]
    assert nearest[0] <= 1.2 * nearest[1]


def test_a_token_is_decoded_by_the_operators_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = served_model("llama")
    monkeypatch.setattr(FdbLinear, "forward", lambda self, x: x.new_full((), torch.nan))
    prompt = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        # A prompt of one token: every packed layer is inside an operator.
        assert model(input_ids=prompt, use_cache=True).logits.isfinite().all()


def test_an_adapter_in_the_place_of_a_layer_is_used() -> None:
    class Doubling(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            doubled: Tensor = 2 * self.layer(x)
            return doubled

    models = [served_model("llama"), packed_model("llama")]
    for model in models:
        attention = find_blocks(model).modules[0].get_submodule("self_attn")
        attention.q_proj = Doubling(attention.get_submodule("q_proj"))
    logits, expected = map(_logits, models)
    assert _same(logits, expected)
    assert not _same(logits, _logits(packed_model("llama")))


def test_a_hook_of_a_layer_sees_every_token() -> None:
    model = served_model("llama")
    seen = []
    layer = find_blocks(model).modules[1].get_submodule("mlp.up_proj")
    layer.register_forward_hook(lambda *_: seen.append(1))
    _logits(model)
    assert len(seen) == 12


def test_gradients_reach_the_embeddings_of_one_token() -> None:
    model = served_model("llama")
    embedding = model.get_input_embeddings()
    vectors = embedding(torch.ones(1, 1, dtype=torch.long)).detach().requires_grad_()
    model(inputs_embeds=vectors, use_cache=True).logits.sum().backward()
    assert vectors.grad is not None


def test_a_forward_that_was_replaced_is_used() -> None:
    models = [served_model("llama"), packed_model("llama")]
    for model in models:
        feed_forward = find_blocks(model).modules[0].get_submodule("mlp")
        own = feed_forward.forward
        feed_forward.forward = lambda x, own=own: 3 * own(x)
    logits, expected = map(_logits, models)
    assert _same(logits, expected)


def test_an_attention_that_is_chosen_later_is_used() -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("counted", counted)
    model = served_model("llama")
    model.set_attn_implementation("counted")
    _logits(model)
    assert len(calls) == 12 * model.config.num_hidden_layers


def test_hooks_of_every_module_see_every_layer() -> None:
    model, seen = served_model("llama"), []
    handle = register_module_forward_hook(
        lambda module, *_: seen.append(1) if isinstance(module, FdbLinear) else None
    )
    try:
        _logits(model)
    finally:
        handle.remove()
    assert len(seen) == 12 * 14


def test_hidden_states_that_were_once_asked_for_leave_decoding_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = served_model("llama"), []
    after = PackedBlock.after_cache

    def counted(self: PackedBlock, *args: Any) -> Tensor:
        calls.append(1)
        return after(self, *args)

    monkeypatch.setattr(PackedBlock, "after_cache", counted)
    _logits(model, output_hidden_states=True)
    _logits(model)
    assert len(calls) == 2 * 11 * model.config.num_hidden_layers


def test_blocks_in_another_order_use_their_new_places_in_the_cache() -> None:
    models = [served_model("llama"), packed_model("llama")]
    for model in models:
        layers = find_blocks(model).modules
        layers[0], layers[1] = layers[1], layers[0]
        for index, layer in enumerate(layers):
            layer.get_submodule("self_attn").layer_idx = index
    logits, expected = map(_logits, models)
    assert _same(logits, expected)


def test_dropout_is_applied_in_training() -> None:
    model = served_model("llama")
    for layer in find_blocks(model).modules:
        layer.get_submodule("self_attn").attention_dropout = 0.9
    model.train()
    torch.manual_seed(0)
    prompt = torch.ones(1, 1, dtype=torch.long)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9).unsqueeze(0), past_key_values=cache)
        twice = [
            model(input_ids=prompt, past_key_values=copy.deepcopy(cache)).logits for _ in range(2)
        ]
    assert not torch.equal(*twice)


def test_angles_of_a_part_of_each_head_are_left_to_the_blocks_own_forward() -> None:
    layer = find_blocks(served_model("llama")).modules[0]
    hidden, angles = torch.zeros(1, 1, 64), torch.zeros(1, 1, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size"):
        layer(hidden, past_key_values=DynamicCache(), position_embeddings=(angles, angles))


def test_a_batch_without_sequences_is_refused_by_the_blocks_own_forward() -> None:
    empty = torch.ones(0, 1, dtype=torch.long)
    with torch.no_grad(), pytest.raises(RuntimeError, match="0 elements"):
        served_model("llama")(input_ids=empty, use_cache=True)


def test_weights_that_are_loaded_later_are_used() -> None:
    model, other = served_model("llama"), packed_model("llama")
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith(("alpha", "norm.weight")):
            tensor.mul_(1.5)
    model.load_state_dict(state)
    other.load_state_dict(state)
    assert _same(_logits(model), _logits(other))


def test_a_copy_of_the_model_is_independent() -> None:
    model = served_model("llama")
    expected = _logits(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(_logits(twin), expected)


def test_a_block_that_scales_its_residual_keeps_its_own_forward() -> None:
    model = packed_model("llama")
    use_cpu_attention(model)
    first = find_blocks(model).modules[0]
    plain = type(first)

    class Scaled(plain):  # type: ignore[valid-type, misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            after: Tensor = super().forward(hidden_states, **kwargs)
            return hidden_states + 0.9 * (after - hidden_states)

    Scaled.__name__, Scaled.__module__ = plain.__name__, plain.__module__
    first.__class__ = Scaled
    use_block_kernels(model)
    assert _fused(model) == 1
