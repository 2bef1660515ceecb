"""One flat, frozen model per stage: the only declaration of every setting.

The YAML file, the command line options, the manifest and the JSON schema are all made from these.
A field's `json_schema_extra` may say `{"file": True}` (a local file or folder that enters the key
by its bytes, not its path) or `{"key": False}` (does not change the result: not in the key).
A mark `Needs` says where a setting has an effect; elsewhere it is refused.
"""

from dbllm_cli.configs.base import (
    NO_EFFECT,
    ComputeDtype,
    ComputeDtypeOrAuto,
    InputFile,
    Needs,
    StageConfig,
    TextConfig,
)
from dbllm_cli.configs.evaluation import BenchConfig, EvalPplConfig, EvalTasksConfig
from dbllm_cli.configs.quantization import CalibrateConfig, InitFdbConfig, PackConfig
from dbllm_cli.configs.training import DistillConfig, ReconstructConfig, TrainConfig

__all__ = [
    "NO_EFFECT",
    "BenchConfig",
    "CalibrateConfig",
    "ComputeDtype",
    "ComputeDtypeOrAuto",
    "DistillConfig",
    "EvalPplConfig",
    "EvalTasksConfig",
    "InitFdbConfig",
    "InputFile",
    "Needs",
    "PackConfig",
    "ReconstructConfig",
    "StageConfig",
    "TextConfig",
    "TrainConfig",
]
