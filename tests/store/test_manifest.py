import json
from collections.abc import Callable
from typing import Any

import pytest

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.store import Artifact, Store

Publish = Callable[..., Artifact]


def edit(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> None:
    file = artifact.path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_the_digest_covers_content_and_lineage_but_not_how_it_was_made(
    store: Store, publish: Publish
) -> None:
    first = publish("content")
    edit(first, lambda manifest: manifest["provenance"].update(seconds=99))
    assert store.open(first.path).digest == first.digest
    assert publish("content", replace=True).digest == first.digest
    assert publish("other", replace=True).digest != first.digest
    assert publish("content", steps=2).digest != first.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["lineage"]["config"].update(steps=7),
        lambda manifest: manifest["files"]["inner/data.txt"].update(sha256="0" * 64),
        lambda manifest: manifest.update(kind="packed"),
        lambda manifest: manifest.update(digest="0" * 64),
    ],
    ids=["setting", "file digest", "kind", "digest"],
)
def test_an_edited_manifest_is_told(
    store: Store, publish: Publish, change: Callable[[dict[str, Any]], None]
) -> None:
    artifact = publish()
    edit(artifact, change)
    with pytest.raises(ArtifactCorruptError, match="changed after it was written") as caught:
        store.open(artifact.path)
    assert "dbllm verify" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "lacks fields"), ("", "not JSON")],
)
def test_a_manifest_that_is_no_manifest_is_told(
    store: Store, publish: Publish, text: str, problem: str
) -> None:
    artifact = publish()
    (artifact.path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactCorruptError, match=problem):
        store.open(artifact.path)


def test_an_artifact_of_a_newer_dbllm_asks_for_an_upgrade(store: Store, publish: Publish) -> None:
    artifact = publish()
    edit(artifact, lambda manifest: manifest.update(schema_version=2))
    with pytest.raises(ArtifactMissingError, match="schema version 2") as caught:
        store.open(artifact.path)
    assert "pip install --upgrade dbllm" in caught.value.hint
    assert caught.value.exit_code == 4


def test_a_truncated_file_is_told_on_opening(store: Store, publish: Publish) -> None:
    artifact = publish("content")
    (artifact.path / "inner/data.txt").write_text("cont")
    with pytest.raises(
        ArtifactCorruptError, match=r"inner/data\.txt has 4 bytes instead of 7"
    ) as caught:
        store.open(artifact.path)
    assert caught.value.exit_code == 5


def test_a_missing_file_is_told_on_opening(store: Store, publish: Publish) -> None:
    artifact = publish()
    (artifact.path / "inner/data.txt").unlink()
    with pytest.raises(ArtifactCorruptError, match=r"inner/data\.txt is missing"):
        store.open(artifact.path)
