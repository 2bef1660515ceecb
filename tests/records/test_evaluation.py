import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dbllm_cli.errors import ConfigError
from dbllm_cli.records.evaluation import (
    WINDOWS,
    EvalResult,
    comparable_groups,
    paired_difference,
    ratio_standard_error,
)
from dbllm_cli.store import Artifact
from dbllm_cli.store.manifest import build_manifest
from tests.conftest import TEXT, Workshop
from tests.stages.test_eval_ppl import SHORT


def _result(
    losses: tuple[float, ...], tokens: tuple[int, ...], comparable: str = "same", model: str = "m"
) -> EvalResult:
    return EvalResult(model, "fdb", f"wiki, gptq of {comparable}", comparable, 1.0, losses, tokens)


def _artifact(folder: Path, **changes: Any) -> Artifact:
    metrics = {"evaluated": "packed", "what": "wiki, gptq", "comparable": "abc", "perplexity": 4.5}
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    (folder / WINDOWS).write_text(json.dumps({"losses": [1.5, 2.5], "tokens": [1, 2]}))
    inputs = {"model": "0123456789abcdef"}
    lineage = {"stage": "eval-ppl", "stage_version": 1, "config": {}, "inputs": inputs}
    return Artifact(folder, "eval", "d" * 64, build_manifest(folder, "eval", lineage, {}))


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


def test_held_out_parts_of_other_lengths_are_never_compared(
    workshop: Workshop, llama: Artifact, text_file: Path
) -> None:
    """The same tokens, in two windows of 24 and in one of 48."""
    parts = [
        workshop.calibrate(
            llama, source="text", text=str(text_file),
            num_samples=144 // length, held_out=48 // length, sequence_length=length,
        )
        for length in (24, 48)
    ]  # fmt: skip
    results = [
        EvalResult.read(workshop.make("eval-ppl", {"model": llama, "calibration": part}))
        for part in parts
    ]
    assert len(comparable_groups(results)) == 2


def test_results_of_one_protocol_and_data_get_a_paired_standard_error(
    workshop: Workshop, llama: Artifact, start: Artifact, text_file: Path
) -> None:
    teacher, student = (
        EvalResult.read(workshop.make("eval-ppl", {"model": model}, text=str(text_file), **SHORT))
        for model in (llama, start)
    )
    difference, error = paired_difference(student, teacher)
    assert difference == pytest.approx(math.log(student.perplexity / teacher.perplexity))
    pairs = torch.tensor(student.losses, dtype=torch.float64) - torch.tensor(teacher.losses)
    assert error == pytest.approx(float(pairs.div(15).std() / len(pairs) ** 0.5), rel=1e-4)
    assert 0 < error < max(teacher.standard_error, student.standard_error)


@pytest.mark.parametrize(
    "other",
    [
        {"protocol": "strided", "stride": 8},
        {"protocol": "documents", "reading": None},
        {"sequence_length": 15},
        {"max_windows": 2},
        {"compute_dtype": "bfloat16"},
        {"text": "another"},
    ],
    ids=lambda other: "-".join(map(str, other.values())),
)
def test_every_setting_and_the_text_itself_make_results_incomparable(
    workshop: Workshop, llama: Artifact, text_file: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    if "text" in other:
        (tmp_path / "another.txt").write_text(TEXT[5:] * 8)
        other = {"text": str(tmp_path / "another.txt")}
    settings = [{"text": str(text_file)} | SHORT, {"text": str(text_file)} | SHORT | other]
    first, second = (
        EvalResult.read(workshop.make("eval-ppl", {"model": llama}, **chosen))
        for chosen in settings
    )
    assert comparable_groups([first, second]) == [[first], [second]]
    with pytest.raises(ConfigError, match="different protocol or data"):
        paired_difference(first, second)


def test_one_text_under_two_names_is_the_same_data(
    workshop: Workshop, fresh: Workshop, llama: Artifact, text_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    results = [
        EvalResult.read(shop.make("eval-ppl", {"model": llama}, text=str(path), **SHORT))
        for shop, path in ((workshop, text_file), (fresh, copy))
    ]
    assert paired_difference(*results) == (0, 0)
