from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dbllm_cli.configs import DistillConfig
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.schemes.offset import Offset
from dbllm_cli.kernels import cpu_kernels
from dbllm_cli.kernels.cpu import CpuKernels
from dbllm_cli.llm.blocks import find_blocks
from dbllm_cli.llm.models import load_model
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.progress import SilentProgress
from dbllm_cli.records.calibration import open_calibration
from dbllm_cli.stages.context import options_from
from dbllm_cli.store import Artifact
from dbllm_cli.training.trainer import TeacherAndStudent, Trainer, TrainerOptions

needs_kernels = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not compiled")


@pytest.fixture
def no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be laid out for the CPU kernels."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("planes were laid out for the CPU kernels")

    monkeypatch.setattr(CpuKernels, "to_tiles", refuse)


@needs_kernels
@pytest.mark.usefixtures("no_layout")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_is_to_train_or_to_move_is_not_laid_out_for_the_cpu(
    start: Artifact, device: str
) -> None:
    model = load_model(start.path, torch.float32, device, trains=device == "cpu")
    packed = [module for module in model.modules() if isinstance(module, FdbLinear)]
    assert packed
    assert all(layer.tiles is None and layer.scales is not None for layer in packed)
    assert not any("forward" in vars(block) for block in find_blocks(model).modules)


@needs_kernels
def test_a_model_that_is_to_run_on_the_cpu_is_laid_out(start: Artifact) -> None:
    model = load_model(start.path, torch.float32)
    packed = [module for module in model.modules() if isinstance(module, FdbLinear)]
    assert all(layer.tiles is not None for layer in packed)


def test_loading_encodes_no_scales(start: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("scales were encoded")

    monkeypatch.setattr(Offset, "store", refuse)
    load_model(start.path, torch.float32)
    load_model(start.path, torch.float32, trains=True)


@pytest.mark.usefixtures("no_layout")
def test_a_trainer_that_recomputes_keeps_no_packed_layer(
    start: Artifact, llama: Artifact, calibration: Artifact, tmp_path: Path
) -> None:
    options = options_from(DistillConfig(steps=1, recompute=True), TrainerOptions)
    models = TeacherAndStudent(
        load_model(llama.path, torch.float32), load_model(start.path, torch.float32, trains=True)
    )
    trainer = Trainer(
        options,
        models,
        PackedFolder(start.path),
        open_calibration(calibration),
        tmp_path,
        SilentProgress(),
    )
    assert not any(isinstance(module, FdbLinear) for module in trainer.model.modules())
    for block in trainer.model.model.layers:
        forward = vars(block)["forward"]
        assert isinstance(forward, partial)
        assert forward.func is checkpoint
        assert forward.args[0].__self__ is block
