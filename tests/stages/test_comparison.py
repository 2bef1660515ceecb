import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbllm_cli.errors import ConfigError
from dbllm_cli.stages.comparison import (
    WINDOWS,
    EvalResult,
    comparable_groups,
    paired_difference,
    ratio_standard_error,
)
from dbllm_cli.store import Artifact


def _result(
    losses: tuple[float, ...], tokens: tuple[int, ...], comparable: str = "same", model: str = "m"
) -> EvalResult:
    return EvalResult(model, "fdb", f"wiki, gptq of {comparable}", comparable, 1.0, losses, tokens)


def _artifact(folder: Path, **changes: Any) -> Artifact:
    metrics = {"evaluated": "packed", "what": "wiki, gptq", "comparable": "abc", "perplexity": 4.5}
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    (folder / WINDOWS).write_text(json.dumps({"losses": [1.5, 2.5], "tokens": [1, 2]}))
    manifest = {"lineage": {"inputs": {"model": "0123456789abcdef"}}}
    return Artifact(folder, "eval", "d" * 64, manifest)


def test_an_eval_artifact_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = EvalResult.read(_artifact(tmp_path))
    assert result == EvalResult(
        "0123456789ab", "packed", "wiki, gptq", "abc", 4.5, (1.5, 2.5), (1, 2)
    )


def test_a_perplexity_too_large_for_json_reads_as_infinite(tmp_path: Path) -> None:
    assert EvalResult.read(_artifact(tmp_path, perplexity=None)).perplexity == math.inf


def test_windows_of_equal_length_have_the_textbook_standard_error() -> None:
    losses = np.random.default_rng(0).normal(30.0, 4.0, 12)
    expected = np.std(losses / 10, ddof=1) / math.sqrt(12)
    assert ratio_standard_error(tuple(losses), (10,) * 12) == pytest.approx(expected)
    assert _result(tuple(losses), (10,) * 12).standard_error == pytest.approx(expected)


def test_the_standard_error_covers_windows_of_unequal_length() -> None:
    """Against the spread of the mean loss over many draws of windows."""
    draw = np.random.default_rng(1)

    def windows() -> tuple[tuple[float, ...], tuple[int, ...]]:
        tokens = draw.integers(5, 50, 60)
        losses = tokens * draw.normal(3.0, 0.5, 60)
        return tuple(losses.tolist()), tuple(tokens.tolist())

    draws = [windows() for _ in range(2000)]
    spread = np.std([sum(losses) / sum(tokens) for losses, tokens in draws])
    estimated = np.mean([ratio_standard_error(*one) for one in draws])
    assert estimated == pytest.approx(spread, rel=0.1)


def test_a_single_window_has_no_standard_error() -> None:
    assert ratio_standard_error((3.0,), (2,)) == 0.0


def test_the_paired_difference_is_of_mean_losses_with_the_error_of_the_differences() -> None:
    draw = np.random.default_rng(0)
    common = draw.normal(100.0, 30.0, 20)
    first, second = common + draw.normal(5, 1, 20), common
    tokens = (10,) * 20
    mean, error = paired_difference(_result(tuple(first), tokens), _result(tuple(second), tokens))
    differences = (first - second) / 10
    assert mean == pytest.approx(differences.mean())
    assert error == pytest.approx(differences.std(ddof=1) / math.sqrt(20))
    assert error < 0.1 * _result(tuple(first), tokens).standard_error
    assert (
        paired_difference(_result(tuple(second), tokens), _result(tuple(first), tokens))[0] == -mean
    )


def test_results_of_different_protocol_or_data_are_never_compared() -> None:
    with pytest.raises(ConfigError, match="different protocol or data") as raised:
        paired_difference(_result((1.0,), (1,), "wiki"), _result((1.0,), (1,), "c4"))
    assert "of wiki" in raised.value.message
    assert "of c4" in raised.value.message
    assert "dbllm eval-ppl" in raised.value.hint


def test_only_comparable_results_are_put_together_in_the_order_given() -> None:
    results = [
        _result((1.0,), (1,), comparable, str(number))
        for number, comparable in enumerate(("wiki", "c4", "wiki", "stories"))
    ]
    groups = comparable_groups(results)
    assert [[result.model for result in group] for group in groups] == [["0", "2"], ["1"], ["3"]]
