"""What each stage is called, takes and gives. Imports no torch, so plans and help are instant."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dbllm_cli import configs
from dbllm_cli.progress import Progress
from dbllm_cli.store import Artifact

Metrics = dict[str, Any]


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
class Slot:
    """One input of a stage.

    Attributes:
        kinds: the kinds of artifact it takes.
        required: whether the stage runs without it.
        many: takes a list; its members reach the stage as `name.0`, `name.1`, …
    """

    name: str
    kinds: tuple[str, ...]
    help: str
    required: bool = True
    many: bool = False


StageBody = Callable[[Any, Mapping[str, Artifact], Context], Metrics]


@dataclass(frozen=True)
class StageSpec:
    """One stage. `version` rises when the same inputs give other bytes than before."""

    name: str
    version: int
    config: type[configs.StageConfig]
    inputs: tuple[Slot, ...]
    output: str
    help: str
    always_runs: bool = False

    def body(self) -> StageBody:
        """Import the stage's function `run`; this is where torch comes in."""
        module = import_module(f"dbllm_cli.stages.{self.name.replace('-', '_')}")
        run: StageBody = module.run
        return run


def members(inputs: Mapping[str, Artifact], slot: str) -> list[Artifact]:
    """The artifacts given to a slot that takes many, in order."""
    return [artifact for name, artifact in inputs.items() if name.split(".")[0] == slot]


_MODEL = Slot("model", ("model",), "the teacher: folder, hub id, .gguf or builtin:NAME")
_STUDENT = Slot("student", ("fdb",), "the quantized model to train: an fdb artifact")
_CALIBRATION = Slot("calibration", ("calibration",), "token sequences: a calibration artifact")
_EVALUATED = Slot("model", ("model", "fdb", "packed"), "a model, an fdb or a packed artifact")

STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec(
            "calibrate",
            2,
            configs.CalibrateConfig,
            (_MODEL,),
            "calibration",
            "Make the token sequences that the other stages train on.",
        ),
        StageSpec(
            "init-fdb",
            2,
            configs.InitFdbConfig,
            (_MODEL, Slot("calibration", ("calibration",), "weighs the inputs", required=False)),
            "fdb",
            "Find the starting planes and scales of every linear layer.",
        ),
        StageSpec(
            "reconstruct",
            7,
            configs.ReconstructConfig,
            (_STUDENT, _MODEL, _CALIBRATION),
            "fdb",
            "Train block by block so that each gives the teacher's output.",
        ),
        StageSpec(
            "distill",
            8,
            configs.DistillConfig,
            (_STUDENT, _MODEL, _CALIBRATION),
            "fdb",
            "Train end to end against the teacher's predictions.",
        ),
        StageSpec(
            "pack",
            1,
            configs.PackConfig,
            (
                Slot("fdb", ("fdb",), "the quantized model: an fdb artifact"),
                Slot(
                    "evals",
                    ("eval", "tasks"),
                    "figures for the model card: of eval-ppl and eval-tasks",
                    required=False,
                    many=True,
                ),
            ),
            "packed",
            "Write a model folder that transformers loads.",
        ),
        StageSpec(
            "eval-ppl",
            1,
            configs.EvalPplConfig,
            (
                _EVALUATED,
                Slot("calibration", ("calibration",), "its held-out part is read", required=False),
            ),
            "eval",
            "Measure perplexity by a named protocol.",
        ),
        StageSpec(
            "eval-tasks",
            1,
            configs.EvalTasksConfig,
            (_EVALUATED,),
            "tasks",
            "Measure zero-shot accuracy on tasks of lm-evaluation-harness.",
        ),
        StageSpec(
            "bench",
            1,
            configs.BenchConfig,
            (_MODEL, Slot("packed", ("packed",), "the packed artifact")),
            "bench",
            "Measure speed, memory and size beside the dense model.",
            always_runs=True,
        ),
    )
}
