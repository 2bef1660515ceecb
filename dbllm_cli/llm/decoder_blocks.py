"""Decoder blocks of packed models that decode a token in two operators (`kernels.PackedBlock`)."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers import Cache, DynamicCache, PreTrainedModel

from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.kernels import PackedBlock, can_attend_one
from dbllm_cli.llm.attention import NAME, attention_forward
from dbllm_cli.llm.blocks import find_blocks

# Others with the same modules scale queries, or rotate a part of each head.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_MOST_SEQUENCES = 32
_DTYPES = (torch.float32, torch.bfloat16)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")


def use_block_kernels(model: PreTrainedModel) -> None:
    """Let every block that computes what `PackedBlock` does decode with it, on the CPU.

    A block is one by its class, its modules, and by giving the same on random numbers.
    """
    if model.config._attn_implementation != NAME:
        return
    for layer in find_blocks(model).modules:
        block = _packed_block(layer)
        if block is not None:
            decoding = _Decoding(layer, block)
            if decoding.gives_the_same():
                layer.forward = decoding


class _Decoding:
    """The forward of a block: in two operators for single tokens, else its own.

    Its own too where a module, a tensor, a forward or the attention was replaced or a module has
    a hook, as adapters and tracers do it; and in training.
    """

    def __init__(self, layer: nn.Module, block: PackedBlock) -> None:
        self._layer = layer
        self._block = block
        self._own: Callable[..., Tensor] = type(layer).forward
        self._attention = layer.get_submodule("self_attn")
        self._modules = [part for part in layer.modules() if part is not layer]
        # Where every tensor and module of the block is kept, to see when one is replaced.
        self._held: list[tuple[Any, str, object]] = [
            (kept, name, held)
            for part in layer.modules()
            for kept in (part._modules, part._parameters, part._buffers)
            for name, held in kept.items()
            if held is not None
        ]

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if (
            past_key_values is not None
            and position_embeddings is not None
            and self._decodes(hidden_states, position_embeddings)
        ):
            return self._decode(hidden_states, attention_mask, past_key_values, position_embeddings)
        return self._own(
            self._layer,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )

    def _decodes(self, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> bool:
        batch, tokens, _ = hidden.shape
        angles = {(batch, 1, self._block.head_dim), (1, 1, self._block.head_dim)}
        return (
            tokens == 1
            and 0 < batch <= _MOST_SEQUENCES
            and hidden.dtype in _DTYPES
            and hidden.device.type == "cpu"
            and all(part.shape in angles for part in positions)
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and self._is_untouched()
        )

    def _is_untouched(self) -> bool:
        """Whether the block is still what it was when its tensors were collected."""
        attention: Any = self._attention
        if (
            attention.training
            or attention.config._attn_implementation != NAME
            or attention.scaling != self._block.scale
            or module_hooks._global_forward_hooks
            or module_hooks._global_forward_pre_hooks
        ):
            return False
        # Plain loops: this runs for every block of every token.
        for part in self._modules:
            hooked = part._forward_pre_hooks or (part._forward_hooks and _has_hook(part))
            if hooked or "forward" in part.__dict__:
                return False
        for parts, name, held in self._held:  # noqa: SIM110
            if parts.get(name) is not held:
                return False
        return True

    def _decode(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        cache: Cache,
        positions: tuple[Tensor, Tensor],
    ) -> Tensor:
        query, key, value = self._block.before_cache(hidden, *positions)
        key, value = cache.update(key, value, cast(int, self._attention.layer_idx))
        if can_attend_one(query, key, value, mask):
            return self._block.after_cache(hidden, query, key, value, mask)
        scaling = self._block.scale
        attended, _ = attention_forward(self._attention, query, key, value, mask, scaling=scaling)
        layer: Any = self._layer
        hidden = hidden + layer.self_attn.o_proj(attended.flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))  # type: ignore[no-any-return]

    @torch.no_grad()
    def gives_the_same(self) -> bool:
        """Whether the operators give what the block's own forward does, on random numbers."""
        generator = torch.Generator().manual_seed(0)
        block, own, ours = self._block, DynamicCache(), DynamicCache()
        for _ in range(2):
            sizes = block.input_norm.shape[0], block.head_dim // 2
            hidden, half = (
                torch.randn(1, 1, size, generator=generator, dtype=torch.float32, device="cpu")
                for size in sizes
            )
            angles = half.repeat(1, 1, 2)
            positions = angles.cos(), angles.sin()
            expected = self._own(
                self._layer, hidden, past_key_values=own, position_embeddings=positions
            )
            found = self._decode(hidden, None, ours, positions)
            # NaN is no agreement.
            if not (found - expected).norm() <= 1e-3 * (expected - hidden).norm():
                return False
        return True


def _has_hook(module: nn.Module) -> bool:
    """Whether a module has a forward hook beside transformers' own.

    That one records attention weights, which ours does not give, and stays once it was wanted.
    """
    hooks = module._forward_hooks.values()
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)


def _packed_block(layer: nn.Module) -> PackedBlock | None:
    """A block's tensors; None where it or its modules are not the expected ones."""
    known = any(type(layer).__name__ == f"{family}DecoderLayer" for family in _FAMILIES)
    if not known or not type(layer).__module__.startswith("transformers.models."):
        return None
    parts = {name: dict(module.named_children()) for name, module in layer.named_children()}
    attention, feed_forward = parts.get("self_attn", {}), parts.get("mlp", {})
    others = set(attention) - set(_ATTENTION)
    if set(parts) != {"self_attn", "mlp", *_NORMS} or others not in (set(), set(_HEAD_NORMS)):
        return None
    layers = [attention.get(name) for name in _ATTENTION]
    layers += [feed_forward.get(name) for name in _FEED_FORWARD]
    packed = [part for part in layers if isinstance(part, FdbLinear) and part.tiles is not None]
    norms = [layer.get_submodule(name) for name in _NORMS]
    norms += [attention[name] for name in _HEAD_NORMS if others]
    eps = {getattr(norm, "variance_epsilon", None) for norm in norms}
    biased = [part.bias is not None for part in packed]
    one_group = len({part.group_size for part in packed}) == 1
    if len(packed) < len(layers) or len(eps) > 1 or None in eps or not one_group:
        return None
    if any(biased[3:]) or len(set(biased[:3])) > 1:
        return None
    return _block_of(layer.get_submodule("self_attn"), packed, norms, eps.pop())


def _block_of(
    attention: Any, packed: list[FdbLinear], norms: list[nn.Module], eps: Any
) -> PackedBlock:
    q, k, v, o, gate, up, down = (cast(Tensor, part.tiles) for part in packed)
    weights = [cast(Tensor, norm.weight) for norm in norms]
    biases = [part.bias for part in packed[:3] if part.bias is not None]
    return PackedBlock(
        input_norm=weights[0],
        q=q,
        k=k,
        v=v,
        biases=(biases[0], biases[1], biases[2]) if biases else None,
        head_norms=(weights[2], weights[3]) if len(weights) > 2 else None,
        o=o,
        inner_norm=weights[1],
        gate=gate,
        up=up,
        down=down,
        heads=packed[0].out_features // attention.head_dim,
        key_heads=packed[1].out_features // attention.head_dim,
        head_dim=attention.head_dim,
        intermediate=packed[4].out_features,
        group_size=packed[0].group_size,
        eps=eps,
        scale=attention.scaling,
    )
