"""Plain bfloat16 weights for other tools."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dbllm_cli.formats import Format, JsonObject
from dbllm_cli.llm.blocks import layer_shape, matrix_of
from dbllm_cli.llm.models import empty_model, load_config, module_tensor_names
from dbllm_cli.llm.quantized_folder import PackedFolder


class DenseFormat(Format):
    """The dequantized model."""

    tags = ("dbllm",)
    rounded = "all weights in bfloat16"

    def tensors(
        self, student: PackedFolder, trust_remote_code: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """In bfloat16, under and in the shape of the model's own; see `Format.tensors`."""
        model = empty_model(load_config(student.folder, trust_remote_code), trust_remote_code)
        quantized = set(student.layer_names())
        for name in module_tensor_names(model):
            layer = name.removesuffix(".weight")
            if layer in quantized and name.endswith(".weight"):
                module = model.get_submodule(layer)
                in_features, _ = layer_shape(module)
                dense = student.layer(layer, in_features).dense()
                yield name, matrix_of(module, dense).to(torch.bfloat16)
            else:
                tensor = student.tensors.get(name)
                yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor

    def config(self, config: JsonObject) -> JsonObject:
        """See `Format.config`."""
        dropped = ("quantization_config", "torch_dtype")
        own = {key: value for key, value in config.items() if key not in dropped}
        return own | {"dtype": "bfloat16"}

    def title(self, bits: float) -> str:
        """See `Format.title`."""
        return f"A model trained at {bits} bits, as plain bfloat16"


FORMAT = DenseFormat()
