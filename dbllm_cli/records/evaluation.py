"""Which evaluations may stand side by side, and by how much they differ. Imports no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, RootModel, ValidationError

from dbllm_cli.errors import ArtifactCorruptError, ConfigError
from dbllm_cli.store import Artifact, read_object

WINDOWS = "windows.json"
ITEMS = "items.json"


@dataclass(frozen=True)
class _Result:
    """What was evaluated, and how.

    Attributes:
        model: digest of what was evaluated, 12 digits.
        kind: model, fdb or packed.
        what: data and settings, for people.
        comparable: digest of data and settings; only equal ones are compared.
    """

    model: str
    kind: str
    what: str
    comparable: str


class _Metrics(BaseModel):
    """What metrics.json holds of every evaluation; of other kinds the perplexity is missing."""

    evaluated: str
    what: str
    comparable: str
    perplexity: float | None = None


class _Windows(BaseModel):
    losses: tuple[float, ...]
    tokens: tuple[int, ...]


_Scores = RootModel[dict[str, dict[str, tuple[float, ...]]]]
_Content = TypeVar("_Content", bound=BaseModel)


def _read(artifact: Artifact, name: str, content: type[_Content]) -> _Content:
    try:
        return content.model_validate(read_object(artifact, name))
    except ValidationError as error:
        raise ArtifactCorruptError(
            f"{name} of {artifact.path} is not that of an evaluation", "evaluate again"
        ) from error


def _common(artifact: Artifact, metrics: _Metrics) -> tuple[str, str, str, str]:
    """The fields of `_Result`."""
    model = artifact.record.lineage.inputs.get("model", "")
    return model[:12], metrics.evaluated, metrics.what, metrics.comparable


@dataclass(frozen=True)
class EvalResult(_Result):
    """One eval artifact.

    Attributes:
        perplexity: exp of the token-weighted mean loss.
        losses: sum of −ln p of each window.
        tokens: scored tokens of each window.
    """

    perplexity: float
    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def read(cls, artifact: Artifact) -> "EvalResult":
        """Read an eval artifact.

        Raises:
            ArtifactCorruptError: it is damaged.
        """
        windows = _read(artifact, WINDOWS, _Windows)
        metrics = _read(artifact, "metrics.json", _Metrics)
        perplexity = metrics.perplexity if metrics.perplexity is not None else math.inf
        return cls(*_common(artifact, metrics), perplexity, windows.losses, windows.tokens)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean loss over windows (nats); 0 for a single window."""
        return ratio_standard_error(self.losses, self.tokens)


@dataclass(frozen=True)
class TasksResult(_Result):
    """One tasks artifact.

    Attributes:
        scores: task -> metric (acc, acc_norm) -> score of every item, 0 or 1.
    """

    scores: Mapping[str, Mapping[str, tuple[float, ...]]]

    @classmethod
    def read(cls, artifact: Artifact) -> "TasksResult":
        """Read a tasks artifact.

        Raises:
            ArtifactCorruptError: it is damaged.
        """
        scores = _read(artifact, ITEMS, _Scores).root
        return cls(*_common(artifact, _read(artifact, "metrics.json", _Metrics)), scores)


Result = TypeVar("Result", bound=_Result)


def comparable_groups(results: Iterable[Result]) -> list[list[Result]]:
    """Results of the same settings and data together, in the order given."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.comparable, []).append(result)
    return list(groups.values())


def paired_difference(first: EvalResult, second: EvalResult) -> tuple[float, float]:
    """Difference of mean loss, first − second (nats), and its paired standard error.

    Raises:
        ConfigError: the two are of different protocol or data.
    """
    if first.comparable != second.comparable:
        raise ConfigError(
            f"'{first.what}' and '{second.what}' are of different protocol or data",
            "evaluate both with the same settings: dbllm eval-ppl",
        )
    pairs = zip(first.losses, second.losses, strict=True)
    differences = tuple(a - b for a, b in pairs)
    mean = math.fsum(differences) / sum(first.tokens)
    return mean, ratio_standard_error(differences, first.tokens)


def ratio_standard_error(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """Standard error of sum(losses) / sum(tokens) over windows, by the ratio estimator."""
    count = len(losses)
    if count < 2:
        return 0.0
    mean = math.fsum(losses) / sum(tokens)
    squares = math.fsum((loss - mean * n) ** 2 for loss, n in zip(losses, tokens, strict=True))
    return math.sqrt(squares / (count - 1) * count) / sum(tokens)


def accuracy(scores: Sequence[float]) -> tuple[float, float]:
    """Mean score, and its standard error over items."""
    return math.fsum(scores) / len(scores), ratio_standard_error(scores, (1,) * len(scores))


def paired_accuracy(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Difference of accuracy on the same items, first − second, and its paired standard error."""
    differences = tuple(a - b for a, b in zip(first, second, strict=True))
    return accuracy(differences)
