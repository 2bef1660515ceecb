"""What a stage is run with, and what it gives back beside its files. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from dbllm_cli.configs import StageConfig
from dbllm_cli.machine.environment import Environment
from dbllm_cli.progress import Progress
from dbllm_cli.store import Artifact

ConfigType = TypeVar("ConfigType", bound=StageConfig)
MetricsType = TypeVar("MetricsType", bound=Mapping[str, object])
Options = TypeVar("Options")


@dataclass(frozen=True)
class Context:
    """What a stage may use beside its settings and inputs; none of it is part of the key.

    Another device, processor or number of threads rounds otherwise, and `compute_dtype: auto` may
    choose otherwise there; the manifest's provenance tells what it was.

    Attributes:
        out: folder that becomes the artifact.
        scratch: folder that survives a kill, for resuming.
        work: the store's own work area, for imported models.
        progress: where loops report.
        device: torch device, e.g. `cpu` or `cuda:0`.
        trust_remote_code: let transformers run code that comes with a model.
    """

    out: Path
    scratch: Path
    work: Path
    progress: Progress
    device: str = "cpu"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Result(Generic[MetricsType]):
    """What a stage ends with beside its files.

    Attributes:
        metrics: its figures, written to metrics.json.
        environment: what it computed in; None where nothing was multiplied.
    """

    metrics: MetricsType
    environment: Environment | None = None


StageBody = Callable[[ConfigType, Mapping[str, Artifact], Context], Result[MetricsType]]


def members(inputs: Mapping[str, Artifact], slot: str) -> list[Artifact]:
    """The artifacts given to a slot that takes many, in order."""
    return [artifact for name, artifact in inputs.items() if name.split(".")[0] == slot]


def options_from(config: StageConfig, options: Callable[..., Options], **more: Any) -> Options:
    """The plain dataclass `options`, its fields taken from the settings of the same names.

    Args:
        config: the stage's settings.
        options: a dataclass.
        more: fields that are no settings.
    """
    names = {field.name for field in fields(options)}  # type: ignore[arg-type]
    return options(**config.model_dump(include=names), **more)
