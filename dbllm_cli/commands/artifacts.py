"""`ls`, `show` and `verify`: what the store holds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dbllm_cli.commands.options import JsonOption, StoreOption
from dbllm_cli.console import Console, ConsoleProgress, seconds_text, size_text, value_text
from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.pipeline.stage import METRICS
from dbllm_cli.store import Artifact, DamagedArtifact, Store, read_object
from dbllm_cli.store.store import DEFAULT_ROOT

ArtifactArgument = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="path of an artifact, or its name in the store")
]
OptionalArtifactArgument = Annotated[
    str | None,
    typer.Argument(metavar="ARTIFACT", help="path or name of one artifact; all when absent"),
]


# Written by the stages that make an fdb: the figures of each quantized layer.
_LAYERS = "layers.json"
_MAKE_SOME = "make some with `dbllm run PIPELINE`"


def register(app: typer.Typer) -> None:
    """Add `ls`, `show` and `verify`."""
    for name, command in (("ls", list_artifacts), ("show", show), ("verify", verify)):
        app.command(name)(command)


def list_artifacts(store: StoreOption = DEFAULT_ROOT, json: JsonOption = False) -> None:
    """List the artifacts of the store."""
    console = Console()
    found = Store(store).artifacts()
    entries = [_summary(artifact) for artifact in found]
    if json:
        console.print_json({"store": str(store), "artifacts": entries})
        return
    if not entries:
        console.note(f"no artifacts in {store}; {_MAKE_SOME}")
        return
    rows = [
        (
            entry["path"],
            entry["stage"],
            entry["started"],
            size_text(entry["size"]) if entry["size"] is not None else "",
            entry["problem"],
        )
        for entry in entries
    ]
    console.print_table(("artifact", "stage", "made", "size", "problem"), rows)


def show(
    artifact: ArtifactArgument, store: StoreOption = DEFAULT_ROOT, json: JsonOption = False
) -> None:
    """Show what an artifact is, what it measured and what it was made from."""
    opened = Store(store)
    shown = opened.open(artifact)
    metrics = _object(shown, METRICS)
    lineage = _lineage_tree(shown, _by_digest(opened))
    console = Console()
    if json:
        console.print_json(
            {
                "path": str(shown.path),
                "manifest": shown.manifest,
                "metrics": metrics or None,
                "lineage": lineage,
            }
        )
        return
    _show_manifest(console, shown)
    if metrics:
        console.print_line("\nmetrics")
        console.print_table(("", ""), list(_flat(metrics)))
    console.print_line("\nmade from")
    for line in _tree_lines(lineage["inputs"], "  "):
        console.print_line(line)
    layers = {
        name: layer for name, layer in _object(shown, _LAYERS).items() if isinstance(layer, dict)
    }
    if layers:
        console.print_line("")
        figures = tuple(next(iter(layers.values())))
        rows = [
            (name, *(layer.get(figure) for figure in figures)) for name, layer in layers.items()
        ]
        console.print_table(("layer", *figures), rows)


def verify(
    artifact: OptionalArtifactArgument = None,
    store: StoreOption = DEFAULT_ROOT,
    json: JsonOption = False,
) -> None:
    """Hash every file of one artifact, or of all, and tell what is damaged."""
    console = Console()
    opened = Store(store)
    chosen = _chosen(opened, artifact)
    problems = _problems(console, opened, chosen) if chosen else {}
    if json:
        entries = [{"path": str(path), "problems": found} for path, found in problems.items()]
        console.print_json({"artifacts": entries})
    else:
        for path, found in problems.items():
            console.print_line(f"{path}: {'; '.join(found) or 'ok'}")
    if not chosen:
        console.note(f"no artifacts in {store}; {_MAKE_SOME}")
    count = sum(bool(found) for found in problems.values())
    if count:
        console.error(
            f"{count} of {len(problems)} artifacts damaged",
            "make each anew: run the command that made it with --force",
        )
        raise typer.Exit(ArtifactCorruptError.exit_code)


def _summary(artifact: Artifact | DamagedArtifact) -> dict[str, Any]:
    entry: dict[str, Any] = dict.fromkeys(
        ("kind", "stage", "digest", "started", "seconds", "size", "problem")
    )
    entry = {"path": str(artifact.path), **entry}
    if isinstance(artifact, DamagedArtifact):
        return {**entry, "problem": artifact.error.message}
    record = artifact.record
    return {
        **entry,
        "kind": artifact.kind,
        "stage": record.lineage.stage,
        "digest": artifact.digest,
        "started": record.provenance.started,
        "seconds": record.provenance.seconds,
        "size": record.size,
    }


def _chosen(store: Store, reference: str | None) -> list[Artifact | DamagedArtifact]:
    if reference is None:
        return store.artifacts()
    try:
        return [store.open(reference)]
    except ArtifactCorruptError as error:
        return [DamagedArtifact(Path(reference), error)]


def _problems(
    console: Console, store: Store, chosen: list[Artifact | DamagedArtifact]
) -> dict[Path, list[str]]:
    problems = {}
    with ConsoleProgress(console).task("verify", len(chosen), unit="artifacts") as task:
        for each in chosen:
            problems[each.path] = (
                [each.error.message] if isinstance(each, DamagedArtifact) else store.verify(each)
            )
            task.advance()
    return problems


def _show_manifest(console: Console, artifact: Artifact) -> None:
    record = artifact.record
    lineage, provenance = record.lineage, record.provenance
    made = [
        provenance.started,
        seconds_text(provenance.seconds),
        f"{provenance.peak_memory_mib:.0f} MiB at most",
        f"on {provenance.device}",
    ]
    rows = [
        ("artifact", artifact.path),
        ("kind", artifact.kind),
        ("digest", artifact.digest),
        ("size", f"{size_text(record.size)} in {len(record.files)} files"),
        ("stage", f"{lineage.stage} (version {lineage.stage_version})"),
        ("made", ", ".join(str(part) for part in made)),
    ]
    console.print_table(("", ""), rows)
    console.print_line("\nsettings")
    console.print_table(("", ""), list(_flat(lineage.config)))


def _by_digest(store: Store) -> dict[str, Artifact]:
    return {found.digest: found for found in store.artifacts() if isinstance(found, Artifact)}


def _lineage_tree(artifact: Artifact, stored: dict[str, Artifact]) -> dict[str, Any]:
    """An artifact with its inputs, and theirs; those outside the store by their digest alone."""
    lineage = artifact.record.lineage
    inputs = {}
    for slot, digest in lineage.inputs.items():
        found = stored.get(digest)
        inputs[slot] = _lineage_tree(found, stored) if found else {"digest": digest}
    return {
        "path": str(artifact.path),
        "stage": lineage.stage,
        "digest": artifact.digest,
        "inputs": inputs,
    }


def _tree_lines(inputs: dict[str, Any], indent: str) -> Iterator[str]:
    for slot, node in inputs.items():
        if "path" in node:
            yield f"{indent}{slot}: {node['path']} ({node['stage']})"
            yield from _tree_lines(node["inputs"], indent + "  ")
        else:
            yield f"{indent}{slot}: not in this store, digest {node['digest'][:12]}"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"  {prefix}{name}", value_text(value)


def _object(artifact: Artifact, name: str) -> dict[str, Any]:
    return read_object(artifact, name) if name in artifact.record.files else {}
