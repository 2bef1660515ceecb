"""eval-ppl: perplexity by a named protocol, with the loss of every window."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dbllm_cli.configs import EvalPplConfig
from dbllm_cli.errors import ConfigError, StageFailedError
from dbllm_cli.llm.models import Tokenizer, load_model, model_folder, require_positions
from dbllm_cli.llm.perplexity import (
    Window,
    full_windows,
    perplexity_of,
    strided_windows,
    window_losses,
)
from dbllm_cli.llm.text import (
    DOCUMENT_GAP,
    TextSource,
    tokenize,
    tokenizer_digest,
    tokens_digest,
    wikitext_rows,
    windows,
)
from dbllm_cli.llm.tokenizers import load_tokenizer
from dbllm_cli.records.calibration import open_calibration, require_same_tokenizer
from dbllm_cli.records.environment import environment_here
from dbllm_cli.records.evaluation import WINDOWS, ratio_standard_error
from dbllm_cli.records.metrics import EvalMetrics
from dbllm_cli.stages.context import Context, Result
from dbllm_cli.stages.spec import EVAL_PPL, implements
from dbllm_cli.store import Artifact
from dbllm_cli.store.json_file import write_json
from dbllm_cli.tensors import torch_dtype


@dataclass(frozen=True)
class _Protocol:
    """What is scored: `settings` and the token digest say whether two results may be compared."""

    what: str
    settings: dict[str, object]
    windows: list[Window]


@implements(EVAL_PPL)
def run(config: EvalPplConfig, inputs: Mapping[str, Artifact], ctx: Context) -> Result[EvalMetrics]:
    """Make the eval artifact: windows.json beside the metrics.

    Raises:
        ConfigError: too little text for one window, or too long a window.
        StageFailedError: a loss is not finite.
    """
    model = inputs["model"]
    folder = model_folder(model, ctx.work, ctx.trust_remote_code)
    tokenizer = load_tokenizer(folder, ctx.trust_remote_code)
    protocol = _protocol(config, inputs, tokenizer)
    longest = max(len(window.ids) for window in protocol.windows)
    require_positions(folder, longest, ctx.trust_remote_code)
    environment = environment_here(ctx.device, config.compute_dtype)
    dtype = torch_dtype(config.compute_dtype)
    loaded = load_model(folder, dtype, ctx.device, ctx.trust_remote_code)
    with ctx.progress.task("eval-ppl", len(protocol.windows), unit="windows") as task:
        losses = window_losses(loaded, protocol.windows, config.batch_size, task)
    tokens = [window.scored for window in protocol.windows]
    if not all(math.isfinite(loss) for loss in losses):
        raise StageFailedError(
            f"{folder} gives losses that are not finite", "evaluate with --compute-dtype float32"
        )
    write_json(ctx.out / WINDOWS, {"losses": losses, "tokens": tokens})
    return Result(_metrics(model.kind, protocol, losses, tokens, tokenizer), environment)


def _metrics(
    evaluated: str,
    protocol: _Protocol,
    losses: list[float],
    tokens: list[int],
    tokenizer: Tokenizer,
) -> EvalMetrics:
    data = tokens_digest(torch.cat([window.ids for window in protocol.windows]))
    own = tokenizer_digest(tokenizer)
    identity = {**protocol.settings, "tokens": data, "tokenizer": own}
    perplexity = perplexity_of(losses, tokens)
    return {
        "evaluated": evaluated,
        "what": protocol.what,
        "perplexity": perplexity if math.isfinite(perplexity) else None,
        "mean_loss": math.fsum(losses) / sum(tokens),
        "standard_error": ratio_standard_error(tuple(losses), tuple(tokens)),
        "windows": len(losses),
        "scored_tokens": sum(tokens),
        "data_digest": data,
        "tokenizer_digest": own,
        "protocol": protocol.settings,
        "comparable": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    }


def _protocol(
    config: EvalPplConfig, inputs: Mapping[str, Artifact], tokenizer: Tokenizer
) -> _Protocol:
    if config.text is None and config.dataset is None:
        return _held_out(config, inputs, tokenizer)
    name = (config.text or config.dataset or "").rstrip("/").rpartition("/")[2]
    source = TextSource(**config.text_settings())
    # What is asked for, or fits the source.
    fitting = "raw" if source.is_plain_text() else "wikitext-rows"
    reading = None if config.protocol == "documents" else config.reading or fitting
    stream = _stream(source, reading, tokenizer)
    length = config.sequence_length
    if config.protocol == "strided":
        cut = strided_windows(stream, length, config.stride) if len(stream) > 1 else []
    else:
        cut = full_windows(windows(stream, length))
    if not cut:
        raise ConfigError(
            f"{name} has {len(stream)} tokens: too short for one window of {length}",
            "give more text, or a smaller --sequence-length",
        )
    settings: dict[str, object] = {
        "name": config.protocol,
        "reading": reading,
        "sequence_length": length,
        "stride": config.stride if config.protocol == "strided" else None,
        "max_windows": config.max_windows,
        "compute_dtype": config.compute_dtype,
    }
    cut = cut[: config.max_windows]
    part = f" {config.documents}" if config.documents else ""
    what = f"{name}{part}, {config.protocol}, {len(cut)} windows of {length}"
    return _Protocol(what, settings, cut)


def _held_out(
    config: EvalPplConfig, inputs: Mapping[str, Artifact], tokenizer: Tokenizer
) -> _Protocol:
    require_same_tokenizer(inputs["calibration"], tokenizer_digest(tokenizer))
    sequences = open_calibration(inputs["calibration"]).held_out[: config.max_windows]
    if not len(sequences):
        raise ConfigError(
            f"{inputs['calibration'].path} has no held-out part",
            "calibrate with --held-out 8, or add --text FILE",
        )
    settings: dict[str, object] = {
        "name": "held-out",
        "sequence_length": sequences.shape[1],
        "compute_dtype": config.compute_dtype,
    }
    what = f"held-out part of the calibration, {len(sequences)} windows of {sequences.shape[1]}"
    return _Protocol(what, settings, full_windows(sequences))


def _stream(source: TextSource, reading: str | None, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the text, read that way; of its documents where `reading` is None."""
    if reading is None:
        bos = tokenizer.bos_token_id
        gap = tokenize(tokenizer, DOCUMENT_GAP, special=False) if bos is None else [bos]
        stream = [] if bos is None else [bos]
        for number, document in enumerate(source.read()):
            stream += (gap if number else []) + tokenize(tokenizer, document, special=False)
        return stream
    if reading == "raw":
        return tokenize(tokenizer, source.read_raw())
    rows = wikitext_rows(source.read_raw()) if source.is_plain_text() else source.read()
    return tokenize(tokenizer, DOCUMENT_GAP.join(rows))
