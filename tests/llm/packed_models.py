"""Tiny models of random planes, without and with the kernels' attention and blocks."""

import torch
from transformers import PreTrainedModel

from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.llm.attention import use_cpu_attention
from dbllm_cli.llm.decoder_blocks import use_block_kernels
from dbllm_cli.llm.quantizer import convert_layers
from tests.tiny_models import FAMILIES, build_model


def packed_model(
    family: str, dtype: torch.dtype = torch.float32, levels: str = "plain"
) -> PreTrainedModel:
    """A model of random planes, without the kernels' attention and blocks."""
    model = build_model(FAMILIES[family]()).requires_grad_(False)
    biases = {name: bias for name, bias in model.named_parameters() if name.endswith(".bias")}
    convert_layers(model, 32, [], levels)
    generator = torch.Generator().manual_seed(1)
    for name, layer in model.named_modules():
        if isinstance(layer, FdbLinear):
            assert layer.weight is not None
            layer.weight.random_(0, 256, generator=generator)
            groups = -(-layer.in_features // 32)
            scales = torch.empty(2, layer.out_features, groups, dtype=torch.float16)
            scales.uniform_(0.05, 0.2, generator=generator)
            scales[1] *= -1
            if levels == "offset":
                scales = layer.scheme.round(torch.cat((scales, -scales[:1] / 2)))
            layer.expand()
            layer.scales = scales
            if layer.bias is not None:
                layer.bias.data = biases[f"{name}.bias"].data
            layer.use_cpu_kernels()
    return model.to(dtype)  # type: ignore[no-any-return, arg-type]


def served_model(
    family: str, dtype: torch.dtype = torch.float32, levels: str = "plain"
) -> PreTrainedModel:
    model = packed_model(family, dtype, levels)
    use_cpu_attention(model)
    use_block_kernels(model)
    return model
