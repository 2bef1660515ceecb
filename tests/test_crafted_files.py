"""Files that somebody made up end in an error that says so, in every command that reads them."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbllm_cli.app import run
from dbllm_cli.store import Artifact, digest_of, file_sha256
from tests.conftest import Workshop

PIPELINE = "schema_version: 1\nmodel: {path: MODEL}\nsteps:\n  init-fdb: {inputs: {model: model}}\n"
VALUES: list[Any] = [
    None, True, -1, 0, 10**30, 1e300, float("nan"), "", "text", "\ud800", "../../../../etc/passwd",
    "/etc/passwd", [], [1], {}, {"a": {"b": [None]}}, ["x"] * 3, "0" * 64,
]  # fmt: skip
RAW = {
    "empty": b"", "blank": b" " * 2**20, "null": b"null", "list": b"[]", "binary": b"\x80\xff",
    "deep": b"[" * 10**5, "deep object": b'{"lineage":' * 500 + b"1" + b"}" * 500,
}  # fmt: skip
TOLD = {0, 3, 4, 5}

Crafted = Callable[..., None]


@pytest.fixture(scope="module")
def packed(workshop: Workshop, start: Artifact) -> Artifact:
    return workshop.make("pack", {"fdb": start})


@pytest.fixture
def dbllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., int]:
    """Runs one command line; its exit code, which is never that of a bug."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        code = run((*arguments, "--store", "artifacts"))
        told = capsys.readouterr().err
        assert code in TOLD, (arguments, told)
        assert "Traceback" not in told
        return code

    return call


@pytest.fixture
def folder(packed: Artifact, tmp_path: Path) -> Path:
    """A packed artifact alone in the store of the command line."""
    return shutil.copytree(packed.path, tmp_path / "artifacts" / packed.path.name)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if not isinstance(value, dict | list):
        return
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*place, name)
        yield from places(part, (*place, name))


def altered(value: Any, generator: np.random.Generator) -> Any:
    """A copy with another value somewhere, or without what was there."""
    value = copy.deepcopy(value)
    every = list(places(value))
    *way, last = every[generator.integers(len(every))]
    parent = value
    for name in way:
        parent = parent[name]
    choice = int(generator.integers(len(VALUES) + 1))
    if choice == len(VALUES):
        del parent[last]
    else:
        parent[last] = VALUES[choice]
    return value


def seal(manifest: Any, folder: Path) -> None:
    """Write a manifest whose digests are right, as far as it still has the places for them."""
    covered = ("schema_version", "kind", "lineage", "files")
    try:
        for name, file in manifest["files"].items():
            file |= {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    except (AttributeError, KeyError, TypeError, OSError, ValueError):
        pass
    try:
        manifest["digest"] = digest_of({name: manifest[name] for name in covered})
        manifest["provenance_digest"] = digest_of(manifest["provenance"])
    except (KeyError, TypeError, ValueError):
        pass
    (folder / "manifest.json").write_text(json.dumps(manifest))


def look(dbllm: Callable[..., int], folder: Path) -> None:
    """Every command that looks at artifacts without torch."""
    assert dbllm("ls") == 0
    for arguments in (("show",), ("show", "--json"), ("verify",)):
        dbllm(*arguments, folder.name)
    dbllm("verify")
    dbllm("ls", "--json")


@pytest.mark.parametrize("seed", range(60))
def test_an_altered_manifest_is_told(dbllm: Crafted, folder: Path, seed: int) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    generator = np.random.default_rng(seed)
    crafted = altered(manifest, generator)
    if seed % 2:
        crafted = altered(crafted, generator)
    seal(crafted, folder)
    look(dbllm, folder)


@pytest.mark.parametrize("name", ["metrics.json", "layers.json"])
@pytest.mark.parametrize("value", [*VALUES, {"a": 1}, {"a": [], "b": {"c": 1}}], ids=str)
def test_figures_of_another_shape_are_told(
    dbllm: Crafted, folder: Path, name: str, value: Any
) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / name).write_text(json.dumps(value))
    manifest["files"][name] = {}
    seal(manifest, folder)
    look(dbllm, folder)


@pytest.mark.parametrize("data", RAW.values(), ids=RAW)
@pytest.mark.parametrize("name", ["manifest.json", "metrics.json"])
def test_a_file_that_holds_something_else_is_damage(
    dbllm: Crafted, folder: Path, name: str, data: bytes
) -> None:
    (folder / name).write_bytes(data)
    look(dbllm, folder)
    assert dbllm("verify") == 5


def test_status_and_run_tell_of_a_crafted_artifact(
    dbllm: Crafted, llama_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("MODEL", str(llama_folder)))
    assert dbllm("run", "p.yaml") == 0
    (made,) = (tmp_path / "artifacts").glob("fdb-*")
    whole = json.loads((made / "manifest.json").read_text())
    for seed in range(30):
        seal(altered(whole, np.random.default_rng(seed)), made)
        for arguments in (("status",), ("run", "--dry-run")):
            dbllm(*arguments, "p.yaml")


def broken(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    match how:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "header":
            path.write_bytes(b"\xff" * 8 + data[8:])
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "link":
            path.symlink_to("nowhere")


@pytest.mark.parametrize("how", ["fifo", "folder", "header", "cut", "empty", "link"])
@pytest.mark.parametrize("kind", ["artifact", "packed", "model"])
def test_broken_weights_are_damage_for_every_command_that_reads_them(
    dbllm: Crafted, folder: Path, llama_folder: Path, tmp_path: Path, kind: str, how: str
) -> None:
    if kind == "packed":
        (folder / "manifest.json").unlink()
        folder = folder.rename(tmp_path / "foreign")
    if kind == "model":
        folder = shutil.copytree(llama_folder, tmp_path / "model")
    broken(folder / "model.safetensors", how)
    missing = how == "link" and kind != "artifact"
    assert dbllm("generate", str(folder), "--prompt", "a", "--max-new-tokens", "1") == 5 - missing
    if kind == "model":
        assert dbllm("init-fdb", str(folder)) == 5 - missing


INDEXES: list[Any] = [
    *VALUES[:11], *({"weight_map": value} for value in VALUES), *({"weight_map": {"lm_head.weight":
    value}} for value in VALUES),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["packed", "model"])
def test_a_crafted_index_is_told(
    dbllm: Crafted, folder: Path, llama_folder: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "packed":
        (folder / "manifest.json").unlink()
        folder = folder.rename(tmp_path / "foreign")
    else:
        folder = shutil.copytree(llama_folder, tmp_path / "model")
    for index in INDEXES:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert dbllm("generate", str(folder), "--prompt", "a") in (4, 5), index
        if kind == "model":
            assert dbllm("init-fdb", str(folder)) in (4, 5), index


@pytest.mark.parametrize("seed", range(25))
def test_altered_settings_of_a_packed_model_are_told(
    dbllm: Crafted, folder: Path, tmp_path: Path, seed: int
) -> None:
    (folder / "manifest.json").unlink()
    folder = folder.rename(tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    own = config["quantization_config"]
    config["quantization_config"] = altered(own, np.random.default_rng(seed))
    (folder / "config.json").write_text(json.dumps(config))
    dbllm("generate", str(folder), "--prompt", "a", "--max-new-tokens", "1")


@pytest.mark.parametrize("seed", range(25))
def test_altered_settings_of_a_model_are_told(
    dbllm: Crafted, llama_folder: Path, tmp_path: Path, seed: int
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    crafted = altered(config, np.random.default_rng(seed))
    (folder / "config.json").write_text(json.dumps(crafted))
    dbllm("init-fdb", str(folder))
    dbllm("generate", str(folder), "--prompt", "a", "--max-new-tokens", "1")
