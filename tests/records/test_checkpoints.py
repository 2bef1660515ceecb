from pathlib import Path

import pytest
import torch

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.records import checkpoints
from dbllm_cli.store import disk


def test_what_a_run_goes_on_from_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def record(path: Path) -> None:
        names = {each.name for each in tmp_path.iterdir()}
        synced.append(f"{path.name} {'after' if names & {'a.safetensors', 'last-3'} else 'before'}")

    monkeypatch.setattr(disk, "sync", record)
    tensors = {"a": torch.zeros(2)}
    checkpoints.keep_tensors(tensors, tmp_path / "a.safetensors")
    assert synced == ["a.part before", f"{tmp_path.name} after"]
    synced.clear()
    (tmp_path / "a.safetensors").unlink()
    checkpoints.save_checkpoint(tmp_path, "last", 3, tensors, {})
    assert {"model.safetensors before", "state.json before"} <= set(synced)
    assert synced[-2:] == [".last before", f"{tmp_path.name} after"]


def test_a_damaged_checkpoint_is_told_with_the_folder_to_remove(tmp_path: Path) -> None:
    checkpoints.save_checkpoint(tmp_path, "last", 3, {"a": torch.zeros(2)}, {"step": 3})
    (tmp_path / "last-3" / "state.json").write_text('{"step": 3')
    with pytest.raises(ArtifactCorruptError, match=r"state\.json can't be read") as caught:
        checkpoints.last_checkpoint(tmp_path, "last")
    assert f"remove the folder {tmp_path / 'last-3'}" in caught.value.hint
