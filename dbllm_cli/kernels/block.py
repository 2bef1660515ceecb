"""One decoded token through a whole decoder block of packed layers, in two operators.

What lies between the layers costs more than they do in a small model, one torch operator at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbllm_cli.kernels.attention import mask_argument


@dataclass(frozen=True)
class PackedBlock:
    """A Llama-like decoder block: two norms, attention with rotary positions, gated SiLU.

    Numbers between the inputs and outputs of a method are float32.

    Attributes:
        input_norm: weight of the norm before the attention, `[hidden]`.
        q: tiles of the layer that makes the queries.
        k: tiles of the layer that makes the keys.
        v: tiles of the layer that makes the values.
        biases: of q, k and v, each `[out]`.
        head_norms: weights of the norms of queries and keys, each `[head_dim]`.
        o: tiles of the attention's output layer.
        inner_norm: weight of the norm before the feed-forward layers, `[hidden]`.
        gate: tiles of the layer whose outputs go through SiLU.
        up: tiles of the layer whose outputs they are multiplied by.
        down: tiles of the feed-forward output layer.
        heads: heads of queries.
        key_heads: heads of keys and values.
        head_dim: outputs of a head.
        intermediate: outputs of gate and of up.
        group_size: inputs that share their scales, the same for every layer.
        eps: added to the mean square by every norm.
        scale: of the attention's scores.
    """

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    head_norms: tuple[Tensor, Tensor] | None
    o: Tensor
    inner_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    group_size: int
    eps: float
    scale: float

    def before_cache(
        self, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values of one token a sequence.

        Args:
            hidden: `[batch, 1, hidden]` on the CPU, at most 32 sequences.
            cos: of the positions' angles, `[batch or 1, 1, head_dim]`.
            sin: as `cos`.

        Returns:
            `[batch, heads, 1, head_dim]`, and keys and values `[batch, key_heads, 1, head_dim]`.
        """
        none = hidden.new_empty(0)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.dbllm.block_before_cache(
            hidden,
            self.input_norm,
            self.q,
            self.k,
            self.v,
            *(self.biases or (none, none, none)),
            *(self.head_norms or (none, none)),
            cos,
            sin,
            self.heads,
            self.key_heads,
            self.head_dim,
            self.group_size,
            self.eps,
        )
        return found

    def after_cache(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The block's output; `kernels.can_attend_one` must let the attention through.

        Args:
            hidden: the block's input `[batch, 1, hidden]`.
            query: `[batch, heads, 1, head_dim]`.
            key: all keys of the cache, `[batch, key_heads, positions, head_dim]`.
            value: as `key`.
            mask: bool `[batch or 1, 1, 1, positions]`, False where a position is hidden; or None.

        Returns:
            `[batch, 1, hidden]`.
        """
        out: Tensor = torch.ops.dbllm.block_after_cache(
            hidden,
            query,
            key,
            value,
            mask_argument(query, mask),
            self.o,
            self.inner_norm,
            self.gate,
            self.up,
            self.down,
            self.intermediate,
            self.group_size,
            self.eps,
            self.scale,
        )
        return out


@torch.library.register_fake("dbllm::block_before_cache")  # type: ignore[untyped-decorator]
def _before_cache_shapes(
    hidden: Tensor, *tensors_and_sizes: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, key_heads, head_dim = (int(size) for size in tensors_and_sizes[11:14])
    batch = hidden.shape[0]
    query = hidden.new_empty(batch, heads, 1, head_dim)
    key, value = (hidden.new_empty(batch, key_heads, 1, head_dim) for _ in range(2))
    return query, key, value


@torch.library.register_fake("dbllm::block_after_cache")  # type: ignore[untyped-decorator]
def _after_cache_shape(hidden: Tensor, *tensors_and_sizes: Tensor | float) -> Tensor:
    return torch.empty_like(hidden)
