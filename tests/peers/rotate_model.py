"""A Llama model turned by random orthogonal matrices, which changes nothing in full precision.

    python tests/peers/rotate_model.py MODEL OUT

QuaRot's first two rotations (arXiv 2404.00456), merged into the weights: the norms' weights are
folded into the projections after them, the residual stream is turned by one matrix, and the values
of every head by another, undone in `o_proj`. Writes OUT in float32, embeddings and output layer
untied, since folding the last norm parts them; prints how far the logits moved. Quantize both
folders to see what turning is worth.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = torch.arange(3, 67).unsqueeze(0)
    with torch.no_grad():
        before = model(ids).logits
        untie(model)
        fold_norms(model)
        turn(model, torch.Generator().manual_seed(options.seed))
        moved = (model(ids).logits - before).abs().max()
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    print(f"largest change of a logit: {moved:.1e} (largest logit {before.abs().max():.1f})")


def untie(model: nn.Module) -> None:
    """Give the output layer weights of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def fold_norms(model: nn.Module) -> None:
    """Norms of weight 1, theirs multiplied into the columns of what reads them."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        fold(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        fold(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    fold(model.model.norm, [model.lm_head])


def fold(norm: nn.Module, readers: list[nn.Linear]) -> None:
    for reader in readers:
        reader.weight *= norm.weight
    norm.weight.fill_(1)


def turn(model: nn.Module, generator: torch.Generator) -> None:
    """Turn the residual stream and the values of every head."""
    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    stream = orthogonal(config.hidden_size, generator)
    for matrix in (model.model.embed_tokens, model.lm_head):
        matrix.weight.copy_(product(matrix.weight, stream))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        for reader in readers:
            reader.weight.copy_(product(reader.weight, stream))
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(product(writer.weight.t(), stream).t())
        values = orthogonal(head_size, generator)
        rows = attention.v_proj.weight
        heads = product(rows.t().reshape(-1, head_size), values).reshape(rows.t().shape)
        rows.copy_(heads.t())
        columns = attention.o_proj.weight
        columns.copy_(product(columns.reshape(-1, head_size), values).reshape(columns.shape))


def product(matrix: Tensor, rotation: Tensor) -> Tensor:
    return (matrix.double() @ rotation).to(matrix.dtype)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Haar random, float64; merged into weights it need not be a Hadamard matrix."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


if __name__ == "__main__":
    main()
