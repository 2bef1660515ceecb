"""Opening models, and importing what is not yet safetensors under module names."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dbllm_cli.errors import ArtifactCorruptError, ConfigError, first_line
from dbllm_cli.llm.quantizer import packed_settings, register, without_cpu_kernels
from dbllm_cli.llm.quiet import quiet_transformers
from dbllm_cli.store import Artifact, new_staging
from dbllm_cli.store.disk import rename_durably
from dbllm_cli.tensors import ShardWriter, TensorFolder

Model: TypeAlias = PreTrainedModel
Tokenizer: TypeAlias = PreTrainedTokenizerBase

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt",
    ".index.json",
)  # fmt: skip
LAYER_REPORT, CURVE = "layers.json", "curve.jsonl"
STAGE_FILES = ("manifest.json", "metrics.json", LAYER_REPORT, CURVE)


def model_folder(model: Artifact, work: Path, trust_remote_code: bool = False) -> Path:
    """The model as a folder of safetensors whose names are the module's own.

    An fdb or packed artifact is one already.
    A `.gguf` file, or a checkpoint under other names, is imported once into the work area, so that
    later steps read single tensors without transformers' conversions.

    Args:
        model: kind model, fdb or packed.
        work: the store's work area.
        trust_remote_code: let transformers run code that comes with the model.

    Raises:
        ConfigError: transformers does not know the architecture.
    """
    if model.kind != "model":
        return model.path
    if model.path.is_dir() and _has_module_names(model.path, trust_remote_code):
        return model.path
    imported = work / "models" / model.digest[:16]
    if not imported.is_dir():
        staging = new_staging(work / ".staging")
        try:
            _import_model(model.path, staging, trust_remote_code)
            imported.parent.mkdir(parents=True, exist_ok=True)
            _publish(staging, imported)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    _mark_as_used(imported)
    return imported


def _mark_as_used(imported: Path) -> None:
    """Set the folder's time, by which `dbllm gc` knows how long it was not used."""
    with contextlib.suppress(OSError):
        os.utime(imported)


def _publish(staging: Path, imported: Path) -> None:
    try:
        rename_durably(staging, imported)
    except OSError:
        # Another run may have imported it meanwhile: the same files, so either copy serves.
        if not imported.is_dir():
            raise


def _has_module_names(folder: Path, trust_remote_code: bool) -> bool:
    model = empty_model(load_config(folder, trust_remote_code), trust_remote_code)
    stored = TensorFolder(folder)
    return all(name in stored for name in module_tensor_names(model))


def module_tensor_names(model: PreTrainedModel) -> list[str]:
    """Names of all tensors that a checkpoint of the model holds; tied ones once."""
    tied = set(model.all_tied_weights_keys)
    return [name for name in model.state_dict() if name not in tied]


def _import_model(source: Path, folder: Path, trust_remote_code: bool) -> None:
    with quiet_transformers():
        if source.is_file():
            model = _from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            tokenizer.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
        else:
            model = _from_pretrained(source, trust_remote_code=trust_remote_code)
            copy_other_files(source, folder)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    tensors = model.state_dict()
    with ShardWriter(folder) as writer:
        writer.add_all((name, tensors[name]) for name in module_tensor_names(model))


def copy_other_files(source: Path, folder: Path) -> None:
    """Copy every file of a model's folder that is not weights: tokenizer, templates, licences.

    What a stage writes beside the model is left out.
    """
    for path in sorted(source.iterdir()):
        ours = path.name in STAGE_FILES or path.name.startswith(".")
        if path.is_file() and not ours and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, folder / path.name)


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config.

    Raises:
        ConfigError: transformers does not know the architecture.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers, its checks and code of models raise their own
        raise ConfigError(
            f"transformers can't read {folder / 'config.json'}: {first_line(error)}",
            "check model_type; for code that comes with the model add --trust-remote-code",
        ) from error
    return config


def empty_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers real, in eval mode.

    Raises:
        ConfigError: the architecture is no causal language model, or its settings make none.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise ConfigError(
            f"{config.model_type} is not a causal language model: {first_line(error)}",
            "dbllm quantizes decoder-only transformers models",
        ) from error
    except Exception as error:  # whatever a model's code runs into
        raise ConfigError(
            f"transformers makes no model of these settings of {config.model_type}: "
            f"{type(error).__name__}: {first_line(error)}",
            "compare config.json with that of the model's release",
        ) from error
    model.tie_weights()
    model.eval()
    return model


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
    trains: bool = False,
) -> PreTrainedModel:
    """A dense, fdb or packed model folder, whole, in eval mode.

    Args:
        folder: the model's.
        dtype: of what is not quantized.
        device: torch device.
        trust_remote_code: let transformers run code that comes with the model.
        trains: leave packed layers as planes and scales, to be replaced by layers that train.

    Raises:
        ConfigError: transformers does not know the architecture.
        ArtifactCorruptError: a file is damaged, or the folder lacks a tensor of the model.
    """
    register()
    require_device(device)
    load_config(folder, trust_remote_code)
    packed_settings(folder)
    TensorFolder(folder).check()
    runs_on_cpu = torch.device(device).type == "cpu" and not trains
    with quiet_transformers(), contextlib.nullcontext() if runs_on_cpu else without_cpu_kernels():
        model = _from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    moved: Any = model.to(device)  # type: ignore[arg-type]
    return moved.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _from_pretrained(source: Path, **options: Any) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **options
        )
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise ArtifactCorruptError(
            f"the tensors of {source} are not of the sizes that its config.json tells",
            "download or export the model again",
        ) from error
    model: PreTrainedModel = loaded[0]
    # transformers fills what is missing with random values and goes on.
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ArtifactCorruptError(
            f"{source} lacks the tensor {missing[0]} ({len(missing)} missing in all)",
            "download or export the model again",
        )
    return model


def require_device(device: str) -> None:
    """Refuse a device that torch can't use here.

    Raises:
        ConfigError: names the device.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"device {device} can't be used: {first_line(error)}",
            "see dbllm doctor, or use --device cpu",
        ) from error


def require_positions(folder: Path, tokens: int, trust_remote_code: bool = False) -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        ConfigError: says how long they may be.
    """
    settings = load_config(folder, trust_remote_code).get_text_config()
    longest = getattr(settings, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ConfigError(
            f"{tokens} tokens are more than the {longest} positions of {folder}",
            f"use at most {longest}",
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the model's embedding."""
    return int(cast(Tensor, model.get_input_embeddings().weight).shape[0])
