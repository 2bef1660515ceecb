"""bench: speed, memory and size of the packed model beside the dense one, in the same run."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Literal

import torch

from dbllm_cli.configs import BenchConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.fdb.quantized import count_planes
from dbllm_cli.kernels import REFERENCE, kernel_name
from dbllm_cli.llm.decoding import prefill_and_decode
from dbllm_cli.llm.models import Model, load_model, model_folder, require_positions
from dbllm_cli.llm.peak_memory import measure_peak_memory
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.machine.compute_dtype import faster_dtype
from dbllm_cli.machine.processor import processor
from dbllm_cli.progress import Task
from dbllm_cli.records.environment import environment_here
from dbllm_cli.records.metrics import BenchMetrics, SpeedMetrics, Spread
from dbllm_cli.stages.context import Context, Result
from dbllm_cli.stages.spec import BENCH, implements
from dbllm_cli.store import Artifact
from dbllm_cli.tensors import torch_dtype
from dbllm_cli.training.student import packed_layers

_Rate = Literal["prefill_tokens_per_second", "decode_tokens_per_second", "weight_bytes"]
_Shown = Literal[_Rate, "peak_memory_mib"]


@dataclass(frozen=True)
class _Contender:
    name: str
    model: Model


@implements(BENCH)
def run(config: BenchConfig, inputs: Mapping[str, Artifact], ctx: Context) -> Result[BenchMetrics]:
    """Time prefill and decode of both models, interleaved, and count the paper's operations.

    Raises:
        ConfigError: the packed artifact is a dense export.
    """
    environment = environment_here(ctx.device, config.compute_dtype)
    if config.compute_dtype == "bfloat16" and faster_dtype(ctx.device) != "bfloat16":
        ctx.progress.note(
            f"{ctx.device} is slower in bfloat16, which the dense model's prefill pays for: "
            "--compute-dtype float32 measures it at its best"
        )
    folders = {
        "dense": model_folder(inputs["model"], ctx.work, ctx.trust_remote_code),
        "packed": inputs["packed"].path,
    }
    tokens = config.prompt_tokens + config.decode_tokens
    require_positions(folders["dense"], tokens, ctx.trust_remote_code)
    if not PackedFolder.is_one(folders["packed"]):
        raise ConfigError("bench got a dense export", "give the artifact of pack --format packed")
    shape = (config.batch_size, config.prompt_tokens, config.decode_tokens)
    peaks = {
        name: measure_peak_memory(
            folder,
            compute_dtype=config.compute_dtype,
            shape=shape,
            device=ctx.device,
            trust_remote_code=ctx.trust_remote_code,
        )
        for name, folder in folders.items()
    }
    contenders = [_Contender(name, _load(folder, config, ctx)) for name, folder in folders.items()]
    with ctx.progress.task("bench", (config.repeats + 1) * len(contenders), unit="runs") as task:
        times = _time_all(config, contenders, task)
    dense, packed = (
        _figures(config, times[each.name], each.model, peaks[each.name]) for each in contenders
    )
    metrics: BenchMetrics = {
        "device": _device_name(ctx.device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "kernel": _kernel(contenders[1].model, ctx.device),
        "dense": dense,
        "packed": packed,
        "packed_over_dense": _ratios(packed, dense),
        "accounting": _accounting(contenders[1].model),
    }
    _show(metrics, ctx)
    return Result(metrics, environment)


def _load(folder: Path, config: BenchConfig, ctx: Context) -> Model:
    dtype = torch_dtype(config.compute_dtype)
    return load_model(folder, dtype, ctx.device, ctx.trust_remote_code)


def _ratios(packed: SpeedMetrics, dense: SpeedMetrics) -> dict[str, float]:
    keys: tuple[_Rate, ...] = (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "weight_bytes",
    )
    return {key: round(packed[key] / dense[key], 4) for key in keys}


def _show(result: BenchMetrics, ctx: Context) -> None:
    dense, packed, ratio = result["dense"], result["packed"], result["packed_over_dense"]
    keys: tuple[_Shown, ...] = (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "weight_bytes",
        "peak_memory_mib",
    )
    rows = [(key.replace("_", " "), dense[key], packed[key], ratio.get(key, "")) for key in keys]
    ctx.progress.table("bench", ("figure", "dense", "packed", "packed / dense"), rows)


# -- speed ---------------------------------------------------------------------------


def _time_all(
    config: BenchConfig, contenders: list[_Contender], task: Task
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of prefill and decode, by name; the warm-up is run and dropped."""
    times: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    for repeat in range(config.repeats + 1):
        # The two take turns, so that a busy moment of the machine meets both.
        for contender in contenders:
            seconds = prefill_and_decode(
                contender.model,
                config.batch_size,
                config.prompt_tokens,
                config.decode_tokens,
                config.seed,
            )
            if repeat:
                times[contender.name].append(seconds)
            task.advance()
    return times


def _figures(
    config: BenchConfig, times: list[tuple[float, float]], model: Model, peak: float
) -> SpeedMetrics:
    prefill, decode = zip(*times, strict=True)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
    return {
        "prefill_seconds": _spread(prefill),
        "decode_seconds": _spread(decode),
        "prefill_tokens_per_second": round(
            config.batch_size * config.prompt_tokens / statistics.median(prefill), 3
        ),
        "decode_tokens_per_second": round(
            config.batch_size * config.decode_tokens / statistics.median(decode), 3
        ),
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "peak_memory_mib": peak,
    }


def _spread(seconds: tuple[float, ...]) -> Spread:
    return {
        "median": round(statistics.median(seconds), 6),
        "fastest": round(min(seconds), 6),
        "slowest": round(max(seconds), 6),
    }


def _kernel(model: Model, device: str) -> str:
    """What the packed model runs in: its group size may have no kernel on a CPU."""
    on_cpu = device.startswith("cpu")
    untiled = on_cpu and all(layer.tiles is None for _, layer in packed_layers(model))
    return REFERENCE if untiled else kernel_name(device)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


# -- the paper's accounting -----------------------------------------------------------


def _accounting(model: Model) -> dict[str, float]:
    layers = [layer for _, layer in packed_layers(model)]
    counts = reduce(add, (count_planes(layer.quantized) for layer in layers))
    bits = sum(
        tensor.numel() * tensor.element_size() * 8
        for layer in layers
        for name, tensor in layer.state_dict().items()
        if name != "bias"
    )
    return {
        "quantized_weights": counts.weights,
        "bits_per_quantized_weight": round(bits / counts.weights, 6),
        "level_entropy_bits": round(counts.level_entropy, 6),
        "zeros_b1": round(1 - counts.ones_b1 / counts.weights, 6),
        "zeros_b2": round(1 - counts.ones_b2 / counts.weights, 6),
        "additions_per_weight": round(counts.additions_per_weight, 6),
        "dense_operations_per_weight": 2.0,
    }
