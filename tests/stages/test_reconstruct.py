from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dbllm_cli.blockwise import reconstruction
from dbllm_cli.errors import StageFailedError
from dbllm_cli.llm.models import load_model
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.stages.block_outputs import block_errors, hidden_after, relative_error
from tests.stages.conftest import KilledAndResumed
from tests.tiny_models import dequantized, levels_of

SETTINGS: dict[str, Any] = {"batch_size": 3, "passes": 12, "warmup_steps": 1}
ALMOST_STILL: dict[str, Any] = SETTINGS | {"passes": 1, "latent_lr": 1e-12, "scale_lr": 1e-12}


@pytest.fixture
def reconstructed(workshop: Workshop, training: dict[str, Artifact]) -> Artifact:
    return workshop.make("reconstruct", training, **SETTINGS)


def tensors_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path / "model.safetensors")


def test_every_blocks_output_comes_nearer_to_the_teachers(
    reconstructed: Artifact, start: Artifact, llama_folder: Path, ids: torch.Tensor
) -> None:
    before = block_errors(start, llama_folder, ids)
    after = block_errors(reconstructed, llama_folder, ids)
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True))


def test_the_errors_that_it_tells_are_those_of_the_stored_model(
    workshop: Workshop,
    training: dict[str, Artifact],
    llama_folder: Path,
    ids: torch.Tensor,
) -> None:
    outcome = workshop.run("reconstruct", training, **SETTINGS)
    errors = block_errors(outcome.artifact, llama_folder, ids)
    told = [block["error_after"] for block in outcome.metrics["blocks"]]
    assert told == pytest.approx(errors, rel=0.02)
    assert all(block["error_after"] < block["error_before"] for block in outcome.metrics["blocks"])


def test_a_window_of_two_blocks_serves_the_full_precision_block_after_it(
    workshop: Workshop,
    training: dict[str, Artifact],
    llama_folder: Path,
    ids: torch.Tensor,
) -> None:
    errors = []
    for window in (1, 2):
        fdb = workshop.make("reconstruct", training, **SETTINGS, window=window)
        teacher, mixed = (load_model(llama_folder, torch.float32) for _ in range(2))
        mixed.model.layers[0] = load_model(fdb.path, torch.float32).model.layers[0]
        exact, found = (hidden_after(model, ids, 1) for model in (teacher, mixed))
        errors.append(relative_error(found, exact))
    assert errors[1] < errors[0]


def test_a_block_trained_on_the_teachers_tokens_serves_them_and_not_the_students(
    workshop: Workshop, training: dict[str, Artifact], llama_folder: Path, ids: torch.Tensor
) -> None:
    in_teacher, in_student = [], []
    exact = hidden_after(load_model(llama_folder, torch.float32), ids, 1)
    for share in (0.0, 0.5, 1.0):
        settings = SETTINGS | {"window": 1, "teacher_inputs": share}
        fdb = workshop.make("reconstruct", training, **settings)
        teacher, student = (load_model(p, torch.float32) for p in (llama_folder, fdb.path))
        in_student.append(relative_error(hidden_after(student, ids, 1), exact))
        teacher.model.layers[1] = student.model.layers[1]
        in_teacher.append(relative_error(hidden_after(teacher, ids, 1), exact))
    assert in_teacher[0] > in_teacher[1] > in_teacher[2]
    assert in_student[0] < in_student[1] < in_student[2]


def test_latent_decay_leaves_more_weights_in_the_cells_where_they_start(
    workshop: Workshop, training: dict[str, Artifact], start: Artifact
) -> None:
    before = tensors_of(start)
    moved = []
    for decay in (0.0, 1.2, 30.0):
        after = tensors_of(workshop.make("reconstruct", training, **SETTINGS, latent_decay=decay))
        planes = [name for name in before if before[name].dtype == torch.uint8]
        moved.append(sum(int((before[name] != after[name]).sum()) for name in planes))
    assert moved[0] > 1.1 * moved[1] > 1.1 * moved[2] > 0


def test_a_student_with_embeddings_of_its_own_is_trained_on_what_they_give(
    workshop: Workshop,
    training: dict[str, Artifact],
    llama_folder: Path,
    ids: torch.Tensor,
) -> None:
    fast = {"steps": 6, "warmup_steps": 0, "unquantized_lr": 0.1, "eval_every": 6}
    student = workshop.make("distill", training, **fast)
    outcome = workshop.run("reconstruct", training | {"student": student}, **ALMOST_STILL)
    errors = block_errors(outcome.artifact, llama_folder, ids)
    told = [block["error_after"] for block in outcome.metrics["blocks"]]
    assert told == pytest.approx(errors, rel=0.02)


def test_what_is_stored_is_what_the_latent_weights_give(reconstructed: Artifact) -> None:
    tensors = tensors_of(reconstructed)
    latents = load_file(reconstructed.path / "latents.safetensors")
    assert len(latents) == 14
    for name, latent in latents.items():
        levels = levels_of(tensors, name).repeat_interleave(64, dim=-1)[..., : latent.shape[1]]
        nearest = (levels - latent).abs().min(0).values
        dense = dequantized(tensors, name, latent.shape[1])
        torch.testing.assert_close((dense - latent).abs(), nearest, rtol=0, atol=1e-6)


def test_training_without_latent_weights_starts_from_the_planes_as_they_are(
    workshop: Workshop, training: dict[str, Artifact]
) -> None:
    # Its planes are no longer those that the teacher's weights would give.
    student = workshop.make("reconstruct", training, **SETTINGS, keep_latents=False)
    still = workshop.make("reconstruct", training | {"student": student}, **ALMOST_STILL)
    for name, tensor in tensors_of(student).items():
        assert torch.equal(tensor, tensors_of(still)[name]), name


def test_training_goes_on_from_stored_latent_weights(
    workshop: Workshop, training: dict[str, Artifact], reconstructed: Artifact
) -> None:
    student = training | {"student": reconstructed}
    still = workshop.make("reconstruct", student, **ALMOST_STILL)
    before, after = (
        load_file(artifact.path / "latents.safetensors") for artifact in (reconstructed, still)
    )
    for name, latent in before.items():
        torch.testing.assert_close(after[name], latent, rtol=0, atol=1e-7)
    for name, tensor in tensors_of(reconstructed).items():
        assert torch.equal(tensor, tensors_of(still)[name]), name


def test_latent_weights_are_left_out_when_told_to(
    workshop: Workshop, training: dict[str, Artifact], reconstructed: Artifact
) -> None:
    without = workshop.make("reconstruct", training, **SETTINGS, keep_latents=False)
    assert not list(without.path.glob("latents*"))
    for name, tensor in tensors_of(reconstructed).items():
        assert torch.equal(tensor, tensors_of(without)[name]), name


def test_layers_left_out_by_init_fdb_stay_as_they_are(
    workshop: Workshop, training: dict[str, Artifact], llama: Artifact
) -> None:
    student = workshop.make("init-fdb", {"model": llama}, exclude=("*.layers.0.*", "*.q_proj"))
    trained = workshop.make("reconstruct", training | {"student": student}, **SETTINGS)
    before, after = tensors_of(student), tensors_of(trained)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers.1." in name and "q_proj" not in name for name in changed)


def test_killed_after_its_first_block_it_ends_with_the_same_bytes(
    workshop: Workshop, killed_and_resumed: KilledAndResumed, training: dict[str, Artifact]
) -> None:
    settings = SETTINGS | {"window": 2}
    resumed = killed_and_resumed(
        "reconstruct", training, ".scratch/*/report-1/state.json", **settings
    )
    assert resumed.digest == workshop.make("reconstruct", training, **settings).digest


def test_the_seed_alone_draws_the_order(
    workshop: Workshop,
    fresh: Workshop,
    training: dict[str, Artifact],
    reconstructed: Artifact,
) -> None:
    torch.manual_seed(99)
    assert fresh.make("reconstruct", training, **SETTINGS).digest == reconstructed.digest
    other = workshop.make("reconstruct", training, **SETTINGS, seed=1)
    assert other.digest != reconstructed.digest


def test_bfloat16_comes_close_to_float32(workshop: Workshop, training: dict[str, Artifact]) -> None:
    errors = [
        workshop.run("reconstruct", training, **SETTINGS, compute_dtype=dtype).metrics["mean_error"]
        for dtype in ("float32", "bfloat16")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_a_loss_that_is_no_number_ends_the_stage(
    fresh: Workshop, training: dict[str, Artifact]
) -> None:
    with pytest.raises(StageFailedError, match="the loss of block 0 is") as caught:
        fresh.make(
            "reconstruct", training, **SETTINGS, beyond={"latent_lr": 1e30, "scale_lr": 1e30}
        )
    assert "--latent-lr" in caught.value.hint
    assert fresh.store.artifacts() == []


def test_scales_that_float16_can_not_hold_end_the_stage(
    fresh: Workshop, training: dict[str, Artifact]
) -> None:
    one_step = {"batch_size": 6, "passes": 1, "warmup_steps": 0, "beyond": {"scale_lr": 1e8}}
    with pytest.raises(StageFailedError, match="not finite in float16"):
        fresh.make("reconstruct", training, **one_step)


@pytest.mark.parametrize("passes", [1, 3])
def test_latent_weights_are_drawn_back_by_the_same_share_over_a_block_whatever_the_steps(
    fresh: Workshop,
    training: dict[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    passes: int,
) -> None:
    made = reconstruction.RelativeAdamW
    decays: list[float] = []

    def watched(*arguments: Any, latent_decay: float, **options: Any) -> Any:
        decays.append(latent_decay)
        return made(*arguments, latent_decay=latent_decay, **options)

    monkeypatch.setattr(reconstruction, "RelativeAdamW", watched)
    fresh.make("reconstruct", training, passes=passes, batch_size=2, latent_decay=0.6)
    steps = 3 * passes  # of six sequences
    assert decays == pytest.approx([0.6 / steps] * 2)
