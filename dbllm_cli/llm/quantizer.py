"""How transformers loads a packed model: `quant_method: dbllm`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.llm.attention import use_cpu_attention
from dbllm_cli.llm.blocks import find_blocks, layer_shape
from dbllm_cli.llm.decoder_blocks import use_block_kernels
from dbllm_cli.llm.embeddings import use_int8_embeddings
from dbllm_cli.registry import registered
from dbllm_cli.store.json_file import read_json_object

FORMAT_VERSION = 1
NEWEST_FORMAT = 3
"""A folder has the version of its levels (`Scheme.format_version`), so that older dbllm read what
they know. Version 2 had scales in 8 bits and is not read any more."""


_USES_CPU_KERNELS: ContextVar[bool] = ContextVar("uses_cpu_kernels", default=True)


@contextmanager
def without_cpu_kernels() -> Iterator[None]:
    """Models loaded meanwhile stay as planes and scales, to be trained or moved to a GPU."""
    token = _USES_CPU_KERNELS.set(False)
    try:
        yield
    finally:
        _USES_CPU_KERNELS.reset(token)


class NewerFormatError(ValueError):
    """A packed folder was written by a newer dbllm; a ValueError, as transformers' own are."""


class DbllmConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model's config.json.

    Args:
        group_size: inputs that share their scales.
        modules_to_not_convert: full names of linear layers in the blocks that are not quantized.
        format_version: of the tensors; a newer one is refused.
        embedding_bits: 8 where embeddings and output layer are `kernels.quantize_rows`'.
        levels: of `fdb.schemes`; plain when absent.

    Raises:
        NewerFormatError: the folder was written by a newer dbllm.
        ValueError: a setting is none that dbllm writes.
    """

    def __init__(
        self,
        group_size: int = 64,
        modules_to_not_convert: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        embedding_bits: int | None = None,
        levels: str | None = None,
        **kwargs: Any,
    ) -> None:
        del kwargs
        if not _is_count(group_size) or group_size % 8:
            raise ValueError(f"group_size {group_size!r} is no multiple of 8")
        kept = modules_to_not_convert or []
        if not _are_names(kept):
            raise ValueError("modules_to_not_convert is no list of names")
        if not _is_count(format_version):
            raise ValueError(f"packed format {format_version!r} is not known here")
        if embedding_bits not in (None, 8):
            raise ValueError(f"embeddings in {embedding_bits} bits are not known here: 8 or none")
        if levels not in (None, *registered("fdb/schemes")):
            raise ValueError(f"{levels} levels are not known here")
        if format_version == 2:
            raise ValueError("packed format 2 is not read any more: make the artifact again")
        if format_version > NEWEST_FORMAT:
            raise NewerFormatError(
                f"packed format {format_version} is newer than the {NEWEST_FORMAT} read here: "
                "pip install --upgrade dbllm"
            )
        self.quant_method = "dbllm"  # type: ignore[assignment]
        self.format_version = format_version
        self.group_size = group_size
        self.embedding_bits = embedding_bits
        self.levels = levels
        self.modules_to_not_convert = list(kept)

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it: without what is not set."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def packed_settings(folder: Path) -> DbllmConfig | None:
    """The settings of a folder with planes and scales; None of any other model's.

    Raises:
        ArtifactMissingError: the folder was written by a newer dbllm.
        ArtifactCorruptError: config.json is damaged, or none that dbllm writes.
    """
    settings = read_json_object(folder / "config.json").get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "dbllm":
        return None
    try:
        return DbllmConfig(**settings)
    except NewerFormatError as error:
        raise ArtifactMissingError(f"{folder}: {error}", "upgrade dbllm") from error
    except ValueError as error:
        raise ArtifactCorruptError(f"{folder}: {error}", "make the artifact again") from error


class DbllmQuantizer(HfQuantizer):
    """Puts FdbLinear in the place of every quantized layer before the weights are read."""

    requires_calibration = True
    quantization_config: DbllmConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        del kwargs
        settings = self.quantization_config
        kept = settings.modules_to_not_convert
        convert_layers(model, settings.group_size, kept, settings.levels or "plain")
        if settings.embedding_bits is not None:
            use_int8_embeddings(model)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        del kwargs
        packed = [module for module in model.modules() if isinstance(module, FdbLinear)]
        for module in packed:
            module.expand()
        # A layer that is offloaded from a GPU comes back to it at every call.
        devices = (getattr(model, "hf_device_map", None) or {"": "cpu"}).values()
        if _USES_CPU_KERNELS.get() and {str(device) for device in devices} == {"cpu"}:
            for module in packed:
                module.use_cpu_kernels()
            use_cpu_attention(model)
            use_block_kernels(model)
        return model

    @property
    def is_compileable(self) -> bool:
        """The product is a torch operator with a fake implementation."""
        return True

    def is_serializable(self) -> bool:
        """Packed models save as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed planes don't train; `dbllm distill` trains an fdb artifact."""
        return False


def convert_layers(
    model: nn.Module, group_size: int, kept: list[str], levels: str = "plain"
) -> None:
    """Replace the linear layers of the decoder blocks by empty FdbLinear of the same shape.

    Args:
        model: on the meta device, or loaded.
        group_size: inputs that share their scales.
        kept: full names of layers to leave; a headless model's shorter names match them too.
        levels: the scheme of levels.
    """
    for name, module in list(find_blocks(model).linear_layers()):
        if any(skip == name or skip.endswith(f".{name}") for skip in kept):
            continue
        in_features, out_features = layer_shape(module)
        bias = getattr(module, "bias", None)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        replacement = FdbLinear(
            in_features,
            out_features,
            group_size,
            bias is not None,
            weight.dtype,
            weight.device,
            levels,
        )
        model.set_submodule(name, replacement)


def register() -> None:
    """Teach transformers to load packed models; calling it again does nothing."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if "dbllm" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("dbllm")(DbllmConfig)
        register_quantizer("dbllm")(DbllmQuantizer)
