import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dbllm_cli.errors import (
    ArtifactCorruptError,
    ArtifactMissingError,
    ConfigError,
    StageFailedError,
)
from dbllm_cli.store import Artifact, DamagedArtifact, Store, lineage_key

Publish = Callable[..., Artifact]


LINEAGE = {"stage": "x", "stage_version": 1, "config": {}, "inputs": {}}


def key_of(artifact: Artifact) -> str:
    return lineage_key(artifact.manifest["lineage"])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_what_is_published_is_found_by_its_key(store: Store, publish: Publish) -> None:
    artifact = publish("content")
    key = key_of(artifact)
    assert store.find("fdb", key) == artifact
    assert artifact.path == store.root / f"fdb-{key[:12]}"
    assert (artifact.path / "inner/data.txt").read_text() == "content"
    assert store.find("fdb", "0" * 64) is None
    assert store.verify(artifact) == []


def test_an_artifact_opens_by_path_and_by_name(store: Store, publish: Publish) -> None:
    artifact = publish()
    assert store.open(artifact.path) == store.open(artifact.path.name) == artifact


def test_an_artifact_that_is_not_there_gets_the_nearest_name(
    store: Store, publish: Publish
) -> None:
    artifact = publish()
    with pytest.raises(ArtifactMissingError, match="no fdb at") as caught:
        store.open(artifact.path.name[:-1], ("fdb",))
    assert str(artifact.path) in caught.value.hint


def test_a_wrong_kind_says_what_was_got_and_wanted(store: Store, publish: Publish) -> None:
    artifact = publish(kind="eval")
    with pytest.raises(ArtifactMissingError, match="is of kind eval; fdb or packed is needed"):
        store.open(artifact.path, ("fdb", "packed"))


def test_a_folder_that_is_no_artifact_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissingError, match=r"it has no manifest\.json"):
        store.open(tmp_path)


def test_verify_finds_a_flipped_byte_and_a_foreign_file(store: Store, publish: Publish) -> None:
    artifact = publish()
    flip_a_byte(artifact.path / "inner/data.txt")
    (artifact.path / "inner/notes.txt").write_text("mine")
    problems = store.verify(store.open(artifact.path))
    assert len(problems) == 2
    assert problems[0].startswith("inner/data.txt has the right size but other bytes")
    assert problems[1].startswith("inner/notes.txt is not part")


def test_damage_is_not_taken_for_absence(store: Store, publish: Publish) -> None:
    artifact = publish()
    (artifact.path / "manifest.json").unlink()
    with pytest.raises(ArtifactCorruptError, match=r"no manifest\.json"):
        store.find("fdb", key_of(artifact))


def test_a_renamed_artifact_is_not_taken_for_another(store: Store, publish: Publish) -> None:
    artifact, other = publish(steps=1), publish(steps=2)
    other.path.rename(store.root / "aside-x")
    artifact.path.rename(other.path)
    with pytest.raises(ArtifactCorruptError, match="other inputs than its name says"):
        store.find("fdb", key_of(other))


def test_listing_shows_the_damaged_beside_the_whole(store: Store, publish: Publish) -> None:
    whole, damaged = publish(steps=1), publish(steps=2)
    (damaged.path / "metrics.json").write_text("")
    listed = {item.path: type(item) for item in store.artifacts()}
    assert listed == {whole.path: Artifact, damaged.path: DamagedArtifact}


def test_a_store_that_is_not_there_is_empty_and_stays_away(store: Store) -> None:
    assert store.artifacts() == []
    assert store.find("fdb", "0" * 64) is None
    assert not store.root.exists()


def test_replacing_moves_the_old_one_aside(store: Store, publish: Publish) -> None:
    publish("first")
    publish("second", replace=True)
    artifact = publish("third", replace=True)
    aside = sorted((store.root / ".replaced").iterdir())
    assert (artifact.path / "inner/data.txt").read_text() == "third"
    assert [(path / "inner/data.txt").read_text() for path in aside] == ["first", "second"]


def test_without_replacing_the_one_that_came_first_stays(publish: Publish) -> None:
    publish("first")
    assert (publish("second").path / "inner/data.txt").read_text() == "first"


def test_links_do_not_become_part_of_an_artifact(store: Store, tmp_path: Path) -> None:
    staging = store.staging()
    (staging / "link").symlink_to(tmp_path)
    with pytest.raises(StageFailedError, match="left a link"):
        store.publish(staging, "fdb", LINEAGE, {})


def test_a_manifest_copied_by_a_stage_is_replaced_by_the_artifacts_own(store: Store) -> None:
    staging = store.staging()
    (staging / "manifest.json").write_text("foreign")
    (staging / "data.txt").write_text("x")
    artifact = store.publish(staging, "packed", LINEAGE, {})
    assert list(artifact.manifest["files"]) == ["data.txt"]
    assert store.verify(artifact) == []


def test_leftovers_of_dead_processes_are_cleared_and_those_of_living_ones_kept(
    store: Store,
) -> None:
    mine = store.staging()
    host = mine.name.split("+")[0]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = mine.parent / f"{host}+{ended.pid}+00000000"
    elsewhere = mine.parent / f"another-host+{ended.pid}+00000000"
    # A container of this host's name counts processes of its own.
    contained = mine.parent / f"{socket.gethostname()}.1+{ended.pid}+00000000"
    for folder in (dead, elsewhere, contained):
        folder.mkdir()
    store.staging()
    assert mine.exists()
    assert elsewhere.exists()
    assert contained.exists()
    assert not dead.exists()


def test_a_held_lock_names_its_holder_and_is_free_again_after(store: Store) -> None:
    with store.lock("k" * 64, "step distill"):
        with (
            pytest.raises(StageFailedError, match=rf"process {os.getpid()} on .*step distill"),
            store.lock("k" * 64, "step distill"),
        ):
            pass
        with store.lock("other" * 9, "another"):
            pass
    with store.lock("k" * 64, "step distill"):
        pass


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_filesystem_without_locks_is_worked_on_without(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with store.lock("k" * 64, "x"):
        pass


def test_a_killed_process_frees_its_lock(store: Store) -> None:
    script = (
        "import sys, time; from pathlib import Path; from dbllm_cli.store import Store\n"
        "with Store(Path(sys.argv[1])).lock('k' * 64, 'x'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StageFailedError), store.lock("k" * 64, "x"):
            pass
        holder.kill()
        holder.wait()
    with store.lock("k" * 64, "x"):
        pass


def test_a_store_under_a_file_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    with pytest.raises(ConfigError, match="can't be written") as caught:
        store.staging()
    assert "--store" in caught.value.hint


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_store_without_permission_can_not_be_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=os.strerror(number)), store.lock("k" * 64, "x"):
        pass


def test_a_full_disk_is_told_and_leaves_no_artifact(small_disk: Path) -> None:
    store = Store(small_disk)
    staging = store.staging()
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(2**20))
    with pytest.raises(StageFailedError, match="no space left on the disk") as caught:
        store.publish(staging, "fdb", LINEAGE, {})
    assert caught.value.exit_code == 6
    assert store.artifacts() == []
