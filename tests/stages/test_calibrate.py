import json
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dbllm_cli.errors import ConfigError
from dbllm_cli.store import Artifact
from dbllm_cli.tensors import TensorFolder
from tests.conftest import Workshop
from tests.stages.conftest import KilledAndResumed
from tests.test_bad_input import with_changed_tensor
from tests.tiny_models import VOCABULARY


def tokens(artifact: Artifact, part: str = "train") -> torch.Tensor:
    return load_file(artifact.path / "tokens.safetensors")[part].long()


def test_generated_sequences_begin_as_the_tokenizer_begins_a_text(calibration: Artifact) -> None:
    train, held_out = tokens(calibration), tokens(calibration, "held_out")
    assert (train.shape, held_out.shape) == ((6, 24), (3, 24))
    assert (torch.cat((train, held_out))[:, 0] == 1).all()
    assert len(torch.unique(train[:, 1])) > 1
    assert train.max() < VOCABULARY
    assert not {tuple(row.tolist()) for row in train} & {tuple(r.tolist()) for r in held_out}


def test_its_figures_are_those_of_its_tokens(workshop: Workshop, llama: Artifact) -> None:
    outcome = workshop.run(
        "calibrate", {"model": llama}, num_samples=5, held_out=2, sequence_length=16
    )
    train = tokens(outcome.artifact)
    assert outcome.metrics["tokens"] == 80
    assert outcome.metrics["held_out_tokens"] == 32
    assert outcome.metrics["duplicates"] == 0
    assert outcome.metrics["leading_special_tokens"] == [1]
    coverage = len(set(train.flatten().tolist())) / VOCABULARY
    assert outcome.metrics["vocabulary_coverage"] == pytest.approx(coverage, abs=1e-6)


def test_greedy_tokens_are_the_teachers_likeliest(
    workshop: Workshop, llama: Artifact, llama_folder: Path
) -> None:
    train = tokens(workshop.calibrate(llama, greedy_tokens=5))
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        likeliest = model(train).logits.argmax(-1)
    greedy = train[:, 2:7] == likeliest[:, 1:6]
    assert greedy.all()
    assert not (train[:, 7:] == likeliest[:, 6:-1]).all()


def test_top_k_of_one_is_greedy_throughout(
    workshop: Workshop, llama: Artifact, llama_folder: Path
) -> None:
    train = tokens(workshop.calibrate(llama, top_k=1, greedy_tokens=0))
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        assert (model(train).logits.argmax(-1)[:, 1:-1] == train[:, 2:]).all()


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(
    workshop: Workshop, fresh: Workshop, llama: Artifact, calibration: Artifact
) -> None:
    assert fresh.calibrate(llama).digest == calibration.digest
    other = workshop.calibrate(llama, seed=1)
    assert not torch.equal(tokens(other), tokens(calibration))


def test_the_global_seed_is_untouched(fresh: Workshop, llama: Artifact) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fresh.calibrate(llama, num_samples=2, held_out=0, sequence_length=8)
    assert torch.equal(torch.rand(4), expected)


def test_text_is_cut_in_order_with_a_start_token_before_each_document(
    workshop: Workshop, llama: Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "documents.txt"
    path.write_text("abc|defgh|ijklmnopqrstuvwxyz")
    artifact = workshop.calibrate(
        llama, source="text", text=str(path), separator="|", num_samples=2, held_out=1,
        sequence_length=8,
    )  # fmt: skip
    stream = torch.cat((tokens(artifact), tokens(artifact, "held_out"))).flatten().tolist()
    assert [place for place, token in enumerate(stream) if token == 1] == [0, 4, 10]
    a = stream[1]
    assert [token - a for token in stream if token != 1] == list(range(21))


def test_a_document_is_the_same_in_text_jsonl_and_parquet(
    workshop: Workshop, llama: Artifact, tmp_path: Path
) -> None:
    documents = ["left out", "one document", "another document", "left out too"]
    (tmp_path / "a.txt").write_text("#".join(documents))
    lines = [json.dumps({"body": document}) for document in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    parquet.write_table(pyarrow.table({"body": documents}), tmp_path / "a.parquet")
    read = [
        tokens(
            workshop.calibrate(
                llama, source="text", text=str(tmp_path / name), text_field="body", separator="#",
                documents="1:3", num_samples=3, held_out=0, sequence_length=10,
            )
        )
        for name in ("a.txt", "a.jsonl", "a.parquet")
    ]  # fmt: skip
    assert read[0][0, 0] == 1
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])


def test_the_statistics_are_mean_squares_weighted_per_token(
    calibration: Artifact, llama_folder: Path
) -> None:
    statistics = load_file(calibration.path / "statistics.safetensors")
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    entering: list[torch.Tensor] = []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        hidden = model(tokens(calibration), output_hidden_states=True).hidden_states[1]
    weights = 1 / hidden.square().mean(-1, keepdim=True)
    expected = (entering[0].square() * weights).sum((0, 1)) / weights.sum()
    torch.testing.assert_close(
        statistics["model.layers.0.mlp.down_proj"], expected, rtol=1e-4, atol=1e-6
    )
    assert len(statistics) == 14


def test_a_sequence_longer_than_the_models_positions_is_refused(
    workshop: Workshop, llama: Artifact
) -> None:
    with pytest.raises(ConfigError, match=r"65 tokens .* 64 positions"):
        workshop.calibrate(llama, sequence_length=65)


def test_killed_while_generating_it_ends_with_the_same_bytes(
    killed_and_resumed: KilledAndResumed, llama: Artifact, calibration: Artifact
) -> None:
    resumed = killed_and_resumed(
        "calibrate", {"model": llama}, ".scratch/*/generated-000004.safetensors",
        num_samples=6, held_out=3, sequence_length=24, batch_size=4,
    )  # fmt: skip
    assert resumed.digest == calibration.digest


def test_the_model_is_read_once(
    fresh: Workshop, llama: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    get = TensorFolder.get

    def record(self: TensorFolder, name: str) -> torch.Tensor:
        read.append(self.folder)
        return get(self, name)

    monkeypatch.setattr(TensorFolder, "get", record)
    fresh.calibrate(llama)
    assert llama.path not in read


def test_a_weight_that_is_too_large_for_the_compute_dtype_is_named(
    fresh: Workshop, llama_folder: Path, tmp_path: Path
) -> None:
    name = "model.norm.weight"
    folder = with_changed_tensor(llama_folder, tmp_path / "large", name, 3.4e38)
    with pytest.raises(ConfigError, match=f"tensor {name} is too large for bfloat16") as raised:
        fresh.calibrate(fresh.model(folder), compute_dtype="bfloat16")
    assert "--compute-dtype float32" in raised.value.hint
