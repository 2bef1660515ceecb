"""calibrate: token sequences, a held-out part, and statistics of the layers' inputs."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbllm_cli.blockwise.statistics import input_mean_squares
from dbllm_cli.configs import CalibrateConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.models import (
    Model,
    Tokenizer,
    load_model,
    model_folder,
    module_tensor_names,
    require_device,
    require_positions,
    vocabulary_size,
)
from dbllm_cli.llm.sampling import SamplingSettings, sample_sequences
from dbllm_cli.llm.text import (
    TextSource,
    document_stream,
    leading_special_tokens,
    tokenizer_digest,
    tokens_digest,
    windows,
)
from dbllm_cli.llm.tokenizers import load_tokenizer
from dbllm_cli.records.calibration import Calibration
from dbllm_cli.records.checkpoints import keep_tensors
from dbllm_cli.records.environment import begin_or_resume
from dbllm_cli.records.metrics import CalibrationMetrics
from dbllm_cli.stages.context import Context, Result
from dbllm_cli.stages.spec import CALIBRATE, implements
from dbllm_cli.store import Artifact
from dbllm_cli.tensors import TensorFolder, require_finite, torch_dtype

_STATISTICS_TOKENS = 65_536
"""Enough for a mean of each input."""


@implements(CALIBRATE)
def run(
    config: CalibrateConfig, inputs: Mapping[str, Artifact], ctx: Context
) -> Result[CalibrationMetrics]:
    """Make the calibration artifact: tokens.safetensors, statistics.safetensors.

    Raises:
        ConfigError: the text is too short, or a weight too large for the compute dtype.
        ArtifactCorruptError: the model holds NaN.
    """
    require_device(ctx.device)
    folder = model_folder(inputs["model"], ctx.work, ctx.trust_remote_code)
    tokenizer = load_tokenizer(folder, ctx.trust_remote_code)
    require_positions(folder, config.sequence_length, ctx.trust_remote_code)
    environment = begin_or_resume(ctx.scratch, ctx.device, config.compute_dtype, ctx.progress)
    dtype = torch_dtype(environment.compute_dtype)
    model = load_model(folder, dtype, ctx.device, ctx.trust_remote_code)
    _require_finite_weights(model, folder)
    if config.source == "generate":
        sequences = _generate(config, model, tokenizer, ctx)
    else:
        sequences = _read(config, tokenizer)
    train, held_out = sequences[: config.num_samples], sequences[config.num_samples :]
    few = train[: math.ceil(_STATISTICS_TOKENS / config.sequence_length)]
    with ctx.progress.task("statistics", len(few), unit="sequences") as task:
        # A long batch would only raise the peak memory.
        means = input_mean_squares(model, few, min(config.batch_size, 4), task)
    for name, mean in means.items():
        require_finite(f"the inputs of {name}", mean)
    Calibration(train, held_out, means).save(ctx.out)
    return Result(_report(train, held_out, model, tokenizer), environment)


def _require_finite_weights(model: Model, folder: Path) -> None:
    tensors = model.state_dict()
    for name in module_tensor_names(model):
        if not torch.isfinite(tensors[name]).all():
            require_finite(name, TensorFolder(folder).get(name))
            raise ConfigError(
                f"tensor {name} is too large for {str(model.dtype).removeprefix('torch.')}",
                "use --compute-dtype float32",
            )


def _generate(
    config: CalibrateConfig,
    model: Model,
    tokenizer: Tokenizer,
    ctx: Context,
) -> Tensor:
    settings = SamplingSettings(
        config.sequence_length,
        config.greedy_tokens,
        config.temperature,
        config.top_k,
        # An embedding may have rows beyond the tokenizer's words, which were never trained.
        min(len(tokenizer), vocabulary_size(model)),
    )
    prefix = leading_special_tokens(tokenizer)
    needed = config.num_samples + config.held_out
    starts = range(0, needed, config.batch_size)
    finished = [_batch_file(ctx.scratch, start) for start in starts]
    done = sum(path.is_file() for path in finished) * config.batch_size
    length = config.sequence_length
    batches = []
    with ctx.progress.task(
        "generate", needed * length, min(done, needed) * length, "tokens"
    ) as task:
        for start, path in zip(starts, finished, strict=True):
            if not path.is_file():
                count = min(config.batch_size, needed - start)
                seed = config.seed * 1_000_003 + start
                ids = sample_sequences(model, prefix, count, settings, seed, task)
                keep_tensors({"ids": ids.to(torch.int32)}, path)
            batches.append(TensorFolder(ctx.scratch, path.stem).get("ids").to(torch.int64))
    return torch.cat(batches)


def _batch_file(scratch: Path, start: int) -> Path:
    return scratch / f"generated-{start:06d}.safetensors"


def _read(config: CalibrateConfig, tokenizer: Tokenizer) -> Tensor:
    source = TextSource(**config.text_settings())
    needed = config.num_samples + config.held_out
    stream = document_stream(tokenizer, source.read(), needed * config.sequence_length)
    sequences = windows(stream, config.sequence_length)[:needed]
    if len(sequences) < needed:
        spare = len(sequences) - config.held_out
        raise ConfigError(
            f"{config.text or config.dataset} gives {len(sequences)} sequences of "
            f"{config.sequence_length} tokens, {needed} are needed",
            f"give more text, or set num_samples to at most {max(0, spare)}",
        )
    return sequences


def _report(
    train: Tensor,
    held_out: Tensor,
    model: Model,
    tokenizer: Tokenizer,
) -> CalibrationMetrics:
    both = torch.cat((train, held_out))
    return {
        "tokens": train.numel(),
        "held_out_tokens": held_out.numel(),
        "duplicates": len(both) - len(torch.unique(both, dim=0)),
        "vocabulary_coverage": round(len(torch.unique(train)) / vocabulary_size(model), 6),
        "leading_special_tokens": leading_special_tokens(tokenizer),
        "tokens_digest": tokens_digest(both),
        "tokenizer_digest": tokenizer_digest(tokenizer),
    }
