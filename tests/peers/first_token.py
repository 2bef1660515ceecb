"""How much predictions feel the first token's hidden state, and whether students keep it.

    python tests/peers/first_token.py TEACHER CALIBRATION artifacts/fdb-… artifacts/fdb-…

TEACHER is a model folder. First, for every block of the teacher: the norm of its output, and the
trace of its Fisher matrix (what predictions feel of a small relative change), of the first token
and the mean of the others, over 16 training sequences. Then for every student, over the held-out
part: KL(teacher || student) in nats a token, of each sequence too, and for every block the relative
square error of the first token (mean over the sequences) and of the others (median).
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dbllm_cli.blockwise.sensitivity import output_sensitivities
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.llm.blocks import find_blocks
from dbllm_cli.llm.models import Model, load_model
from dbllm_cli.progress import SilentProgress

SEQUENCES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("students", type=Path, nargs="*")
    options = parser.parse_args()
    tokens = load_file(options.calibration / "tokens.safetensors")
    teacher = load_model(options.teacher, torch.bfloat16)
    outputs, predictions = run(teacher, tokens["held_out"].long())
    norms = outputs.norm(dim=-1).mean(0)
    streamed = StreamedModel(options.teacher, "cpu", dtype=torch.bfloat16)
    print("block: norm of the first token, of others; trace of the first token, of others")
    with SilentProgress().task("sensitivity", 1) as task:
        train = tokens["train"][:SEQUENCES].long()
        for index, felt in output_sensitivities(streamed, train, 4, 0, task):
            of_both = *first_and_mean(norms[index]), *first_and_mean(felt.positions)
            print(f"{index:3}:", *(f"{value:10.4g}" for value in of_both))
    for student in options.students:
        ours, guessed = run(load_model(student, torch.bfloat16), tokens["held_out"].long())
        divergence = (predictions.exp() * (predictions - guessed)).sum(-1)
        of_each = " ".join(f"{value:.3f}" for value in divergence.mean(-1).tolist())
        print(f"\n{student.name}: KL {divergence.mean():.4f}; of each sequence {of_each}")
        errors = (ours - outputs).square().sum(-1) / outputs.square().sum(-1)
        for index in range(errors.shape[1]):
            first, others = errors[:, index, 0].mean(), errors[:, index, 1:].median()
            print(f"{index:3}: first token {first:.4f}, others {others:.4f}")


def first_and_mean(of_positions: Tensor) -> tuple[float, float]:
    return float(of_positions[0]), float(of_positions[1:].mean())


@torch.inference_mode()
def run(model: Model, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the blocks `[n, blocks, tokens, hidden]`, log-probabilities `[n, tokens, v]`."""
    seen: list[Tensor] = []
    for block in find_blocks(model).modules:
        block.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    outputs, predictions = [], []
    for row in sequences.split(1):
        seen.clear()
        logits = model(input_ids=row, use_cache=False).logits[0]
        predictions.append(logits.to(torch.float32).log_softmax(-1))
        outputs.append(torch.cat(seen).to(torch.float32))
    return torch.stack(outputs), torch.stack(predictions)


if __name__ == "__main__":
    main()
