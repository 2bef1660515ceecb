import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dbllm_cli import tensors
from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.tensors import ShardWriter, TensorFolder, require_finite, save_tensors

_TENSORS = {f"layer.{n}.weight": torch.full((4, 4), float(n)) for n in range(5)}


def _write(folder: Path, shard_bytes: float = 5e9) -> None:
    with ShardWriter(folder, shard_bytes=shard_bytes) as writer:
        writer.add_all(_TENSORS.items())


def test_equal_tensors_give_equal_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_tensors(_TENSORS, first)
    save_tensors(dict(reversed(_TENSORS.items())), second)
    assert first.read_bytes() == second.read_bytes()
    assert stat.S_IMODE(first.stat().st_mode) == 0o644


def test_few_tensors_go_into_one_file_without_an_index(tmp_path: Path) -> None:
    _write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_many_tensors_go_into_numbered_shards_with_hugging_face_s_index(tmp_path: Path) -> None:
    _write(tmp_path, shard_bytes=2 * 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 64}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), _TENSORS[name])
            assert len(shard.keys()) <= 2


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    _write(tmp_path, shard_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-00005.safetensors"))) == 5


@pytest.mark.parametrize("shard_bytes", [1, 128, 5e9])
def test_what_is_written_is_read_back(tmp_path: Path, shard_bytes: float) -> None:
    _write(tmp_path, shard_bytes)
    folder = TensorFolder(tmp_path)
    assert folder.names() == sorted(_TENSORS)
    assert "layer.0.weight" in folder
    assert "layer.9.weight" not in folder
    assert all(torch.equal(tensor, _TENSORS[name]) for name, tensor in folder.items())


def test_an_error_while_writing_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, shard_bytes=1) as writer:
            writer.add_all(_TENSORS.items())
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail()
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob("*.json"))


def test_a_folder_without_weights_is_missing_them(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissingError, match=r"no model\.safetensors"):
        TensorFolder(tmp_path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00garbage" * 20)
    with pytest.raises(ArtifactCorruptError, match=r"model\.safetensors can't be read"):
        TensorFolder(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactCorruptError):
        TensorFolder(tmp_path)


def test_an_index_that_names_a_shard_that_is_gone_is_refused_when_read(tmp_path: Path) -> None:
    _write(tmp_path, shard_bytes=128)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ArtifactCorruptError, match="00002-of-00003"):
        list(TensorFolder(tmp_path).items())


@pytest.mark.parametrize("content", ["{not json", "[]", '{"metadata": {}}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    _write(tmp_path, shard_bytes=128)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ArtifactCorruptError, match=r"index\.json"):
        TensorFolder(tmp_path)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, shard_bytes=128)
    save_tensors({"other": torch.ones(1)}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(ArtifactCorruptError, match=r"layer\.0\.weight"):
        TensorFolder(tmp_path).get("layer.0.weight")


def test_a_tensor_that_no_file_holds_is_told_by_name(tmp_path: Path) -> None:
    _write(tmp_path)
    with pytest.raises(ArtifactCorruptError, match=r"has no tensor layer\.9\.weight"):
        TensorFolder(tmp_path).get("layer.9.weight")


def test_every_file_is_opened_by_a_check(tmp_path: Path) -> None:
    _write(tmp_path, shard_bytes=2 * 64)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    TensorFolder(tmp_path).check()
    shard.write_bytes(b"no header")
    with pytest.raises(ArtifactCorruptError, match="model-00002-of-00003"):
        TensorFolder(tmp_path).check()
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ArtifactCorruptError, match="is not a plain file"):
        TensorFolder(tmp_path).check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused_by_name(value: float) -> None:
    with pytest.raises(ArtifactCorruptError, match=r"layer\.weight"):
        require_finite("layer.weight", torch.tensor([1.0, value]))
    require_finite("layer.weight", torch.tensor([1.0, 2.0]))
    require_finite("layer.ids", torch.tensor([1, 2]))


def test_a_file_is_opened_once_for_all_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, shard_bytes=128)
    opened: list[Path] = []

    def record(path: Path, framework: str) -> safe_open:
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr(tensors, "safe_open", record)
    assert len(dict(TensorFolder(tmp_path).items())) == 5
    assert len(opened) == len(set(opened)) == 3


def test_a_file_is_opened_anew_when_much_of_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path)
    monkeypatch.setattr(tensors, "_OPEN_BYTES", 2 * 64)
    opened = 0

    def record(path: Path, framework: str) -> safe_open:
        nonlocal opened
        opened += 1
        return safe_open(path, framework=framework)

    folder = TensorFolder(tmp_path)
    monkeypatch.setattr(tensors, "safe_open", record)
    assert len(dict(folder.items())) == 5
    assert opened == 3
