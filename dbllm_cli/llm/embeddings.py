"""Input embeddings and the output layer in 8 bits a row, tied where the model ties them."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dbllm_cli.errors import ConfigError
from dbllm_cli.kernels import dequantize_rows, int8_linear

_SCALE_BYTES = 2


class Int8Embedding(nn.Module):
    """An embedding whose `weight` is uint8 `[tokens, hidden + 2]` (`kernels.quantize_rows`)."""

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = plain.weight.shape
        self.padding_idx = plain.padding_idx
        self.weight = _empty_rows(plain.weight)
        # Follows the casts of the model, which leave integers alone.
        self.like = nn.Buffer(torch.empty(0, dtype=plain.weight.dtype), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Tokens `[...]` to vectors `[..., hidden]` in the model's dtype."""
        return dequantize_rows(self.weight[input_ids], self.like.dtype)


class Int8Head(nn.Module):
    """An output layer whose `weight` is uint8 `[tokens, hidden + 2]` (`kernels.quantize_rows`)."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = plain.weight.shape
        self.weight = _empty_rows(plain.weight)
        self.bias: nn.Parameter | None = plain.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to logits `[..., tokens]` in the same dtype."""
        logits: Tensor = int8_linear(hidden, self.weight)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)


def _empty_rows(matrix: Tensor) -> nn.Parameter:
    """A place for a matrix in 8 bits; a parameter, so that transformers can tie it."""
    rows, width = matrix.shape
    empty = torch.empty(rows, width + _SCALE_BYTES, dtype=torch.uint8, device=matrix.device)
    return nn.Parameter(empty, requires_grad=False)


def use_int8_embeddings(model: PreTrainedModel) -> None:
    """Put empty 8-bit embeddings, and an 8-bit output layer, in the place of a model's own.

    Raises:
        ConfigError: see `embedding_names`.
    """
    embedding, head = _plain_embeddings(model)
    model.set_input_embeddings(Int8Embedding(embedding))
    if head is not None:
        model.set_output_embeddings(Int8Head(head))


def embedding_names(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that `use_int8_embeddings` expects in 8 bits.

    Raises:
        ConfigError: the model's embedding does more than look rows up (Gemma's scales them).
    """
    plain = {id(module) for module in _plain_embeddings(model)}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in plain}


def _plain_embeddings(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear | None]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) not in (nn.Linear, type(None)):
        raise ConfigError(
            f"the embeddings of {type(model).__name__} ({type(embedding).__name__}) can't be "
            "packed in 8 bits",
            "leave out --embeddings int8",
        )
    assert head is None or isinstance(head, nn.Linear)
    return embedding, head
