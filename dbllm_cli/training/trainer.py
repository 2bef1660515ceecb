"""The training of distill: end to end against the teacher's predictions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.quantized import QuantizedMatrix, latent_start
from dbllm_cli.llm.blocks import find_blocks
from dbllm_cli.llm.heads import final_hidden, head, head_parameters
from dbllm_cli.llm.models import Model
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.progress import Progress, Task
from dbllm_cli.records.calibration import Calibration
from dbllm_cli.records.checkpoints import (
    drop_checkpoints,
    last_checkpoint,
    read_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from dbllm_cli.records.metrics import TrainingMetrics
from dbllm_cli.training.batches import Batches
from dbllm_cli.training.layers import LatentLinear
from dbllm_cli.training.losses import (
    DistillationLoss,
    Heads,
    LossAndGradient,
    distillation_loss,
)
from dbllm_cli.training.optimizer import RelativeAdamW, schedule_factor
from dbllm_cli.training.student import as_stored, make_trainable, unquantized_parameters

_ROUNDED_SHARE = 0.25
"""Of the steps, at the end, in which scales train through their rounding."""


@dataclass(frozen=True)
class TrainerOptions:
    """How the student trains; `configs.DistillConfig` says what each is."""

    train: str
    loss: str
    ambiguity: str
    gamma: float
    plain_weight: float
    steps: int
    batch_size: int
    gradient_accumulation: int
    latent_lr: float
    scale_lr: float
    unquantized: str
    unquantized_lr: float
    warmup_steps: int
    clip: float
    eval_every: int
    patience: int
    save_every: int
    keep_latents: bool
    recompute: bool
    seed: int


class TeacherAndStudent(NamedTuple):
    """The full-precision model, and the quantized one that trains."""

    teacher: Model
    student: Model


class Trainer:
    """Teacher, student and the state of one run.

    Args:
        options: how it trains.
        models: the teacher, and the student loaded to train.
        student: the artifact.
        calibration: sequences to train on, and the held-out part.
        scratch: where checkpoints are kept.
        progress: where the tokens are reported.
    """

    def __init__(
        self,
        options: TrainerOptions,
        models: TeacherAndStudent,
        student: PackedFolder,
        calibration: Calibration,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self.options, self.scratch, self.progress = options, scratch, progress
        self.teacher, self.model = models
        self.device = self.model.device
        self.calibration = calibration
        self.sequences = calibration.train
        self.batches = Batches(len(self.sequences), options.batch_size, options.seed)
        to_logits = head(self.model), head(self.teacher)
        self.loss = DistillationLoss(
            options.loss, options.ambiguity, options.gamma, options.plain_weight
        )
        blocks = find_blocks(self.model).modules
        latents_from = self.teacher if options.train == "weights" else None
        self.layers = make_trainable(self.model, student, latents_from)
        if options.recompute:
            _recompute(blocks)
        self.others = unquantized_parameters(self.model, blocks, options.unquantized)
        self.stored_dtype = student.dtype
        trained = tuple(p for p in head_parameters(self.model) if p.requires_grad)
        self.heads = Heads(*to_logits, trained)
        self.optimizer = RelativeAdamW(
            self.layers,
            options.latent_lr,
            options.scale_lr,
            {n: p for n, p in self.model.named_parameters() if n in self.others},
            options.unquantized_lr,
        )
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.worse = 0

    # -- the loop ---------------------------------------------------------------------------------

    def train(self) -> TrainingMetrics:
        """Run all steps, from the last checkpoint if there is one."""
        options = self.options
        first = self._resume()
        tokens = options.batch_size * options.gradient_accumulation * self.sequences.shape[1]
        with self.progress.task(
            "distill", options.steps * tokens, first * tokens, "tokens"
        ) as task:
            if first == 0:
                self._measure(0)
            for step in range(first, options.steps):
                if options.patience and self.worse >= options.patience:
                    self.progress.note(f"no better {self.worse} times: stopped early")
                    break
                entry = self._step(step, task)
                self.curve.append(entry)
                done = step + 1
                if done % options.eval_every == 0 or done == options.steps:
                    self._measure(done)
                # The best state that a checkpoint tells of must always be on disk.
                if done % options.save_every == 0 or self.best.get("step") == done:
                    self._save(done)
        start = next((e["held_out"] for e in self.curve if e["step"] == 0), math.nan)
        return {
            "steps": int(self.curve[-1]["step"]),
            "best_step": int(self.best.get("step", self.curve[-1]["step"])),
            "held_out_loss_start": start if math.isfinite(start) else None,
            "held_out_loss": self.best.get("held_out"),
            "training_loss": self.curve[-1].get("loss"),
        }

    def _step(self, step: int, task: Task) -> dict[str, float]:
        options = self.options
        self._round_late(step)
        parts = options.gradient_accumulation
        loss = plain = 0.0
        for number in range(parts):
            chosen = self.batches.indices(step * parts + number)
            batch = self.sequences[chosen].to(self.device)
            hidden, outcome = self._forward(batch)
            loss += float(outcome.loss) / parts
            plain += float(outcome.plain) / parts
            _require_finite_training("loss", loss, step + 1)
            hidden.backward(outcome.gradient / parts)
            for parameter, gradient in zip(self.heads.trained, outcome.head_gradients, strict=True):
                _add_gradient(parameter, gradient.div_(parts))
            task.advance(batch.numel(), loss=loss)
            # Gradients as large as the head would stay through the next batch.
            del hidden, outcome
        norm = float(clip_grad_norm_(self.optimizer.parameters(), options.clip))
        _require_finite_training("norm of the gradient", norm, step + 1)
        self.optimizer.step(schedule_factor(step, options.steps, options.warmup_steps))
        return {"step": step + 1, "loss": loss, "plain_loss": plain, "gradient_norm": norm}

    def _round_late(self, step: int) -> None:
        """Let scales train as they are, and at the end through their rounding.

        From the start the steps of codes would be too coarse: all of a layer's would go at once.
        """
        late = step >= self.options.steps * (1 - _ROUNDED_SHARE)
        for layer in self.layers.values():
            layer.rounds_scales = late and layer.scheme.trains_rounded

    def _forward(self, batch: Tensor) -> tuple[Tensor, LossAndGradient]:
        """The student's hidden states and the loss with its gradient to them."""
        with torch.no_grad():
            target = (
                final_hidden(self.teacher, batch) if self.options.loss != "ce" else torch.empty(0)
            )
        kind = self.device.type
        with torch.autocast(kind, self.teacher.dtype, self.teacher.dtype != torch.float32):
            hidden = final_hidden(self.model, batch)
            outcome = distillation_loss(self.loss, hidden, target, batch, self.heads)
        return hidden, outcome

    # -- measuring and keeping the best --------------------------------------------------

    @torch.no_grad()
    def _measure(self, step: int) -> None:
        """The unweighted loss on the held-out part; the best state is kept in scratch."""
        if not len(self.calibration.held_out):
            return
        losses = []
        with as_stored(self.layers.values(), self.others.values(), self.stored_dtype):
            for batch in self.calibration.held_out.split(self.options.batch_size):
                _, outcome = self._forward(batch.to(self.device))
                losses.append(float(outcome.plain) * len(batch))
        value = math.fsum(losses) / len(self.calibration.held_out)
        _require_finite_training("held-out loss", value, step)
        if step == 0:
            self.curve.append({"step": 0, "held_out": value})
        else:
            self.curve[-1]["held_out"] = value
        self.progress.note(f"step {step}: held-out loss {value:.4f}")
        if not self.best or value < self.best["held_out"]:
            self.best, self.worse = {"step": step, "held_out": value}, 0
            write_checkpoint(self.scratch, "best", step, self._weights(), dict(self.best))
        else:
            self.worse += 1

    def _weights(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.optimizer.state_tensors().items() if ":" not in n}

    def restore_best(self) -> None:
        """Go back to the best measurement; without a held-out part stay where it is."""
        if self.best:
            weights, _ = read_checkpoint(self.scratch, "best", int(self.best["step"]))
            self.optimizer.load_state_tensors(weights)

    def trained_layers(self) -> Iterator[tuple[str, QuantizedMatrix, Tensor | None]]:
        """Every layer as it is stored, and its latent weights where they are kept."""
        for name, layer in self.layers.items():
            quantized, latent = layer.quantize(), None
            if self.options.keep_latents and isinstance(layer, LatentLinear):
                # The cells of the start are not those of the scales that are stored.
                latent = latent_start(quantized, layer.latent.detach())
            yield name, quantized, latent

    # -- resuming --------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        state: dict[str, Any] = {
            "step": step,
            "curve": self.curve,
            "best": self.best,
            "worse": self.worse,
        }
        tensors = self.optimizer.state_tensors()
        save_checkpoint(self.scratch, "checkpoint", step, tensors, state)
        if self.best:
            # Not before: until now the last checkpoint told of an older one.
            drop_checkpoints(self.scratch, "best", int(self.best["step"]))

    def _resume(self) -> int:
        found = last_checkpoint(self.scratch, "checkpoint")
        if found is None:
            return 0
        tensors, state = found
        self.optimizer.load_state_tensors(tensors)
        self.curve = cast("list[dict[str, float]]", state["curve"])
        self.best = cast("dict[str, float]", state["best"])
        self.worse = cast(int, state["worse"])
        return cast(int, state["step"])


def _require_finite_training(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise StageFailedError(
            f"distill: the {name} is {value} at step {step}",
            "lower --scale-lr and --latent-lr, or use --compute-dtype float32",
        )


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _recompute(blocks: nn.ModuleList) -> None:
    """Recompute each block in backward instead of keeping its activations and dense weights."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
