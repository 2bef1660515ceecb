"""What metrics.json of each kind of artifact holds. Imports no torch."""

from typing import TypedDict


class CalibrationMetrics(TypedDict):
    """Of `calibration`. Digests are hex sha256, of all token ids and of the vocabulary."""

    tokens: int
    held_out_tokens: int
    duplicates: int
    vocabulary_coverage: float
    leading_special_tokens: list[int]
    tokens_digest: str
    tokenizer_digest: str


class LayerMetrics(TypedDict):
    """Of every `fdb`: figures over all quantized layers, weighted by their size."""

    layers: int
    weights: int
    relative_error: float
    zeros_b1: float
    zeros_b2: float
    zeros_both: float
    bits_per_weight: float


class GptqMetrics(LayerMetrics):
    """Of an `fdb` of init-fdb by gptq: the relative error of every block's output."""

    blocks: list[dict[str, float]]


InitFdbMetrics = LayerMetrics | GptqMetrics
"""Of an `fdb` of init-fdb."""


class ReconstructMetrics(LayerMetrics):
    """Of an `fdb` of reconstruct: relative errors of the blocks' outputs before and after."""

    blocks: list[dict[str, float]]
    mean_error: float


class TrainingMetrics(TypedDict):
    """How a run of distill went. Losses in nats per token; None without a held-out part."""

    steps: int
    best_step: int
    held_out_loss_start: float | None
    held_out_loss: float | None
    training_loss: float | None


class DistillMetrics(LayerMetrics, TrainingMetrics):
    """Of an `fdb` of distill."""


class PackMetrics(TypedDict):
    """Of `packed`."""

    format: str
    embeddings: str
    levels: str
    weight_bytes: int
    quantized_weights: int
    bits_per_quantized_weight: float


class EvalMetrics(TypedDict):
    """Of `eval`. `perplexity` is None where it overflows; losses in nats per token."""

    evaluated: str
    what: str
    perplexity: float | None
    mean_loss: float
    standard_error: float
    windows: int
    scored_tokens: int
    data_digest: str
    tokenizer_digest: str
    protocol: dict[str, object]
    comparable: str


class TasksMetrics(TypedDict):
    """Of `tasks`: accuracies with standard errors, by task and over all tasks."""

    evaluated: str
    what: str
    mean_acc: float
    mean_acc_standard_error: float
    items: int
    tasks: dict[str, dict[str, float | str]]
    comparable: str


class Spread(TypedDict):
    """Seconds over the repeats."""

    median: float
    fastest: float
    slowest: float


class SpeedMetrics(TypedDict):
    """Of one model in `bench`."""

    prefill_seconds: Spread
    decode_seconds: Spread
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    peak_memory_mib: float


class BenchMetrics(TypedDict):
    """Of `bench`: both models, their ratios, and the paper's count of operations."""

    device: str
    processor: str
    threads: int
    kernel: str
    dense: SpeedMetrics
    packed: SpeedMetrics
    packed_over_dense: dict[str, float]
    accounting: dict[str, float]
