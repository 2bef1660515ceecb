"""init-fdb: the starting planes and scales of every selected linear layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbllm_cli.configs import InitFdbConfig
from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import QuantizedMatrix, quantize_matrix
from dbllm_cli.llm.blocks import find_blocks, matrix_of, select_layers
from dbllm_cli.llm.models import (
    copy_other_files,
    empty_model,
    load_config,
    load_tokenizer,
    model_folder,
    module_tensor_names,
    require_device,
)
from dbllm_cli.llm.packed import layer_tensors, quantized_config, write_json
from dbllm_cli.llm.tensors import ShardWriter, TensorFolder, require_finite
from dbllm_cli.stages.layer_report import over_all_layers, show_layers, write_layer_report
from dbllm_cli.stages.sequences import open_calibration, require_same_model
from dbllm_cli.stages.spec import Context, Metrics
from dbllm_cli.store import Artifact


def run(config: InitFdbConfig, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
    """Make an fdb artifact: a quantized model's folder and layers.json.

    Raises:
        ArtifactCorruptError: a weight is NaN.
        ConfigError: no layer selected, or fused experts.
        ArtifactMissingError: the calibration is another model's.
    """
    require_same_model(inputs)
    require_device(ctx.device)
    folder = model_folder(inputs["model"], ctx.work, ctx.trust_remote_code)
    load_tokenizer(folder, ctx.trust_remote_code)
    model = empty_model(load_config(folder, ctx.trust_remote_code), ctx.trust_remote_code)
    blocks = find_blocks(model)
    layers = select_layers(blocks, config.include, config.exclude)
    means: Mapping[str, Tensor] = {}
    if "calibration" in inputs:
        means = open_calibration(inputs["calibration"]).input_mean_squares
    reader = TensorFolder(folder)
    dtype = getattr(torch, config.dtype)
    with ShardWriter(ctx.out) as writer:
        with ctx.progress.task("init-fdb", len(layers), unit="layers") as task:
            for name, module in layers.items():
                weight = reader.get(f"{name}.weight")
                require_finite(f"{name}.weight", weight)
                matrix = matrix_of(module, weight).to(ctx.device, torch.float32)
                quantized = _quantize(name, matrix, config, means.get(name))
                writer.add_all(layer_tensors(name, quantized))
                task.advance()
        for name in module_tensor_names(model):
            if name.removesuffix(".weight") not in layers:
                tensor = reader.get(name)
                require_finite(name, tensor)
                writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    _write_files(folder, ctx.out, config, [n for n, _ in blocks.linear_layers() if n not in layers])
    report = write_layer_report(folder, means, ctx)
    show_layers(report, ctx.progress)
    return over_all_layers(report)


def _quantize(
    name: str, matrix: Tensor, config: InitFdbConfig, importance: Tensor | None
) -> QuantizedMatrix:
    on_device = None if importance is None else importance.to(matrix.device)
    alpha = fit_scales(matrix, config.group_size, config.method, on_device)
    try:
        return quantize_matrix(matrix, alpha, config.group_size)
    except StageFailedError as error:
        hint = f"leave it out: --exclude {name}"
        raise StageFailedError(f"{name}: {error.message}", hint) from error


def _write_files(folder: Path, out: Path, config: InitFdbConfig, kept: list[str]) -> None:
    copy_other_files(folder, out)
    own: dict[str, Any] = json.loads((folder / "config.json").read_text())
    write_json(out / "config.json", quantized_config(own, config.group_size, kept, config.dtype))
