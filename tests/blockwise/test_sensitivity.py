from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbllm_cli.blockwise import sensitivity
from dbllm_cli.blockwise.block_error import Sensitivity
from dbllm_cli.blockwise.sensitivity import drawn_labels, output_sensitivities
from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.llm.blocks import logits_after
from dbllm_cli.progress import SilentProgress
from dbllm_cli.tensors import save_tensors
from tests.llm.conftest import random_model
from tests.llm.test_blocks import FAMILIES


def _streamed(folder: Path, ids: Tensor, batch_size: int = 2) -> dict[int, Sensitivity]:
    task = SilentProgress().task("sensitivity", 6 * len(ids))
    with task as begun:
        return dict(output_sensitivities(StreamedModel(folder, "cpu"), ids, batch_size, 0, begun))


def _saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Under module names, which save_pretrained leaves for others in some families."""
    save_tensors(dict(model.named_parameters()), folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return model


def _expected(model: Any, ids: Tensor, labels: Tensor) -> list[Sensitivity]:
    """From the gradients that the whole model gives in float64."""
    model, outputs = model.double(), []

    def keep(module: object, args: object, output: Any) -> None:
        del module, args
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.retain_grad()
        outputs.append(hidden)

    hooks = [block.register_forward_hook(keep) for block in model.model.layers]
    model.model.embed_tokens.weight.requires_grad_(True)
    logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    chosen = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1))
    (-chosen.sum()).backward()
    found = []
    sequences, tokens = ids.shape
    for output in outputs:
        size = output.shape[-1]
        of_position = torch.zeros(tokens, size, size, dtype=torch.float64)
        for sequence in range(sequences):
            for token in range(tokens):
                gradient, hidden = output.grad[sequence, token], output.detach()[sequence, token]
                fisher = torch.outer(gradient, gradient) * hidden.square().sum()
                of_position[token] += fisher / sequences
        traces = torch.stack([matrix.trace() for matrix in of_position])
        directions = sum(m / t for m, t in zip(of_position, traces, strict=True)) / tokens
        found.append(Sensitivity(directions, traces))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_matrices_are_those_of_the_whole_model_s_gradients(
    llama: PreTrainedModel,
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    llama.save_pretrained(tmp_path)
    labels = (ids * 7 + 3) % 64
    waiting = iter(labels.flatten())
    monkeypatch.setattr(
        sensitivity,
        "drawn_labels",
        lambda logits, _: torch.stack(list(islice(waiting, len(logits)))),
    )
    found = _streamed(tmp_path, ids, batch_size)
    expected = _expected(type(llama).from_pretrained(tmp_path), ids, labels)
    assert list(found) == [2, 1, 0]
    for index, exact in enumerate(expected):
        for ours, theirs in zip(vars(found[index]).values(), vars(exact).values(), strict=True):
            assert torch.allclose(ours.double(), theirs, rtol=1e-3, atol=1e-5 * theirs.max())


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_every_family_has_sensitivities_and_the_same_ones_twice(
    config: Any, ids: Tensor, tmp_path: Path
) -> None:
    _saved(random_model(config), tmp_path)
    found, again = _streamed(tmp_path, ids), _streamed(tmp_path, ids)
    for index, felt in found.items():
        assert torch.isfinite(felt.directions).all()
        assert felt.directions.trace() == pytest.approx(1, rel=1e-3)
        assert (felt.positions > 0).all()
        assert torch.equal(felt.directions, again[index].directions)
        assert torch.equal(felt.positions, again[index].positions)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_what_comes_after_the_blocks_gives_the_model_s_own_logits(
    config: Any, ids: Tensor, tmp_path: Path
) -> None:
    model = _saved(random_model(config), tmp_path)
    streamed = StreamedModel(tmp_path, "cpu")
    hidden = streamed.embed(ids, 2)
    for index in range(len(streamed.blocks)):
        hidden = streamed.run_all(index, streamed.load_block(index), hidden, 2)
    logits = logits_after(streamed.model, streamed.blocks, hidden)
    expected = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_labels_are_drawn_as_the_model_predicts() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    logits = probabilities.log().expand(20_000, 4)
    labels = drawn_labels(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(labels, minlength=4) / len(labels)
    assert torch.allclose(shares, probabilities, atol=0.015)
    assert shares[1] == 0
