"""pack: planes and scales as a model folder that loads where people are, or a plain dense one."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dbllm_cli.configs import PackConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.models import LAYER_REPORT, copy_other_files
from dbllm_cli.llm.packed import (
    PackedFolder,
    coded_scale_bits,
    coded_scale_tensors,
    dense_tensors,
    int8_embedding_tensors,
    scale_settings,
    write_json,
)
from dbllm_cli.llm.tensors import ShardWriter
from dbllm_cli.stages.model_card import model_card
from dbllm_cli.stages.spec import Context, Metrics, members
from dbllm_cli.store import Artifact


def run(config: PackConfig, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
    """Make the packed artifact from an fdb artifact.

    Raises:
        ArtifactCorruptError: the fdb artifact is not whole.
        ConfigError: the model's embeddings, or tied scales, can't be packed in 8 bits.
    """
    fdb = inputs["fdb"]
    student = PackedFolder(fdb.path)
    if student.scale_format == "tied" and config.scales != "float16":
        raise ConfigError("tied scales have no float8 form", "leave out --scales float8")
    copy_other_files(student.folder, ctx.out)
    count = len(student.tensors.names())
    if config.scales == "float8":
        count += len(student.layer_names())
    total = 0
    with (
        ShardWriter(ctx.out, shard_bytes=config.shard_size * 1e9) as writer,
        ctx.progress.task("pack", count, unit="tensors") as task,
    ):
        for name, tensor in _tensors(config, student, ctx):
            writer.add(name, tensor)
            total += tensor.numel() * tensor.element_size()
            task.advance()
    if config.format == "dense":
        _drop_quantization_config(ctx)
    else:
        _note_bits(config, ctx)
    sizes = _sizes(student, config.scales)
    metrics: Metrics = {
        "format": config.format,
        "embeddings": config.embeddings,
        "scales": "tied" if student.scale_format == "tied" else config.scales,
        "weight_bytes": total,
        **sizes,
    }
    card = model_card(fdb, members(inputs, "evals"), metrics)
    (ctx.out / "README.md").write_text(card)
    return metrics


def _tensors(
    config: PackConfig, student: PackedFolder, ctx: Context
) -> Iterator[tuple[str, Tensor]]:
    if config.format == "dense":
        return dense_tensors(student, ctx.trust_remote_code)
    tensors = student.tensors.items()
    if config.embeddings == "int8":
        tensors = int8_embedding_tensors(student, ctx.trust_remote_code)
    if config.scales == "float8":
        return coded_scale_tensors(tensors, set(student.layer_names()))
    return tensors


def _drop_quantization_config(ctx: Context) -> None:
    path = ctx.out / "config.json"
    config = json.loads(path.read_text())
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    write_json(path, config | {"dtype": "bfloat16"})


def _note_bits(config: PackConfig, ctx: Context) -> None:
    path = ctx.out / "config.json"
    settings = json.loads(path.read_text())
    quantization: dict[str, Any] = settings["quantization_config"]
    if config.embeddings == "int8":
        quantization["embedding_bits"] = 8
    if config.scales == "float8":
        quantization |= scale_settings("float8")
    write_json(path, settings)


def _sizes(student: PackedFolder, scale_format: str) -> dict[str, float]:
    """What the quantized layers take, planes and scales."""
    planes = scales = 0
    for name in student.layer_names():
        planes += student.tensors.get(f"{name}.weight").numel() * 8
        alpha = student.tensors.get(f"{name}.alpha")
        scales += alpha.numel() * 16 if scale_format == "float16" else coded_scale_bits(alpha)
    report = json.loads((student.folder / LAYER_REPORT).read_text())
    weights = sum(int(layer["weights"]) for layer in report.values())
    return {
        "quantized_weights": weights,
        "bits_per_quantized_weight": round((planes + scales) / weights, 6),
    }
