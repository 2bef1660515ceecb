"""How much a model's predictions change with its blocks' outputs, by direction and position."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dbllm_cli.blockwise.block_error import Sensitivity
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.llm.blocks import logits_after
from dbllm_cli.progress import Task


def output_sensitivities(
    model: StreamedModel, sequences: Tensor, batch_size: int, seed: int, task: Task
) -> Iterator[tuple[int, Sensitivity]]:
    """The Fisher matrices of every block's output, to first order in a small relative change of it.

    The mean of g·gᵀ, where g is the gradient, to a token's hidden state over its norm, of the
    cross-entropy of all tokens to labels drawn from the model's own predictions. The first token's
    would be most of a mean over all tokens: it has a trace of its own, as every position has.

    Args:
        model: the teacher; blocks run and are dropped one by one, forward and then backward.
        sequences: int64 token ids `[n, tokens]`; all blocks' inputs are in memory at once.
        batch_size: sequences at once.
        seed: of the labels.
        task: advanced by n for each block, forward and backward.

    Yields:
        Index of the block, the last one first, and its sensitivity.
    """
    states = [model.embed(sequences, batch_size)]
    for index in range(len(model.blocks)):
        block = model.load_block(index)
        states.append(model.run_all(index, block, states[-1], batch_size, task.advance))
        model.drop_block(index)
    gradient = _gradient_of_predictions(model, states[-1], seed)
    for index in reversed(range(len(model.blocks))):
        yield index, _sensitivity(gradient, states.pop(), model.device)
        if index:
            gradient = _gradient_before(model, index, states[-1], gradient, batch_size)
        task.advance(len(sequences))


def _sensitivity(gradient: Tensor, output: Tensor, device: str) -> Sensitivity:
    """From the gradients to hidden states `[n, tokens, hidden]`, in float32 on the CPU."""
    norms = output.to(torch.float32).norm(dim=-1, keepdim=True)
    relative = gradient.to(torch.float32) * norms
    traces = relative.square().sum(-1).mean(0)
    alike = relative / traces.clamp(min=1e-30).sqrt().unsqueeze(-1)
    rows = alike.flatten(0, 1).to(device)
    directions: Tensor = rows.t() @ rows / len(rows)
    return Sensitivity(directions.cpu(), traces.cpu())


@torch.enable_grad()
def _gradient_of_predictions(model: StreamedModel, hidden: Tensor, seed: int) -> Tensor:
    """To the last block's output, `[n, tokens, hidden]`."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.empty_like(hidden)
    # One sequence at a time: its logits are larger than all else that is in memory.
    for rows in torch.arange(len(hidden)).split(1):
        leaf = hidden[rows].to(model.device).requires_grad_()
        logits = logits_after(model.model, model.blocks, leaf).to(torch.float32).flatten(0, 1)
        loss = cross_entropy(logits, drawn_labels(logits.detach(), generator), reduction="sum")
        gradient[rows] = torch.autograd.grad(loss, leaf)[0].cpu()
    return gradient


def drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A label for every row, drawn from the softmax of `[tokens, vocabulary]`; int64 `[tokens]`."""
    sums = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(len(sums), 1, generator=generator).to(sums.device)
    return torch.searchsorted(sums, uniform * sums[:, -1:]).squeeze(-1).clamp(max=sums.shape[1] - 1)


@torch.enable_grad()
def _gradient_before(
    model: StreamedModel, index: int, entering: Tensor, gradient: Tensor, batch_size: int
) -> Tensor:
    """To what enters a block, from the gradient to its output."""
    block = model.load_block(index)
    before = torch.empty_like(gradient)
    for rows in torch.arange(len(entering)).split(batch_size):
        leaf = entering[rows].to(model.device).requires_grad_()
        output = model.run_block(index, block, leaf)
        towards = gradient[rows].to(output)
        before[rows] = torch.autograd.grad(output, leaf, towards)[0].cpu()
    model.drop_block(index)
    return before
