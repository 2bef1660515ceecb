from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.errors import ConfigError
from dbllm_cli.store import Artifact
from tests.conftest import Workshop


def test_the_model_card_holds_the_figures_each_protocol_in_a_table_of_its_own(
    workshop: Workshop, start: Artifact, llama: Artifact, text_file: Path
) -> None:
    short: dict[str, Any] = {"text": str(text_file), "sequence_length": 16, "max_windows": 4}
    evals = [
        workshop.run("eval-ppl", {"model": model}, **(short | settings))
        for settings in ({}, {"protocol": "strided", "stride": 8}, {"max_windows": 3})
        for model in (llama, start)
    ]
    inputs = {f"evals.{number}": outcome.artifact for number, outcome in enumerate(evals)}
    outcome = workshop.run("pack", {"fdb": start, **inputs})
    card = (outcome.artifact.path / "README.md").read_text()
    parts = card.split("## Perplexity: ")[1:]
    assert len(parts) == 3
    for part, two in zip(parts, (evals[0:2], evals[2:4], evals[4:6]), strict=True):
        rows = [line for line in part.splitlines() if line.startswith(("| teacher", "| this"))]
        assert part.startswith(two[0].metrics["what"])
        names = (f"| teacher model `{llama.digest[:12]}` |", f"| this fdb `{start.digest[:12]}` |")
        for result, row, name in zip(two, rows, names, strict=True):
            assert row.startswith(f"{name} {result.metrics['perplexity']:.3f} |")
    assert f"{outcome.metrics['bits_per_quantized_weight']} bits per quantized weight" in card
    assert '"stage": "init-fdb"' in card
    assert "2 bits" not in card
    assert "import dbllm_cli.hf" in card


def test_figures_of_other_models_alone_are_refused(
    workshop: Workshop, start: Artifact, llama: Artifact, text_file: Path
) -> None:
    short: dict[str, Any] = {"text": str(text_file), "sequence_length": 16, "max_windows": 4}
    other = workshop.make("init-fdb", {"model": llama}, method="mse", levels="plain", group_size=8)
    assert other.digest != start.digest
    evals = [workshop.make("eval-ppl", {"model": model}, **short) for model in (other, start)]
    with pytest.raises(ConfigError, match=rf"of fdb {other.digest[:12]} alone, not of"):
        workshop.make("pack", {"fdb": start, "evals.0": evals[0]})
    both = workshop.make("pack", {"fdb": start, "evals.0": evals[0], "evals.1": evals[1]})
    assert f"| another fdb `{other.digest[:12]}` |" in (both.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"format": "dense"}, "all weights in bfloat16"), ({"embeddings": "int8"}, "in 8 bits")],
)
def test_a_card_tells_what_was_rounded_after_its_figures(
    workshop: Workshop, start: Artifact, text_file: Path, settings: dict[str, str], what: str
) -> None:
    figures = workshop.make("eval-ppl", {"model": start}, text=str(text_file), sequence_length=16)
    for evals, tells in (({"evals.0": figures}, True), ({}, False)):
        packed = workshop.make("pack", {"fdb": start, **evals}, **settings)
        lines = (packed.path / "README.md").read_text().splitlines()
        (line,) = (line for line in lines if what in line)
        assert ("from before that" in line) is tells
