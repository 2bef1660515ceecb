"""What each stage is called, takes and gives. Imports no torch, so plans and help are instant."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, cast

from dbllm_cli import configs
from dbllm_cli.records import metrics
from dbllm_cli.stages.context import ConfigType, MetricsType, StageBody


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


@dataclass(frozen=True)
class StageSpec(Generic[ConfigType, MetricsType]):
    """One stage, by its settings and its metrics.

    `version` rises when the same inputs give other bytes than before, and when a setting gets
    another default: keys hold only what differs from it.

    Attributes:
        config: its settings.
        output: the kind of artifact that it makes.
        always_runs: measures anew each time.
        packages: those whose versions change what it makes, beside dbllm's own code: in the key.
    """

    name: str
    version: int
    config: type[ConfigType]
    inputs: tuple[Slot, ...]
    output: str
    help: str
    always_runs: bool = False
    packages: tuple[str, ...] = ()

    def body(self) -> StageBody[ConfigType, MetricsType]:
        """Import the stage's function `run`; this is where torch comes in."""
        module = import_module(f"dbllm_cli.stages.{self.name.replace('-', '_')}")
        return cast("StageBody[ConfigType, MetricsType]", module.run)


def implements(
    spec: StageSpec[ConfigType, MetricsType],
) -> Callable[[StageBody[ConfigType, MetricsType]], StageBody[ConfigType, MetricsType]]:
    """Marks the function `run` of a stage, so that mypy holds it against its spec."""
    del spec
    return lambda body: body


_MODEL = Slot("model", ("model",), "the teacher: folder, hub id, .gguf or builtin:NAME")
_STUDENT = Slot("student", ("fdb",), "the quantized model to train: an fdb artifact")
_CALIBRATION = Slot("calibration", ("calibration",), "token sequences: a calibration artifact")
_EVALUATED = Slot("model", ("model", "fdb", "packed"), "a model, an fdb or a packed artifact")

CALIBRATE: StageSpec[configs.CalibrateConfig, metrics.CalibrationMetrics] = StageSpec(
    "calibrate",
    2,
    configs.CalibrateConfig,
    (_MODEL,),
    "calibration",
    "Make the token sequences that the other stages train on.",
)
INIT_FDB: StageSpec[configs.InitFdbConfig, metrics.InitFdbMetrics] = StageSpec(
    "init-fdb",
    2,
    configs.InitFdbConfig,
    (_MODEL, Slot("calibration", ("calibration",), "weighs the inputs", required=False)),
    "fdb",
    "Find the starting planes and scales of every linear layer.",
)
RECONSTRUCT: StageSpec[configs.ReconstructConfig, metrics.ReconstructMetrics] = StageSpec(
    "reconstruct",
    7,
    configs.ReconstructConfig,
    (_STUDENT, _MODEL, _CALIBRATION),
    "fdb",
    "Train block by block so that each gives the teacher's output.",
)
DISTILL: StageSpec[configs.DistillConfig, metrics.DistillMetrics] = StageSpec(
    "distill",
    8,
    configs.DistillConfig,
    (_STUDENT, _MODEL, _CALIBRATION),
    "fdb",
    "Train end to end against the teacher's predictions.",
)
PACK: StageSpec[configs.PackConfig, metrics.PackMetrics] = StageSpec(
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
)
EVAL_PPL: StageSpec[configs.EvalPplConfig, metrics.EvalMetrics] = StageSpec(
    "eval-ppl",
    1,
    configs.EvalPplConfig,
    (
        _EVALUATED,
        Slot("calibration", ("calibration",), "its held-out part is read", required=False),
    ),
    "eval",
    "Measure perplexity by a named protocol.",
)
EVAL_TASKS: StageSpec[configs.EvalTasksConfig, metrics.TasksMetrics] = StageSpec(
    "eval-tasks",
    1,
    configs.EvalTasksConfig,
    (_EVALUATED,),
    "tasks",
    "Measure zero-shot accuracy on tasks of lm-evaluation-harness.",
    # Its version says those of its own tasks too; a task file of one's own counts by its bytes.
    packages=("lm_eval",),
)
BENCH: StageSpec[configs.BenchConfig, metrics.BenchMetrics] = StageSpec(
    "bench",
    1,
    configs.BenchConfig,
    (_MODEL, Slot("packed", ("packed",), "the packed artifact")),
    "bench",
    "Measure speed, memory and size beside the dense model.",
    always_runs=True,
)

AnyStage = StageSpec[Any, Any]
"""A stage of whatever settings and figures, as plans and commands handle all alike."""

STAGES: dict[str, AnyStage] = {
    spec.name: spec
    for spec in (
        CALIBRATE,
        INIT_FDB,
        RECONSTRUCT,
        DISTILL,
        PACK,
        EVAL_PPL,
        EVAL_TASKS,
        BENCH,
    )
}
