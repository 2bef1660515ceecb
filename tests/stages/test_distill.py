import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dbllm_cli.llm.models import load_model
from dbllm_cli.stages import distill
from dbllm_cli.store import Artifact
from dbllm_cli.training import trainer
from tests.conftest import Workshop
from tests.stages.conftest import KilledAndResumed

SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "steps": 12,
    "warmup_steps": 1,
    "eval_every": 3,
    "save_every": 4,
    "scale_lr": 1e-2,
}
# The rate brings some latent weights over a border in these few steps.
WEIGHTS: dict[str, Any] = SETTINGS | {"train": "weights", "latent_lr": 0.02}
TOO_FAST: dict[str, Any] = SETTINGS | {"scale_lr": 2.0, "eval_every": 1, "steps": 30}


@pytest.fixture
def start(workshop: Workshop, llama: Artifact, calibration: Artifact) -> Artifact:
    """Plain levels: of an offset's a model of random weights has nothing to learn in few steps."""
    inputs = {"model": llama, "calibration": calibration}
    return workshop.make("init-fdb", inputs, levels="plain")


@pytest.fixture
def distilled(workshop: Workshop, training: dict[str, Artifact]) -> Artifact:
    """Scales trained."""
    return workshop.make("distill", training, **SETTINGS)


def tensors_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path / "model.safetensors")


def curve_of(artifact: Artifact) -> list[dict[str, float]]:
    lines = (artifact.path / "curve.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def held_out_loss(path: Path, teacher: Path, calibration: Artifact, loss: str = "kd") -> float:
    """Over the held-out part: cross-entropy to the teacher's distribution, or to the next token."""
    ids = load_file(calibration.path / "tokens.safetensors")["held_out"].long()
    with torch.no_grad():
        target = load_model(teacher, torch.float32)(ids).logits.softmax(-1)
        ours = load_model(path, torch.float32)(ids).logits.log_softmax(-1)
    if loss == "ce":
        return float(-ours[:, :-1].gather(-1, ids[:, 1:, None]).mean())
    return float(-(target * ours).sum(-1).mean())


def changed_tensors(before: Artifact, after: Artifact) -> set[str]:
    old, new = tensors_of(before), tensors_of(after)
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_training_scales_leaves_planes_unchanged(distilled: Artifact, start: Artifact) -> None:
    planes = {name.replace(".alpha", ".weight") for name in tensors_of(start) if "alpha" in name}
    changed = changed_tensors(start, distilled)
    assert changed
    assert not changed & planes
    assert not list(distilled.path.glob("latents*"))


@pytest.mark.parametrize(
    ("unquantized", "kinds"),
    [
        ("frozen", {"alpha"}),
        ("norms", {"alpha", "norm"}),
        ("all", {"alpha", "norm", "embed", "lm_head"}),
    ],
)
def test_what_else_is_trained_is_chosen(
    workshop: Workshop,
    training: dict[str, Artifact],
    start: Artifact,
    unquantized: str,
    kinds: set[str],
) -> None:
    # Fast enough for norms near 1 to leave their neighbourhood in bfloat16.
    rate = {} if unquantized == "frozen" else {"unquantized_lr": 1e-2}
    settings = SETTINGS | {"unquantized": unquantized} | rate
    changed = changed_tensors(start, workshop.make("distill", training, **settings))
    assert all(any(kind in name for kind in kinds) for name in changed)
    assert all(any(kind in name for name in changed) for kind in kinds)


def test_matrices_of_the_blocks_that_are_left_out_stay(
    workshop: Workshop, training: dict[str, Artifact]
) -> None:
    inputs = {slot: training[slot] for slot in ("model", "calibration")}
    start = workshop.make("init-fdb", inputs, levels="plain", exclude=("*.down_proj",))
    settings = SETTINGS | {"unquantized_lr": 1e-2}
    changed = changed_tensors(
        start, workshop.make("distill", training | {"student": start}, **settings)
    )
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= changed
    assert not any("down_proj" in name for name in changed)


def test_training_weights_changes_planes_too(
    workshop: Workshop, training: dict[str, Artifact], start: Artifact
) -> None:
    distilled = workshop.make("distill", training, **WEIGHTS, keep_latents=True)
    changed = changed_tensors(start, distilled)
    layers = {n.removesuffix(".alpha") for n in tensors_of(start) if n.endswith(".alpha")}
    assert any(name.removesuffix(".weight") in layers for name in changed)
    assert load_file(distilled.path / "latents.safetensors").keys() == layers


@pytest.mark.parametrize("settings", [SETTINGS, WEIGHTS], ids=["scales", "weights"])
@pytest.mark.parametrize("loss", ["kd", "dad", "ce"])
def test_the_figures_are_those_of_the_stored_model(
    workshop: Workshop,
    training: dict[str, Artifact],
    calibration: Artifact,
    llama_folder: Path,
    settings: dict[str, Any],
    loss: str,
) -> None:
    outcome = workshop.run("distill", training, **settings, loss=loss)
    start_path = training["student"].path
    assert outcome.metrics["held_out_loss_start"] == pytest.approx(
        held_out_loss(start_path, llama_folder, calibration, loss), rel=1e-4
    )
    stored = held_out_loss(outcome.artifact.path, llama_folder, calibration, loss)
    assert outcome.metrics["held_out_loss"] == pytest.approx(stored, rel=2e-3)
    assert stored < outcome.metrics["held_out_loss_start"]


def test_dad_with_gamma_of_zero_is_plain_distillation(
    workshop: Workshop, training: dict[str, Artifact], distilled: Artifact
) -> None:
    flat = workshop.make("distill", training, **SETTINGS, loss="dad", gamma=0.0)
    for name, tensor in tensors_of(distilled).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensors_of(flat)[name], tensor, rtol=2e-3, atol=1e-5)
    weighted = workshop.make("distill", training, **SETTINGS, loss="dad")
    assert weighted.digest not in {distilled.digest, flat.digest}


@pytest.mark.parametrize("ambiguity", ["student", "product", "cross"])
def test_each_ambiguity_trains_differently(
    workshop: Workshop, training: dict[str, Artifact], ambiguity: str
) -> None:
    dad = SETTINGS | {"loss": "dad"}
    teacher = workshop.make("distill", training, **dad)
    assert workshop.make("distill", training, **dad, ambiguity=ambiguity).digest != teacher.digest


def test_the_curve_has_every_step_and_its_measurements(distilled: Artifact) -> None:
    curve = curve_of(distilled)
    assert [entry["step"] for entry in curve] == list(range(13))
    assert [e["step"] for e in curve if "held_out" in e] == [0, 3, 6, 9, 12]


def test_the_start_is_kept_when_training_makes_it_worse(
    workshop: Workshop, training: dict[str, Artifact], start: Artifact
) -> None:
    outcome = workshop.run("distill", training, **(TOO_FAST | {"steps": 5}))
    assert outcome.metrics["best_step"] == 0
    assert outcome.metrics["held_out_loss"] == outcome.metrics["held_out_loss_start"]
    for name, tensor in tensors_of(outcome.artifact).items():
        assert torch.equal(tensor, tensors_of(start)[name]), name


def test_the_best_measurement_is_kept(
    workshop: Workshop, training: dict[str, Artifact], calibration: Artifact, llama_folder: Path
) -> None:
    settings = SETTINGS | {"eval_every": 1, "steps": 40, "scale_lr": 0.15, "warmup_steps": 6}
    outcome = workshop.run("distill", training, **settings)
    measured = {entry["step"]: entry["held_out"] for entry in curve_of(outcome.artifact)}
    best = outcome.metrics["best_step"]
    assert 0 < best < 40
    assert measured[best] == min(measured.values()) == outcome.metrics["held_out_loss"]
    stored = held_out_loss(outcome.artifact.path, llama_folder, calibration)
    assert stored == pytest.approx(measured[best], rel=2e-3)


def test_patience_stops_early(workshop: Workshop, training: dict[str, Artifact]) -> None:
    outcome = workshop.run("distill", training, **TOO_FAST, patience=3)
    assert outcome.metrics["steps"] == 3
    assert len(curve_of(outcome.artifact)) == 4


def test_the_seed_alone_draws_the_order(
    fresh: Workshop, workshop: Workshop, training: dict[str, Artifact], distilled: Artifact
) -> None:
    torch.manual_seed(99)
    assert fresh.make("distill", training, **SETTINGS).digest == distilled.digest
    assert workshop.make("distill", training, **SETTINGS, seed=1).digest != distilled.digest


@pytest.mark.parametrize("change", [{"save_every": 1}, {"recompute": False}])
def test_checkpoints_and_recomputing_change_nothing(
    fresh: Workshop, training: dict[str, Artifact], distilled: Artifact, change: dict[str, Any]
) -> None:
    settings = SETTINGS | change
    assert fresh.make("distill", training, **settings).digest == distilled.digest


def test_accumulated_batches_make_one_step_of_a_large_one(
    workshop: Workshop, training: dict[str, Artifact]
) -> None:
    whole = workshop.make("distill", training, **(SETTINGS | {"batch_size": 6, "loss": "kd"}))
    parts = workshop.make(
        "distill", training, **(SETTINGS | {"loss": "kd", "gradient_accumulation": 3})
    )
    losses = [[e["loss"] for e in curve_of(artifact)[1:]] for artifact in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("settings", [SETTINGS, WEIGHTS], ids=["scales", "weights"])
def test_killed_after_a_checkpoint_it_ends_with_the_same_bytes(
    killed_and_resumed: KilledAndResumed,
    training: dict[str, Artifact],
    workshop: Workshop,
    settings: dict[str, Any],
) -> None:
    undisturbed = workshop.make("distill", training, **settings)
    resumed = killed_and_resumed(
        "distill", training, ".scratch/*/checkpoint-4/state.json", **settings
    )
    assert resumed.digest == undisturbed.digest


def test_the_best_state_outlives_a_run_that_ends_before_its_checkpoint(
    fresh: Workshop, training: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = trainer.save_checkpoint

    def fail_at_step_3(scratch: Path, name: str, number: int, *rest: Any) -> None:
        if (name, number) == ("checkpoint", 3):
            raise OSError("the machine went down")
        saved(scratch, name, number, *rest)

    settings = SETTINGS | {"eval_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", fail_at_step_3)
        with pytest.raises(OSError, match="went down"):
            fresh.make("distill", training, **settings)
    # Elsewhere the steps that are run again may come out worse than the best so far.
    with monkeypatch.context() as patch:
        patch.setattr(math, "fsum", lambda losses: 1e9)
        outcome = fresh.run("distill", training, **settings)
    assert outcome.metrics["best_step"] == 2


def test_ended_between_early_stop_and_artifact_it_ends_with_the_same_bytes(
    workshop: Workshop,
    fresh: Workshop,
    training: dict[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = TOO_FAST | {"patience": 2, "save_every": 1}
    undisturbed = workshop.make("distill", training, **settings)

    def fail(*arguments: object) -> None:
        raise OSError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(distill, "write_requantized", fail)
        with pytest.raises(OSError, match="went down"):
            fresh.make("distill", training, **settings)
    assert fresh.make("distill", training, **settings).digest == undisturbed.digest


def test_without_a_held_out_part_the_last_step_is_kept(
    workshop: Workshop, training: dict[str, Artifact], llama: Artifact
) -> None:
    inputs = training | {"calibration": workshop.calibrate(llama, held_out=0)}
    outcome = workshop.run("distill", inputs, **SETTINGS)
    assert outcome.metrics["best_step"] == outcome.metrics["steps"] == 12
    assert outcome.metrics["held_out_loss"] is None


@pytest.mark.shared_data
def test_a_trained_models_held_out_loss_improves(workshop: Workshop, stories: Artifact) -> None:
    calibration = workshop.calibrate(
        stories, num_samples=16, held_out=8, sequence_length=64, batch_size=24
    )
    student = workshop.make("init-fdb", {"model": stories, "calibration": calibration})
    inputs = {"student": student, "model": stories, "calibration": calibration}
    settings = {"steps": 10, "eval_every": 5, "scale_lr": 5e-3}
    for trained in ({"train": "scales"}, {"train": "weights", "latent_lr": 5e-3}):
        metrics = workshop.run("distill", inputs, **settings, **trained).metrics
        assert metrics["held_out_loss"] < metrics["held_out_loss_start"] - 0.05
