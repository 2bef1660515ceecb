"""Tiny random models of many families, each saved to a folder with a tokenizer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 288
POSITIONS = 64
# The second group of 100 inputs is short, and its rows end within a byte.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False}
_HEADS: dict[str, Any] = _GROUPED | {"head_dim": 16}
# Each layer of these gets another mask.
_SLIDING: dict[str, Any] = {"sliding_window": 8}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "llama-tied": lambda: LlamaConfig(**(_GROUPED | {"tie_word_embeddings": True})),
    "mistral": lambda: MistralConfig(**_GROUPED, **_SLIDING),
    "qwen2": lambda: Qwen2Config(
        **_GROUPED, **_SLIDING, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_HEADS),
    "gemma": lambda: GemmaConfig(**(_HEADS | {"tie_word_embeddings": True})),
    "gemma2": lambda: Gemma2Config(
        **(_HEADS | _SLIDING | {"tie_word_embeddings": True}), query_pre_attn_scalar=16
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **(_HEADS | _SLIDING | {"tie_word_embeddings": True}),
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "opt": lambda: OPTConfig(
        **{key: value for key, value in _SIZES.items() if key != "intermediate_size"},
        ffn_dim=100,
        word_embed_proj_dim=64,
        dropout=0.1,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**_SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_inner=100,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi": lambda: PhiConfig(**_SIZES),
    # Blocks of these give tuples.
    "bloom": lambda: BloomConfig(**_SIZES),
    "gptj": lambda: GPTJConfig(**(_SIZES | {"rotary_dim": 4, "n_inner": 100})),
}


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes that begins every text with `<s>`."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*special.values(), *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=special["unk_token"]))
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model whose biases and norms do not stand at 0 and 1."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model  # type: ignore[no-any-return]


def save_model(folder: Path, family: str = "llama") -> Path:
    """A family's model, its tokenizer and a generation config."""
    build_model(FAMILIES[family]()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def planes_of(weight: torch.Tensor, in_features: int) -> torch.Tensor:
    """The bits of packed planes, 0 or 1 `[2, out, in]`, told by arithmetic of its own."""
    bits = [(weight >> place) & 1 for place in range(8)]
    return torch.stack(bits, dim=-1).flatten(-2)[..., :in_features]


def levels_of(tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    """Values of the codes 00, 01, 10 and 11, b1 first, of every group, float32 `[4, out, groups]`.

    Read from plain or tied scales, or from codes of centre, outer and inner: `fdb.schemes._codes`.
    """
    alpha = tensors[f"{layer}.alpha"]
    if alpha.dtype == torch.float16:
        if len(alpha) == 1:  # tied: d times -1, 0, 1 and 2
            up, down = alpha.clamp(min=0), alpha.clamp(max=0)
            alpha = torch.cat((2 * up - down, 2 * down - up))
        first, second = alpha.float()
        return torch.stack((torch.zeros_like(first), second, first, first + second))
    codes = alpha[0].to(torch.int64)
    unit = 2.0 ** tensors[f"{layer}.row_exponent"].double().unsqueeze(-1)
    exponent, mantissa = codes >> 3 & 7, codes & 7
    outer = torch.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 1), mantissa) * unit
    inner = outer * (2 * (codes >> 6 & 31) + 1) / 64
    centre = outer * 3 * ((codes >> 11) - 16) / 64
    return torch.stack((centre - inner, centre - outer, centre + outer, centre + inner)).float()


def dequantized(tensors: Mapping[str, torch.Tensor], layer: str, in_features: int) -> torch.Tensor:
    """The dense matrix of a stored layer, float32 `[out, in]`; groups of 64 inputs."""
    levels = levels_of(tensors, layer).repeat_interleave(64, dim=-1)[..., :in_features]
    b1, b2 = planes_of(tensors[f"{layer}.weight"], in_features).long()
    return levels.gather(0, (2 * b1 + b2).unsqueeze(0)).squeeze(0)
