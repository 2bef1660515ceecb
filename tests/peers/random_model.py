"""Writes models of random weights and a known shape, to time them: no weights can be had here.

    python tests/peers/random_model.py tinyllama-1.1b /work/tmp/models/tinyllama-1.1b

OUT/dense is a transformers folder in bfloat16, OUT/packed what `dbllm pack --embeddings int8`
writes, OUT/model.gguf llama.cpp's Q2_K. Every tensor repeats one random block: weights have mean 0
and a deviation of about 0.02, and logits are finite. None has a tokenizer.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from llama_kernel import q2_k_rows
from torch import Tensor
from transformers import LlamaConfig

from dbllm_cli.kernels import quantize_rows
from dbllm_cli.llm.quantized_folder import quantized_config
from dbllm_cli.store.json_file import write_json
from dbllm_cli.tensors import ShardWriter

GROUP_SIZE = 64
POSITIONS = 4096
EPSILON = 1e-5
SHARD_BYTES = 2e9
# Of Q6_K: 128 bytes of low bits, 64 of high ones, 16 scales, d.
Q6_K_BYTES = 210
Kind = GGMLQuantizationType


@dataclass(frozen=True)
class Shape:
    """What a LLaMA's size follows from."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    def projections(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a block's linear layers, by transformers' names."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
        }

    def config(self) -> dict[str, object]:
        """config.json of transformers."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=POSITIONS,
            rms_norm_eps=EPSILON,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )
        settings: dict[str, object] = config.to_dict()
        return settings


SHAPES = {
    "tiny": Shape(256, 768, 2, 4, 2, 1024),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32),
}
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    for name, write in {"dense": write_dense, "packed": write_packed}.items():
        folder = options.out / name
        folder.mkdir(parents=True)
        write(shape, folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{folder}: {size / 1e9:.3f} GB", flush=True)
    path = options.out / "model.gguf"
    write_gguf(shape, path)
    print(f"{path}: {path.stat().st_size / 1e9:.3f} GB")


def write_dense(shape: Shape, folder: Path) -> None:
    write_json(folder / "config.json", shape.config())
    with ShardWriter(folder, shard_bytes=SHARD_BYTES) as writer:
        writer.add_all(unquantized(shape))
        for name, (out, inputs) in layers(shape):
            writer.add(f"{name}.weight", random_matrix(out, inputs))


def write_packed(shape: Shape, folder: Path) -> None:
    config = quantized_config(shape.config(), GROUP_SIZE, [], "bfloat16")
    config["quantization_config"]["embedding_bits"] = 8
    write_json(folder / "config.json", config)
    with ShardWriter(folder, shard_bytes=SHARD_BYTES) as writer:
        for name, tensor in unquantized(shape):
            writer.add(name, tensor if tensor.dim() == 1 else quantize_rows(tensor))
        for name, (out, inputs) in layers(shape):
            planes = repeated(random_bytes(), 2 * out * inputs // 8)
            scales = torch.rand(2, out, inputs // GROUP_SIZE) * 0.04 + 0.01
            scales[1] *= -1
            writer.add(f"{name}.weight", planes.view(2, out, inputs // 8))
            writer.add(f"{name}.alpha", scales.half())


def layers(shape: Shape) -> Iterator[tuple[str, tuple[int, int]]]:
    for block in range(shape.layers):
        for name, size in shape.projections().items():
            yield f"model.layers.{block}.{name}", size


def unquantized(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """Embeddings, output layer and norms, in bfloat16."""
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", random_matrix(shape.vocabulary, shape.hidden)
    norms = [f"layers.{block}.{place}" for block in range(shape.layers) for place in NORMS]
    for name in (*norms, "norm"):
        yield f"model.{name}.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)


NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def random_matrix(out: int, inputs: int) -> Tensor:
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(3)) * 0.02
    return repeated(block.bfloat16(), out * inputs).view(out, inputs)


def random_bytes() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(256, (2**20 + 7,), generator=generator, dtype=torch.uint8)


def repeated(block: Tensor, size: int) -> Tensor:
    return block.repeat(-(-size // block.numel()))[:size]


def write_gguf(shape: Shape, path: Path) -> None:
    writer = GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    tensors = list(gguf_tensors(shape))
    for name, (out, inputs), kind in tensors:
        rows = gguf_rows(out, inputs, kind)
        raw = None if kind == Kind.F32 else kind
        writer.add_tensor_info(name, rows.shape, rows.dtype, rows.nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, (out, inputs), kind in tensors:
        writer.write_tensor_data(gguf_rows(out, inputs, kind))
    writer.close()


def gguf_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, int], Kind]]:
    """Names, sizes and types as llama.cpp's Q2_K has them, but for layers it gives more bits."""
    table = shape.vocabulary, shape.hidden
    yield "token_embd.weight", table, Kind.Q2_K
    yield "output.weight", table, Kind.Q6_K
    yield "output_norm.weight", (1, shape.hidden), Kind.F32
    for block in range(shape.layers):
        for name in NORMS.values():
            yield f"blk.{block}.{name}.weight", (1, shape.hidden), Kind.F32
        for name, size in shape.projections().items():
            yield f"blk.{block}.{GGUF_NAMES[name]}.weight", size, Kind.Q2_K


def gguf_rows(out: int, inputs: int, kind: Kind) -> np.ndarray:
    if kind == Kind.F32:
        return np.ones(inputs, np.float32)
    if kind == Kind.Q2_K:
        return tiled(q2_k_rows(1024, 256), out * inputs // 256).reshape(out, -1)
    blocks = np.random.default_rng(5).integers(256, size=(1024, Q6_K_BYTES), dtype=np.uint8)
    blocks[:, 192:208] = blocks[:, 192:208].view(np.int8) // 4  # scales
    blocks[:, 208:] = np.array([6.2e-5], np.float16).view(np.uint8)
    return tiled(blocks, out * inputs // 256).reshape(out, -1)


def tiled(blocks: np.ndarray, count: int) -> np.ndarray:
    return np.resize(blocks, (count, blocks.shape[1]))


if __name__ == "__main__":
    main()
