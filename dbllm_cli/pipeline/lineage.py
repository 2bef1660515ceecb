"""What an artifact is made from, as the value whose digest is its key."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dbllm_cli.configs import StageConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.machine.packages import installed_version
from dbllm_cli.stages.spec import AnyStage
from dbllm_cli.store import Artifact, Store, files_digest

Lineage = dict[str, Any]


def lineage_of(
    spec: AnyStage, config: StageConfig, inputs: Mapping[str, Artifact], store: Store
) -> Lineage:
    """The lineage of what `spec` makes of these settings and inputs.

    Raises:
        ConfigError: a file that the settings name can't be read.
    """
    lineage: Lineage = {
        "stage": spec.name,
        "stage_version": spec.version,
        "config": keyed_config(config, store),
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
    }
    if spec.packages:
        lineage["packages"] = {name: installed_version(name) for name in spec.packages}
    return lineage


def keyed_config(config: StageConfig, store: Store) -> dict[str, Any]:
    """The settings that change the result and differ from their default; files by their bytes.

    So a new setting changes no key, and a changed default must raise the stage's version.

    Raises:
        ConfigError: a file that the settings name can't be read.
    """
    values = config.changed()
    for name, marks in _marks(type(config)):
        if marks.get("key") is False:
            values.pop(name, None)
        elif marks.get("file") and values.get(name) is not None:
            values[name] = _file_content(name, Path(values[name]), store)
    return values


def _marks(config: type[StageConfig]) -> Iterator[tuple[str, dict[str, Any]]]:
    # The schema gathers what `json_schema_extra` says, also for the string within `str | None`.
    for name, schema in config.model_json_schema()["properties"].items():
        parts: list[dict[str, Any]] = [schema, *schema.get("anyOf", [])]
        yield name, {mark: value for part in reversed(parts) for mark, value in part.items()}


def _file_content(setting: str, path: Path, store: Store) -> dict[str, str]:
    try:
        if not path.exists():
            raise FileNotFoundError(2, "no such file or folder")
        # The suffix says how the bytes are read, so it counts with them.
        return {"sha256": files_digest(path, store.digests), "suffix": path.suffix}
    except OSError as error:
        raise ConfigError(
            f"{setting}: {path} can't be read: {error.strerror or error}",
            f"correct {setting}; a relative path starts at the current folder, {Path.cwd()}",
        ) from error
