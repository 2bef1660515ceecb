import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dbllm_cli.errors import ConfigError, DbllmError
from dbllm_cli.store import Artifact
from tests.conftest import STORIES_TEXT, TEXT, Workshop
from tests.tiny_models import save_model

SHORT: dict[str, Any] = {"sequence_length": 16, "reading": "raw"}


def token_losses(folder: Path, ids: list[int]) -> torch.Tensor:
    """−ln p of every token of one window but its first."""
    window = torch.tensor([ids])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(window).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="none")


def tokenized(folder: Path, text: str, *, special: bool = True) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=special)[
        "input_ids"
    ]
    return ids


def windows_of(artifact: Artifact) -> dict[str, list[float]]:
    content: dict[str, list[float]] = json.loads((artifact.path / "windows.json").read_text())
    return content


def test_gptq_windows_lie_side_by_side_and_the_tail_is_dropped(
    workshop: Workshop, llama: Artifact, llama_folder: Path, text_file: Path
) -> None:
    outcome = workshop.run("eval-ppl", {"model": llama}, text=str(text_file), **SHORT)
    stream = tokenized(llama_folder, TEXT * 8)
    count = len(stream) // 16
    expected = [
        float(token_losses(llama_folder, stream[i * 16 : i * 16 + 16]).sum()) for i in range(count)
    ]
    stored = windows_of(outcome.artifact)
    assert stream[0] == 1
    assert len(stream) % 16
    assert stored["losses"] == pytest.approx(expected, rel=1e-4)
    assert stored["tokens"] == [15] * count
    mean = sum(expected) / (15 * count)
    assert outcome.metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert outcome.metrics["windows"] == count


def test_strided_scores_every_token_once(
    workshop: Workshop, llama: Artifact, llama_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "strided.txt"
    path.write_text(TEXT[:40])
    artifact = workshop.make(
        "eval-ppl", {"model": llama}, text=str(path), protocol="strided", stride=10, **SHORT
    )
    stream = tokenized(llama_folder, TEXT[:40])
    assert len(stream) == 41
    spans = [(0, 16, 15), (10, 26, 10), (20, 36, 10), (30, 41, 5)]
    stored = windows_of(artifact)
    assert stored["tokens"] == [scored for _, _, scored in spans]
    expected = [
        float(token_losses(llama_folder, stream[start:stop])[-scored:].sum())
        for start, stop, scored in spans
    ]
    assert stored["losses"] == pytest.approx(expected, rel=1e-4)


def test_a_stride_that_would_leave_tokens_out_is_refused(
    workshop: Workshop, llama: Artifact, text_file: Path
) -> None:
    with pytest.raises((ConfigError, ValidationError)):
        workshop.make(
            "eval-ppl",
            {"model": llama},
            text=str(text_file),
            protocol="strided",
            stride=17,
            **SHORT,
        )


def test_documents_are_joined_each_after_a_start_token(
    workshop: Workshop, llama: Artifact, llama_folder: Path, tmp_path: Path
) -> None:
    documents = ["The first document.", "A second, longer document.", "The third."]
    path = tmp_path / "documents.txt"
    path.write_text("<|endoftext|>".join(documents))
    artifact = workshop.make(
        "eval-ppl", {"model": llama}, text=str(path), protocol="documents",
        separator="<|endoftext|>", sequence_length=16,
    )  # fmt: skip
    stream = [
        token
        for document in documents
        for token in [1, *tokenized(llama_folder, document, special=False)]
    ]
    expected = [
        float(token_losses(llama_folder, stream[i : i + 16]).sum())
        for i in range(0, len(stream) - 15, 16)
    ]
    assert windows_of(artifact)["losses"] == pytest.approx(expected, rel=1e-4)


def test_wikitext_rows_are_joined_by_two_newlines(
    workshop: Workshop, llama: Artifact, tmp_path: Path
) -> None:
    rows = ["", " = Title = \n", "", " A paragraph of some length . \n", ""]
    as_file, as_rows, joined = (
        tmp_path / name for name in ("wiki.raw", "rows.jsonl", "joined.txt")
    )
    as_file.write_text("".join(row or " \n" for row in rows))
    as_rows.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    joined.write_text("\n\n".join(rows))
    settings = {"sequence_length": 8}
    digests = [
        workshop.run("eval-ppl", {"model": llama}, text=str(path), reading=reading, **settings)
        .metrics["data_digest"]
        for path, reading in (
            (as_file, "wikitext-rows"), (as_rows, "wikitext-rows"), (joined, "raw"),
            (as_file, "raw"), (as_file, None), (as_rows, None),
        )
    ]  # fmt: skip
    assert digests[0] == digests[1] == digests[2] != digests[3]
    # Where nothing is said a text file is read as it is, and rows are joined.
    assert digests[4:] == [digests[3], digests[1]]


def test_batches_change_nothing_but_the_time(
    workshop: Workshop, llama: Artifact, text_file: Path
) -> None:
    alone, together = (
        windows_of(
            workshop.make(
                "eval-ppl", {"model": llama}, text=str(text_file), batch_size=size,
                protocol="strided", stride=8, **SHORT,
            )
        )
        for size in (1, 5)
    )  # fmt: skip
    assert alone["tokens"] == together["tokens"]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_max_windows_takes_the_first(workshop: Workshop, llama: Artifact, text_file: Path) -> None:
    text = str(text_file)
    all_windows = workshop.make("eval-ppl", {"model": llama}, text=text, **SHORT)
    first = workshop.make("eval-ppl", {"model": llama}, text=text, max_windows=3, **SHORT)
    assert windows_of(first)["losses"] == windows_of(all_windows)["losses"][:3]


def test_fdb_and_packed_agree_and_differ_from_the_model(
    workshop: Workshop, llama: Artifact, start: Artifact, text_file: Path
) -> None:
    packed = workshop.make("pack", {"fdb": start})
    results = [
        windows_of(workshop.make("eval-ppl", {"model": model}, text=str(text_file), **SHORT))
        for model in (llama, start, packed)
    ]
    assert results[1]["losses"] == pytest.approx(results[2]["losses"], rel=1e-6)
    assert results[0]["losses"] != pytest.approx(results[1]["losses"], rel=1e-3)


def test_the_held_out_part_of_the_calibration_is_read_without_text(
    workshop: Workshop, llama: Artifact, llama_folder: Path, calibration: Artifact
) -> None:
    outcome = workshop.run("eval-ppl", {"model": llama, "calibration": calibration})
    rows = load_file(calibration.path / "tokens.safetensors")["held_out"].tolist()
    expected = [float(token_losses(llama_folder, row).sum()) for row in rows]
    assert windows_of(outcome.artifact)["losses"] == pytest.approx(expected, rel=1e-4)
    assert outcome.metrics["protocol"]["name"] == "held-out"


def test_too_short_a_text_is_told(workshop: Workshop, llama: Artifact, text_file: Path) -> None:
    with pytest.raises(ConfigError, match="too short for one window of 10000"):
        workshop.make("eval-ppl", {"model": llama}, text=str(text_file), sequence_length=10_000)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_windows_longer_than_the_models_positions_are_refused(
    workshop: Workshop, text_file: Path, tmp_path: Path, family: str
) -> None:
    model = workshop.model(save_model(tmp_path / family, family))
    with pytest.raises(ConfigError, match="64 positions"):
        workshop.make("eval-ppl", {"model": model}, text=str(text_file), sequence_length=65)


def test_nothing_to_read_is_told(workshop: Workshop, llama: Artifact) -> None:
    with pytest.raises(ConfigError, match="no text, no dataset and no calibration"):
        workshop.make("eval-ppl", {"model": llama})
    without = workshop.calibrate(llama, held_out=0)
    with pytest.raises(ConfigError, match="no held-out part"):
        workshop.make("eval-ppl", {"model": llama, "calibration": without})


def test_a_model_that_gives_no_numbers_is_told(
    fresh: Workshop, llama: Artifact, text_file: Path, tmp_path: Path
) -> None:
    from tests.test_bad_input import with_changed_tensor

    folder = with_changed_tensor(llama.path, tmp_path / "nan", "model.norm.weight", math.nan)
    with pytest.raises(DbllmError) as caught:
        fresh.make("eval-ppl", {"model": fresh.model(folder)}, text=str(text_file), **SHORT)
    assert "please report" not in caught.value.hint


@pytest.mark.shared_data
def test_the_teacher_stories260k_has_its_published_perplexity(
    workshop: Workshop, stories: Artifact
) -> None:
    metrics = workshop.run(
        "eval-ppl", {"model": stories}, text=str(STORIES_TEXT), protocol="documents",
        separator="<|endoftext|>", sequence_length=512, batch_size=8,
    ).metrics  # fmt: skip
    assert metrics["perplexity"] == pytest.approx(4.662, abs=0.002)


def test_without_a_start_token_two_newlines_part_documents(
    workshop: Workshop, llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    (tmp_path / "documents.txt").write_text("One document.|Another one.")
    (tmp_path / "joined.txt").write_text("One document.\n\nAnother one.")
    digests = [
        workshop.run(
            "eval-ppl", {"model": workshop.model(folder)}, text=str(tmp_path / name),
            protocol="documents", separator=separator, sequence_length=8,
        ).metrics["data_digest"]
        for name, separator in (("documents.txt", "|"), ("joined.txt", None))
    ]  # fmt: skip
    assert digests[0] == digests[1]
