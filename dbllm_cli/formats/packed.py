"""Planes and scales as they are, read by transformers with dbllm."""

from collections.abc import Iterator

from torch import Tensor

from dbllm_cli.formats import Format, JsonObject
from dbllm_cli.kernels import quantize_rows
from dbllm_cli.llm.embeddings import embedding_names
from dbllm_cli.llm.models import empty_model, load_config
from dbllm_cli.llm.quantized_folder import PackedFolder


class PackedFormat(Format):
    """Every tensor as the quantized model holds it."""

    imports = ("import dbllm_cli.hf",)
    tags = ("dbllm", "2-bit")

    def tensors(
        self, student: PackedFolder, trust_remote_code: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """See `Format.tensors`."""
        del trust_remote_code
        return student.tensors.items()

    def config(self, config: JsonObject) -> JsonObject:
        """See `Format.config`."""
        return config

    def title(self, bits: float) -> str:
        """See `Format.title`."""
        return f"A model of {bits} bits per quantized weight"


class Int8Embeddings(PackedFormat):
    """The same with embeddings and output layer in 8 bits (`kernels.quantize_rows`)."""

    rounded = "embeddings and output layer in 8 bits"

    def tensors(
        self, student: PackedFolder, trust_remote_code: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """See `Format.tensors`.

        Raises:
            ConfigError: the model's embeddings do more than look rows up.
        """
        config = load_config(student.folder, trust_remote_code)
        names = embedding_names(empty_model(config, trust_remote_code))
        for name, tensor in super().tensors(student, trust_remote_code):
            yield name, quantize_rows(tensor) if name in names else tensor

    def config(self, config: JsonObject) -> JsonObject:
        """See `Format.config`."""
        settings = config["quantization_config"] | {"embedding_bits": 8}
        return config | {"quantization_config": settings}


FORMAT = PackedFormat()
