"""The loss of reconstruct: relative errors of a block's output, by what predictions feel."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sensitivity:
    """How much a model's predictions change with a small relative change of a block's output.

    Attributes:
        directions: the Fisher matrix, every position counting alike, float32 `[hidden, hidden]`.
        positions: trace of the Fisher matrix of each position, float32 `[tokens]`.
    """

    directions: Tensor
    positions: Tensor


@dataclass(frozen=True)
class ErrorMetric:
    """How the relative errors of a block's output count.

    Attributes:
        directions: float32 `[hidden, hidden]`, its mean eigenvalue 1.
        positions: float32 `[tokens]`, their mean 1.
    """

    directions: Tensor
    positions: Tensor


def error_metric(
    sensitivity: Sensitivity, direction_power: float, position_power: float
) -> ErrorMetric:
    """The metric of a block's output errors: its sensitivity to a power.

    The whole would say what a small error of this block alone costs. Errors are large and later
    blocks train on what they leave: a root, less far from weighing all alike, serves better.

    Args:
        sensitivity: of the block's output; not negative.
        direction_power: 0 weighs all directions alike.
        position_power: 0 weighs all positions alike.
    """
    values, vectors = torch.linalg.eigh(sensitivity.directions)
    directions = (vectors * _power(values, direction_power)) @ vectors.T
    return ErrorMetric(directions, _power(sensitivity.positions, position_power))


def _power(values: Tensor, power: float) -> Tensor:
    """To the power, with the mean 1; what is next to nothing counts as a little."""
    raised = values.clamp(min=max(1e-6 * float(values.mean()), 1e-30)) ** power
    return raised / raised.mean()


def relative_token_error(
    output: Tensor, target: Tensor, metric: ErrorMetric | None = None
) -> Tensor:
    """Mean over tokens of ‖output − target‖² / ‖target‖², or of the same in the metric.

    A plain mean square serves the first token alone: its hidden state is so large in LLaMA-like
    models that it is nearly all of the error. Alike, it would be one of many: as all others attend
    to it, predictions feel its relative error a thousand times as much.

    Args:
        output: a block's output `[batch, tokens, hidden]`.
        target: the full-precision block's output, the same shape.
        metric: all errors count alike when absent.

    Returns:
        float32 scalar.
    """
    target = target.to(torch.float32)
    error = output.to(torch.float32) - target
    measured = error if metric is None else error @ metric.directions
    errors = (error * measured).sum(-1) / target.square().sum(-1).clamp(min=1e-12)
    return (errors if metric is None else errors * metric.positions).mean()
