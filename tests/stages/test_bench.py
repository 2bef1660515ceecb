import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dbllm_cli.errors import ConfigError
from dbllm_cli.kernels import cpu_kernels
from dbllm_cli.llm.peak_memory import measure_peak_memory
from dbllm_cli.pipeline.stage import Outcome
from dbllm_cli.stages import bench
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.stages.conftest import Notes
from tests.tiny_models import planes_of

SHORT: dict[str, Any] = {"prompt_tokens": 12, "decode_tokens": 3, "repeats": 3}


@pytest.fixture
def packed(workshop: Workshop, start: Artifact) -> Artifact:
    return workshop.make("pack", {"fdb": start})


@pytest.fixture
def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the processes that measure the memory: they take seconds."""
    monkeypatch.setattr(bench, "measure_peak_memory", lambda folder, **options: 100.0)


@pytest.fixture
def outcome(workshop: Workshop, llama: Artifact, packed: Artifact, without_memory: None) -> Outcome:
    return workshop.run("bench", {"model": llama, "packed": packed}, **SHORT)


def test_both_models_are_timed(outcome: Outcome) -> None:
    for name in ("dense", "packed"):
        figures = outcome.metrics[name]
        for part, tokens in (("prefill", 12), ("decode", 3)):
            seconds = figures[f"{part}_seconds"]
            assert 0 < seconds["fastest"] <= seconds["median"] <= seconds["slowest"]
            speed = figures[f"{part}_tokens_per_second"]
            assert speed == pytest.approx(tokens / seconds["median"], rel=0.01)
        assert figures["peak_memory_mib"] == 100.0
    for key, ratio in outcome.metrics["packed_over_dense"].items():
        packed, dense = outcome.metrics["packed"][key], outcome.metrics["dense"][key]
        assert ratio == pytest.approx(packed / dense, rel=0.01)
    assert outcome.metrics["threads"] == 1
    assert outcome.metrics["device"] == "cpu"


def _bytes_in_memory(tensors: dict[str, torch.Tensor], tiled: bool) -> int:
    """In bfloat16, with packed layers as files hold them or in the tiles of the CPU kernels."""
    total = 0
    for name, tensor in tensors.items():
        if name.endswith(".alpha"):
            # Two scales and an offset in float16; offsets are filled up to 64 rows.
            _, rows, groups = tensor.shape
            filled = 2 * (-(-rows // 16) * 16) + -(-rows // 64) * 64
            total += 2 * groups * (filled if tiled else 3 * rows)
        elif name.endswith(".row_exponent"):
            continue  # of codes, which are float16 in memory
        elif tensor.dtype == torch.uint8 and tensor.ndim == 3:
            _, rows, row_bytes = tensor.shape
            # Tiles are filled up to 16 rows and to words of 32 inputs.
            filled = -(-rows // 16) * 16 * -(-row_bytes // 4) * 4
            total += 2 * (filled if tiled else rows * row_bytes)
        else:
            total += tensor.numel() * (1 if tensor.dtype == torch.uint8 else 2)
    return total


@pytest.mark.parametrize("compiled", [True, False])
def test_the_weight_bytes_are_those_of_the_tensors_in_memory(
    workshop: Workshop,
    llama: Artifact,
    packed: Artifact,
    without_memory: None,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
) -> None:
    kernels = cpu_kernels()
    if compiled and kernels is None:
        pytest.skip("the CPU kernels are not compiled, or DBLLM_KERNEL asks for the reference")
    if not compiled:
        monkeypatch.setattr("dbllm_cli.fdb.linear.cpu_kernels", lambda: None)
    metrics = workshop.run(
        "bench", {"model": llama, "packed": packed}, **SHORT, compute_dtype="bfloat16"
    ).metrics
    for name, artifact in (("dense", llama), ("packed", packed)):
        tensors = load_file(artifact.path / "model.safetensors")
        expected = _bytes_in_memory(tensors, compiled)
        # The rotary embedding's frequencies stand beside the weights.
        assert expected <= metrics[name]["weight_bytes"] <= expected + 128
    in_use = kernels.instruction_set if compiled and kernels is not None else "reference"
    assert metrics["kernel"] == in_use


@pytest.mark.parametrize(
    ("dtype", "faster", "told"),
    [
        ("bfloat16", "float32", True),
        ("bfloat16", "bfloat16", False),
        ("float32", "float32", False),
    ],
)
def test_a_baseline_that_bfloat16_makes_slow_is_told_of(
    workshop: Workshop,
    llama: Artifact,
    packed: Artifact,
    without_memory: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    faster: str,
    told: bool,
) -> None:
    monkeypatch.setattr("dbllm_cli.stages.bench.faster_dtype", lambda device: faster)
    progress = Notes()
    inputs = {"model": llama, "packed": packed}
    workshop.run("bench", inputs, progress=progress, **SHORT, compute_dtype=dtype)
    assert any("--compute-dtype float32" in note for note in progress.notes) is told


def test_the_accounting_counts_ones_zeros_and_levels(outcome: Outcome, packed: Artifact) -> None:
    tensors = load_file(packed.path / "model.safetensors")
    b1, b2 = torch.cat(
        [
            planes_of(tensor, 100 if "down_proj" in name else 64).flatten(1)
            for name, tensor in tensors.items()
            if tensor.dtype == torch.uint8
        ],
        dim=1,
    ).double()
    accounting = outcome.metrics["accounting"]
    assert accounting["quantized_weights"] == b1.numel()
    assert accounting["zeros_b1"] == pytest.approx(1 - float(b1.mean()), abs=1e-5)
    assert accounting["zeros_b2"] == pytest.approx(1 - float(b2.mean()), abs=1e-5)
    assert accounting["additions_per_weight"] == pytest.approx(float((b1 + b2).mean()), abs=1e-5)
    shares = [float((b1 * 2 + b2 == level).double().mean()) for level in range(4)]
    entropy = -sum(share * math.log2(share) for share in shares)
    assert accounting["level_entropy_bits"] == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("levels", ["offset", "plain", "tied"])
def test_the_bits_per_weight_are_those_that_pack_tells(
    workshop: Workshop, llama: Artifact, without_memory: None, levels: str
) -> None:
    fdb = workshop.make("init-fdb", {"model": llama}, levels=levels)
    pack = workshop.run("pack", {"fdb": fdb})
    outcome = workshop.run("bench", {"model": llama, "packed": pack.artifact}, **SHORT)
    told = outcome.metrics["accounting"]["bits_per_quantized_weight"]
    assert told == pack.metrics["bits_per_quantized_weight"]


def test_it_measures_every_time(
    workshop: Workshop, llama: Artifact, packed: Artifact, without_memory: None
) -> None:
    inputs = {"model": llama, "packed": packed}
    assert workshop.run("bench", inputs, **SHORT).ran
    assert workshop.run("bench", inputs, **SHORT).ran


def test_a_dense_export_is_refused(
    workshop: Workshop, llama: Artifact, start: Artifact, without_memory: None
) -> None:
    dense = workshop.make("pack", {"fdb": start}, format="dense")
    with pytest.raises(ConfigError, match="dense export"):
        workshop.run("bench", {"model": llama, "packed": dense}, **SHORT)


def test_the_peak_memory_is_the_models_own_not_that_of_the_process_that_asks(
    packed: Artifact,
) -> None:
    block = b"\x01" * (800 * 2**20)
    del block
    peak = measure_peak_memory(
        packed.path,
        compute_dtype="float32",
        shape=(1, 8, 2),
        device="cpu",
        trust_remote_code=False,
    )
    assert 100 < peak < 700
