"""`gc`: take out of the store what nothing needs any more."""

from pathlib import Path
from typing import Annotated

import typer

from dbllm_cli.commands.options import JsonOption, StoreOption, possible_path
from dbllm_cli.console import Console, size_text
from dbllm_cli.errors import ConfigError
from dbllm_cli.pipeline.file import load_pipeline
from dbllm_cli.pipeline.plan import plan_pipeline
from dbllm_cli.store import Artifact, Store
from dbllm_cli.store.gc import Garbage, collect, find_garbage, reachable, unfinished_scratch
from dbllm_cli.store.store import DEFAULT_ROOT


def register(app: typer.Typer) -> None:
    """Add `gc`."""
    app.command("gc")(gc)


def gc(
    pipelines: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PIPELINE]...",
            callback=possible_path,
            help="pipeline files whose artifacts stay",
        ),
    ] = None,
    keep: Annotated[
        list[str],
        typer.Option(
            "--keep",
            metavar="ARTIFACT",
            callback=possible_path,
            help="an artifact that stays; may be repeated",
        ),
    ] = [],  # noqa: B006  typer makes a new list for each call
    unused_days: Annotated[
        int,
        typer.Option(min=0, max=36_500, help="imported models not used for so many days go"),
    ] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only tell what would go")] = False,
    store: StoreOption = DEFAULT_ROOT,
    json: JsonOption = False,
) -> None:
    """Remove what nothing needs: leftovers, and artifacts that no pipeline given needs.

    Without a pipeline and without --keep all artifacts stay. What an artifact was made from stays
    with it.
    """
    opened = Store(store)

    def find() -> list[Garbage]:
        chosen = [_of_pipeline(opened, path) for path in pipelines or []]
        roots = [*(each for found in chosen for each in found), *map(opened.open, keep)]
        kept = reachable(opened, roots) if pipelines or keep else None
        return find_garbage(opened, kept, unused_days)

    garbage = find()
    if garbage and not dry_run:
        garbage = collect(opened, find)
    _show(Console(), garbage, unfinished_scratch(opened), dry_run, json)


def _of_pipeline(store: Store, path: Path) -> list[Artifact]:
    """The artifacts that the steps of a pipeline have now.

    Raises:
        ConfigError: there is none: a store or a file that was not meant would lose everything.
    """
    plan = plan_pipeline(load_pipeline(path), store)
    folders = [planned.folder for planned in plan if planned.folder is not None]
    found = [store.open(folder) for folder in folders if folder.is_dir()]
    if not found:
        raise ConfigError(
            f"the store {store.root} has no artifact of {path} as it is now, so none would stay",
            f"see `dbllm status {path}`, or leave it out; name what is to stay with --keep",
        )
    return found


def _show(
    console: Console, garbage: list[Garbage], left: list[Garbage], dry_run: bool, as_json: bool
) -> None:
    total = sum(each.size for each in garbage)
    if as_json:
        entries = [{"path": str(each.path), "size": each.size, "why": each.why} for each in garbage]
        console.print_json({"removed": not dry_run, "bytes": total, "garbage": entries})
        return
    rows = [(each.path, size_text(each.size), each.why) for each in garbage]
    if rows:
        console.print_table(("folder", "size", "why"), rows)
    for each in left:
        console.note(f"kept {each.path}, {size_text(each.size)}: {each.why}")
    verb = "would be freed" if dry_run else "freed"
    console.note(f"{size_text(total)} {verb}, {len(garbage)} folders")
