"""pack: planes and scales as a model folder that loads where people are, or a plain dense one."""

import json
import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from dbllm_cli.configs import PackConfig
from dbllm_cli.llm.models import LAYER_REPORT, copy_other_files
from dbllm_cli.llm.packed import (
    PackedFolder,
    dense_tensors,
    int8_embedding_tensors,
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
        ConfigError: the model's embeddings can't be packed in 8 bits, or figures of other models.
    """
    fdb = inputs["fdb"]
    student = PackedFolder(fdb.path)
    copy_other_files(student.folder, ctx.out)
    total = 0
    with (
        ShardWriter(ctx.out, shard_bytes=config.shard_size * 1e9) as writer,
        ctx.progress.task("pack", len(student.tensors.names()), unit="tensors") as task,
    ):
        for name, tensor in _tensors(config, student, ctx):
            writer.add(name, tensor)
            total += tensor.numel() * tensor.element_size()
            task.advance()
    if config.format == "dense":
        _drop_quantization_config(ctx)
    elif config.embeddings == "int8":
        _note_embedding_bits(ctx)
    metrics: Metrics = {
        "format": config.format,
        "embeddings": config.embeddings,
        "levels": student.levels,
        "weight_bytes": total,
        **_sizes(student),
    }
    card = model_card(fdb, members(inputs, "evals"), metrics)
    (ctx.out / "README.md").write_text(card)
    return metrics


def _tensors(
    config: PackConfig, student: PackedFolder, ctx: Context
) -> Iterator[tuple[str, Tensor]]:
    if config.format == "dense":
        return dense_tensors(student, ctx.trust_remote_code)
    if config.embeddings == "int8":
        return int8_embedding_tensors(student, ctx.trust_remote_code)
    return student.tensors.items()


def _drop_quantization_config(ctx: Context) -> None:
    path = ctx.out / "config.json"
    config = json.loads(path.read_text())
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    write_json(path, config | {"dtype": "bfloat16"})


def _note_embedding_bits(ctx: Context) -> None:
    path = ctx.out / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"]["embedding_bits"] = 8
    write_json(path, settings)


def _sizes(student: PackedFolder) -> dict[str, float]:
    """What the quantized layers take, planes and scales."""
    report = json.loads((student.folder / LAYER_REPORT).read_text()).values()
    weights = sum(int(layer["weights"]) for layer in report)
    bits = math.fsum(layer["weights"] * layer["bits_per_weight"] for layer in report)
    return {
        "quantized_weights": weights,
        "bits_per_quantized_weight": round(bits / weights, 6),
    }
