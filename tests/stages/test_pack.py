import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dbllm_cli.configs import PackConfig
from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.llm.models import load_model
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.tiny_models import dequantized, save_model

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def packed(workshop: Workshop, start: Artifact) -> Artifact:
    return workshop.make("pack", {"fdb": start})


def tensors_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    files = sorted(artifact.path.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def size_of(artifact: Artifact) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(artifact).values())


def change_of_logits(plain: PreTrainedModel, small: PreTrainedModel, again: Path) -> float:
    """How far one model's logits are from another's; saved to a folder and read they are equal."""
    small.save_pretrained(again)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        expected, logits, repeated = (
            m(input_ids=ids).logits for m in (plain, small, load_model(again, torch.float32))
        )
    assert torch.equal(logits, repeated)
    return float((logits - expected).norm() / expected.norm())


def header_size(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int(struct.unpack("<Q", opened.read(8))[0])


def test_unpacking_gives_exactly_what_training_ended_with(
    workshop: Workshop, training: dict[str, Artifact]
) -> None:
    trained = workshop.make("reconstruct", training, batch_size=3)
    packed = workshop.make("pack", {"fdb": trained})
    before, after = tensors_of(trained), tensors_of(packed)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert list(trained.path.glob("latents*"))
    assert not list(packed.path.glob("latents*"))


def test_the_size_on_disk_is_that_of_the_arithmetic(workshop: Workshop, start: Artifact) -> None:
    outcome = workshop.run("pack", {"fdb": start})
    # A row of 64 inputs: 8 bytes in each plane, a group of 2 bytes, an exponent; of 100: 13 bytes
    # and two groups.
    rows = 2 * (64 + 32 + 32 + 64 + 100 + 100)
    short_rows = 2 * 64
    quantized = rows * (2 * 8 + 2 + 1) + short_rows * (2 * 13 + 2 * 2 + 1)
    others = 2 * (288 * 64 * 2 + 5 * 64)
    file = outcome.artifact.path / "model.safetensors"
    assert file.stat().st_size - header_size(file) == quantized + others
    assert outcome.metrics["weight_bytes"] == quantized + others
    weights = rows * 64 + short_rows * 100
    assert outcome.metrics["quantized_weights"] == weights
    bits = outcome.metrics["bits_per_quantized_weight"]
    assert bits == pytest.approx(quantized * 8 / weights, abs=1e-5)


def test_shards_hold_the_same_tensors_and_load(
    workshop: Workshop, start: Artifact, packed: Artifact
) -> None:
    sharded = workshop.make("pack", {"fdb": start}, shard_size=3e-5)
    files = sorted(path.name for path in sharded.path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max((sharded.path / file).stat().st_size for file in files[1:])
    assert largest < 45_000
    for name, tensor in tensors_of(packed).items():
        assert torch.equal(tensor, tensors_of(sharded)[name]), name
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        logits = [load_model(item.path, torch.float32)(ids).logits for item in (packed, sharded)]
    assert torch.equal(*logits)


def test_the_dense_format_equals_the_dequantized_weights(
    workshop: Workshop, start: Artifact, llama_folder: Path
) -> None:
    dense = workshop.make("pack", {"fdb": start}, format="dense")
    config = json.loads((dense.path / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(dense.path)
    assert model.dtype == torch.bfloat16
    stored, originals = tensors_of(start), load_file(llama_folder / "model.safetensors")
    assert tensors_of(dense).keys() == originals.keys()
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.alpha" in stored:
            expected = dequantized(stored, layer, originals[name].shape[1]).bfloat16()
        else:
            expected = stored[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("format_name", ["packed", "dense"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_tied_embeddings_stay_tied_and_are_stored_once(
    workshop: Workshop, tmp_path: Path, family: str, format_name: str
) -> None:
    model = workshop.model(save_model(tmp_path / "tied", family))
    fdb = workshop.make("init-fdb", {"model": model}, method="mse", levels="plain")
    packed = workshop.make("pack", {"fdb": fdb}, format=format_name)
    assert [name for name, tensor in tensors_of(packed).items() if 288 in tensor.shape] == [
        "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    ]
    loaded = load_model(packed.path, torch.float32)
    embedding, output = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert embedding.weight.data_ptr() == output.weight.data_ptr()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt"])
def test_embeddings_in_8_bits_load_and_save_and_change_the_logits_little(
    workshop: Workshop, tmp_path: Path, family: str
) -> None:
    model = workshop.model(save_model(tmp_path / "model", family))
    fdb = workshop.make("init-fdb", {"model": model}, method="mse", levels="plain")
    kept = workshop.make("pack", {"fdb": fdb})
    small = workshop.run("pack", {"fdb": fdb}, embeddings="int8")
    sizes = [size_of(a) for a in (kept, small.artifact)]
    assert small.metrics["weight_bytes"] == sizes[1] < 0.75 * sizes[0]
    plain, loaded = (load_model(a.path, torch.float32) for a in (kept, small.artifact))
    assert 0 < change_of_logits(plain, loaded, tmp_path / "again") < 0.05
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == plain.config.tie_word_embeddings


@pytest.mark.parametrize("embeddings", ["kept", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_levels_with_an_offset_are_packed_in_16_bits_a_group_and_load_and_save(
    workshop: Workshop, tmp_path: Path, family: str, embeddings: str
) -> None:
    model = workshop.model(save_model(tmp_path / "model", family))
    fdb = workshop.make("init-fdb", {"model": model}, group_size=16)
    packed = workshop.run("pack", {"fdb": fdb}, embeddings=embeddings)
    assert packed.metrics["weight_bytes"] == size_of(packed.artifact)
    stored = load_file(packed.artifact.path / "model.safetensors")
    codes = [name for name in stored if name.endswith((".alpha", ".row_exponent"))]
    assert {stored[name].dtype for name in codes} == {torch.uint16, torch.int8}
    layers = [name.removesuffix(".alpha") for name in codes if name.endswith(".alpha")]
    bits = 8 * sum(
        stored[f"{layer}.{part}"].nbytes
        for layer in layers
        for part in ("weight", "alpha", "row_exponent")
    )
    told = packed.metrics["bits_per_quantized_weight"]
    assert told == pytest.approx(bits / packed.metrics["quantized_weights"], abs=1e-5)
    load_model(packed.artifact.path, torch.float32).save_pretrained(tmp_path / "again")
    kept = load_file(tmp_path / "again" / "model.safetensors")
    for name in codes:
        assert kept[name].dtype == stored[name].dtype
        assert torch.equal(kept[name], stored[name]), name


@pytest.mark.parametrize(("levels", "bits"), [("tied", 2.28), ("offset", 2.38)])
def test_levels_stay_what_they_are_through_training_and_are_packed_as_they_are(
    workshop: Workshop, training: dict[str, Artifact], levels: str, bits: float
) -> None:
    inputs = {"model": training["model"], "calibration": training["calibration"]}
    start = workshop.make("init-fdb", inputs, levels=levels)
    inputs |= {"student": start}
    reconstructed = workshop.run("reconstruct", inputs, batch_size=3, passes=2)
    assert all(block["error_before"] < 0.5 for block in reconstructed.metrics["blocks"])
    trained, changed = reconstructed.artifact, False
    for train in ("scales", "weights"):
        distilled = workshop.make(
            "distill", {**training, "student": trained}, steps=12, train=train
        )
        outcome = workshop.run("pack", {"fdb": distilled})
        before, after = tensors_of(trained), tensors_of(outcome.artifact)
        steps = {name: tensor for name, tensor in after.items() if name.endswith(".alpha")}
        assert {len(step) for step in steps.values()} == {1}
        changed |= any(not torch.equal(step, before[name]) for name, step in steps.items())
    assert changed
    # A row of 64 inputs: 8 bytes in each plane, 16 bits of scales; of 100: 13 bytes and 32 bits.
    # With an offset 8 bits a row more.
    assert outcome.metrics["bits_per_quantized_weight"] == pytest.approx(bits, abs=0.04)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        packed, fdb = (
            load_model(artifact.path, torch.float32)(input_ids=ids).logits
            for artifact in (outcome.artifact, distilled)
        )
    assert torch.equal(packed, fdb)


def test_codes_where_the_configuration_tells_of_plain_levels_are_refused(
    workshop: Workshop, start: Artifact, tmp_path: Path
) -> None:
    folder = shutil.copytree(start.path, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["levels"]
    (folder / "config.json").write_text(json.dumps(config))
    name = PackedFolder(folder).layer_names()[0]
    with pytest.raises(ArtifactCorruptError, match="do not fit 64 inputs and plain levels"):
        PackedFolder(folder).layer(name, 64)
    config["quantization_config"] |= {"format_version": 2, "scale_format": "float8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactCorruptError, match="format 2 is not read any more"):
        PackedFolder(folder)


def test_a_dense_export_has_nothing_in_8_bits() -> None:
    with pytest.raises(ValueError, match="embeddings has no effect: it needs format packed"):
        PackConfig(format="dense", embeddings="int8")


def test_other_files_of_the_models_folder_are_kept_and_weights_are_not(
    workshop: Workshop, llama_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 17}')
    (folder / "LICENSE").write_text("as you like")
    (folder / "merges.txt").write_text("#version: 0.2")
    (folder / "README.md").write_text("the model's own card")
    for weights in ("pytorch_model.bin", "model.onnx", "tf_model.h5", "consolidated.pth"):
        (folder / weights).write_bytes(b"weights")
    fdb = workshop.make("init-fdb", {"model": workshop.model(folder)}, method="mse", levels="plain")
    packed = workshop.make("pack", {"fdb": fdb})
    kept = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors"}
    for name in kept - {"README.md"}:
        is_weights = name.endswith((".bin", ".onnx", ".h5", ".pth"))
        assert (packed.path / name).is_file() != is_weights, name
        if not is_weights:
            assert (packed.path / name).read_bytes() == (folder / name).read_bytes(), name
    assert "the model's own card" not in (packed.path / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(packed.path)
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hello"
    assert load_model(packed.path, torch.float32).generation_config.top_k == 17


def test_the_same_inputs_give_the_same_bytes(
    fresh: Workshop, packed: Artifact, start: Artifact
) -> None:
    assert fresh.make("pack", {"fdb": start}).digest == packed.digest
