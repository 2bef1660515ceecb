import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.store import Artifact, Store, digest_of

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
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "wrong at schema_version"),
        ("", "not JSON"),
    ],
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


def forge(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a manifest so that its digest fits again."""

    def changed(manifest: dict[str, Any]) -> None:
        change(manifest)
        covered = ("schema_version", "kind", "lineage", "files")
        manifest["digest"] = digest_of({name: manifest[name] for name in covered})

    edit(artifact, changed)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *((("files", "inner/data.txt", "size"), v) for v in ("7", [7], None, -1, 7.5, True)),
        *((("files", "inner/data.txt", "sha256"), v) for v in ("short", 0, None, "A" * 64)),
        (("files", "inner/data.txt"), 7),
        *((("files",), value) for value in ([], "text", None)),
        *((("lineage",), value) for value in ([], {}, "text", None)),
        (("lineage", "stage"), 3),
        (("lineage", "stage_version"), "1"),
        (("lineage", "config"), []),
        (("lineage", "inputs"), ["a"]),
        (("lineage", "inputs"), {"model": 3}),
        *((("provenance",), value) for value in ([], "text", None)),
        *((("provenance", "seconds"), v) for v in ("1", None, -1.0, [])),
        (("provenance", "started"), 3),
        (("provenance", "peak_memory_mib"), "much"),
        (("kind",), ["fdb"]),
        (("kind",), ""),
        (("schema_version",), "1"),
    ],
)
def test_a_manifest_whose_fields_are_of_another_kind_is_damage(
    store: Store, publish: Publish, where: tuple[str, ...], value: Any
) -> None:
    artifact = publish()

    def change(manifest: dict[str, Any]) -> None:
        for name in where[:-1]:
            manifest = manifest[name]
        manifest[where[-1]] = value

    forge(artifact, change)
    with pytest.raises(ArtifactCorruptError, match=f"manifest.json is wrong at {where[0]}"):
        store.open(artifact.path)


def test_what_is_not_known_here_does_not_make_a_manifest_damaged(
    store: Store, publish: Publish
) -> None:
    artifact = publish()

    def change(manifest: dict[str, Any]) -> None:
        manifest["provenance"]["weather"] = {"sun": 1}
        manifest["lineage"]["of_later_versions"] = [1]
        manifest["note"] = "more"

    forge(artifact, change)
    assert store.open(artifact.path).record.lineage.stage == "train"


@pytest.mark.parametrize(
    "name",
    [
        "../../../../etc/passwd", "/etc/passwd", "inner/../../out", "..", ".", "", "inner//data",
        "./inner", "manifest.json", "a\\b", "a\0b",
    ],
)  # fmt: skip
def test_no_file_of_a_manifest_lies_outside_of_its_folder(
    store: Store, publish: Publish, name: str
) -> None:
    artifact = publish()
    size = Path("/etc/passwd").stat().st_size
    forge(artifact, lambda m: m["files"].update({name: {"size": size, "sha256": "0" * 64}}))
    with pytest.raises(ArtifactCorruptError, match="not the name of a file in the artifact"):
        store.open(artifact.path)


@pytest.mark.parametrize("name", ["inner/data.txt", "inner", "manifest.json"])
def test_a_link_in_the_place_of_a_file_or_folder_is_damage(
    store: Store, publish: Publish, tmp_path: Path, name: str
) -> None:
    artifact = publish()
    (artifact.path / name).rename(tmp_path / "outside")
    (artifact.path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactCorruptError, match="is a link, where an artifact holds only files"):
        store.open(artifact.path)


def test_an_artifact_in_the_cache_of_the_hub_consists_of_links(
    store: Store, publish: Publish, tmp_path: Path
) -> None:
    artifact = publish()
    snapshot = tmp_path / "snapshots" / "abc"
    for path in artifact.path.rglob("*.*"):
        link = snapshot / path.relative_to(artifact.path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert store.verify(store.open(snapshot)) == []


@pytest.mark.parametrize("name", ["inner/data.txt", "manifest.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_plain_file_is_not_opened(
    store: Store, publish: Publish, name: str, make: Callable[[Path], None]
) -> None:
    artifact = publish()
    (artifact.path / name).unlink()
    make(artifact.path / name)
    with pytest.raises(ArtifactCorruptError, match="is not a plain file"):
        store.open(artifact.path)


def test_a_number_that_is_none_in_a_manifest_is_damage(store: Store, publish: Publish) -> None:
    artifact = publish()
    edit(artifact, lambda manifest: manifest["lineage"]["config"].update(rate=float("nan")))
    with pytest.raises(ArtifactCorruptError, match="not finite"):
        store.open(artifact.path)
