"""Which evaluations may stand side by side, and by how much they differ. Imports no torch."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from dbllm_cli.errors import ConfigError
from dbllm_cli.store import Artifact

WINDOWS = "windows.json"


@dataclass(frozen=True)
class EvalResult:
    """One eval artifact.

    Attributes:
        model: digest of what was evaluated, 12 digits.
        kind: model, fdb or packed.
        what: protocol and data, for people.
        comparable: digest of protocol, data and tokenizer; only equal ones are compared.
        perplexity: exp of the token-weighted mean loss.
        losses: sum of −ln p of each window.
        tokens: scored tokens of each window.
    """

    model: str
    kind: str
    what: str
    comparable: str
    perplexity: float
    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def read(cls, artifact: Artifact) -> "EvalResult":
        """Read an eval artifact."""
        content = json.loads((artifact.path / WINDOWS).read_text())
        metrics = json.loads((artifact.path / "metrics.json").read_text())
        return cls(
            artifact.manifest["lineage"]["inputs"]["model"][:12],
            metrics["evaluated"],
            metrics["what"],
            metrics["comparable"],
            metrics["perplexity"] if metrics["perplexity"] is not None else math.inf,
            tuple(content["losses"]),
            tuple(content["tokens"]),
        )

    @property
    def standard_error(self) -> float:
        """Standard error of the mean loss over windows (nats); 0 for a single window."""
        return ratio_standard_error(self.losses, self.tokens)


def comparable_groups(results: Iterable[EvalResult]) -> list[list[EvalResult]]:
    """Results of the same protocol, data and tokenizer together, in the order given."""
    groups: dict[str, list[EvalResult]] = {}
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


def ratio_standard_error(losses: tuple[float, ...], tokens: tuple[int, ...]) -> float:
    """Standard error of sum(losses) / sum(tokens) over windows, by the ratio estimator."""
    count = len(losses)
    if count < 2:
        return 0.0
    mean = math.fsum(losses) / sum(tokens)
    squares = math.fsum((loss - mean * n) ** 2 for loss, n in zip(losses, tokens, strict=True))
    return math.sqrt(squares / (count - 1) * count) / sum(tokens)
