import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.progress import SilentProgress, Task
from dbllm_cli.store import Artifact, Store, digest, integrity, read_object

Publish = Callable[..., Artifact]
LARGE = "a weight " * 2**17


class Bars(SilentProgress):
    """Keeps the labels of the bars, and what was done in each."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int, int]] = []

    @contextmanager
    def task(self, label: str, total: int, done: int = 0, unit: str = "steps") -> Iterator[Task]:
        advanced: list[int] = []

        class Bar:
            def advance(self, amount: int = 1, **figures: float | str) -> None:
                advanced.append(amount)

        yield Bar()
        self.shown.append((label, total, sum(advanced)))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = digest.file_sha256
    monkeypatch.setattr(digest, "file_sha256", lambda path: names.append(path.name) or real(path))
    return names


def large(publish: Publish) -> Artifact:
    """An artifact with a file that is large and old enough to be remembered."""
    artifact = publish(LARGE)
    os.utime(artifact.path / "inner/data.txt", ns=(10**18, 10**18))
    return artifact


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_input_is_told_with_its_file_and_the_way_out(
    store: Store, publish: Publish
) -> None:
    whole, damaged = publish(steps=1), publish(steps=2)
    flip(damaged.path / "inner/data.txt")
    store.require_whole([whole], SilentProgress())
    with pytest.raises(ArtifactCorruptError, match=r"inner/data\.txt has .* other bytes") as told:
        store.require_whole([whole, damaged], SilentProgress())
    assert str(damaged.path) in told.value.message
    assert "--force" in told.value.hint


def test_an_unchanged_file_is_hashed_once_and_a_changed_one_again(
    store: Store, publish: Publish, hashed: list[str]
) -> None:
    artifact = large(publish)
    hashed.clear()
    store.require_whole([artifact, artifact], SilentProgress())
    Store(store.root).require_whole([artifact], SilentProgress())
    assert hashed.count("data.txt") == 1
    flip(artifact.path / "inner/data.txt")
    with pytest.raises(ArtifactCorruptError, match="other bytes"):
        Store(store.root).require_whole([artifact], SilentProgress())


def test_verify_hashes_again_what_a_stage_would_not(
    store: Store, publish: Publish, hashed: list[str]
) -> None:
    artifact = large(publish)
    store.require_whole([artifact], SilentProgress())
    flip(artifact.path / "inner/data.txt")
    os.utime(artifact.path / "inner/data.txt", ns=(10**18, 10**18))
    (problem,) = store.verify(artifact)
    assert "other bytes" in problem


def test_a_file_that_can_not_be_read_is_a_problem_of_its_artifact(
    store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    artifact = publish()
    monkeypatch.setattr(digest, "file_sha256", fail)
    with pytest.raises(ArtifactCorruptError, match=r"data\.txt is unreadable: Input/output error"):
        store.require_whole([artifact], SilentProgress())


def test_a_bar_is_shown_where_much_is_hashed(
    store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, bars = large(publish), Bars()
    store.require_whole([artifact], bars)
    monkeypatch.setattr(integrity, "_SHOWN_FROM_BYTES", 2**20)
    store.require_whole([artifact], bars)
    assert bars.shown == []
    store.require_whole([publish(LARGE, steps=2)], bars)
    assert bars.shown == [("check inputs", 1, 1)]


def test_a_file_more_is_damage_unless_it_is_hidden(store: Store, publish: Publish) -> None:
    artifact = publish()
    (artifact.path / ".DS_Store").write_text("of a desktop")
    store.require_whole([artifact], SilentProgress())
    (artifact.path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ArtifactCorruptError, match=r"index\.json is not part of the artifact"):
        store.require_whole([artifact], SilentProgress())


def test_models_from_outside_have_no_manifest_to_be_checked(store: Store, tmp_path: Path) -> None:
    model = Artifact(tmp_path, "model", "d" * 64, {"reference": "owner/name", "revision": None})
    store.require_whole([model], SilentProgress())


def test_changed_provenance_is_found_though_no_digest_of_content_covers_it(
    store: Store, publish: Publish
) -> None:
    artifact = publish()
    file = artifact.path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["provenance"]["device"] = "another"
    file.write_text(json.dumps(manifest))
    assert store.verify(store.open(artifact.path)) == [
        "manifest.json: its provenance was changed after it was written"
    ]
    del manifest["provenance_digest"]  # as older ones are
    file.write_text(json.dumps(manifest))
    assert store.verify(store.open(artifact.path)) == []


def test_a_json_file_of_an_artifact_is_read_only_as_it_was_written(publish: Publish) -> None:
    artifact = publish()
    assert read_object(artifact, "metrics.json") == {}
    (artifact.path / "metrics.json").write_text("[]")
    with pytest.raises(ArtifactCorruptError, match=r"metrics\.json can't be read: .* other bytes"):
        read_object(artifact, "metrics.json")
    (artifact.path / "metrics.json").unlink()
    with pytest.raises(ArtifactCorruptError, match=r"metrics\.json can't be read"):
        read_object(artifact, "metrics.json")
    with pytest.raises(ArtifactCorruptError, match=r"it has no layers\.json"):
        read_object(artifact, "layers.json")
