from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbllm_cli.blockwise.streamed_model import StreamedModel
from dbllm_cli.llm.blocks import layer_shape
from dbllm_cli.tensors import TensorFolder
from tests.llm.conftest import llama_config, random_model
from tests.llm.test_blocks import FAMILIES


def _states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Hidden states before the first block and after each, from the model whole."""
    states: list[Tensor] = []
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    states.extend(output.hidden_states)
    return states


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_streaming_block_by_block_gives_the_whole_model_s_hidden_states(
    tmp_path: Path, ids: Tensor, llama: PreTrainedModel, batch_size: int
) -> None:
    llama.save_pretrained(tmp_path)
    expected = _states(llama, ids)
    streamed = StreamedModel(tmp_path, "cpu")
    hidden = streamed.embed(ids, batch_size)
    assert torch.equal(hidden, expected[0])
    done: list[int] = []
    for index in range(len(streamed.blocks)):
        block = streamed.load_block(index)
        hidden = streamed.run_all(index, block, hidden, batch_size, done.append)
        streamed.drop_block(index)
        if index < len(streamed.blocks) - 1:  # the last is given after the final norm
            assert torch.allclose(hidden, expected[index + 1], rtol=1e-5, atol=1e-5)
    assert sum(done) == len(streamed.blocks) * len(ids)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_every_family_streams_in_the_dtype_asked_for(
    config: object, dtype: torch.dtype, near: float, tmp_path: Path, ids: Tensor
) -> None:
    model = random_model(config)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path, "cpu", dtype=dtype)
    block, hidden = streamed.load_block(0), streamed.embed(ids, 2)
    assert {hidden.dtype, *(parameter.dtype for parameter in block.parameters())} == {dtype}
    hidden = streamed.run_all(0, block, hidden, 2)
    assert hidden.dtype == dtype
    assert torch.allclose(hidden, _states(model.to(dtype), ids)[1], rtol=near, atol=10 * near)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_matrices_are_read_in_float32_inputs_last(config: object, tmp_path: Path) -> None:
    model = random_model(config)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path, "cpu", dtype=torch.bfloat16)
    for index in range(len(streamed.blocks)):
        streamed.load_block(index)
    for name, module in streamed.blocks.linear_layers():
        matrix = streamed.matrix(name)
        whole = model.get_submodule(name)
        offset = 0 if whole.bias is None else whole.bias
        x = torch.ones(layer_shape(module)[0])
        assert torch.allclose(matrix @ x + offset, whole(x), rtol=1e-5, atol=1e-5), name


def test_only_the_block_asked_for_is_in_memory(tmp_path: Path) -> None:
    random_model(llama_config()).save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path, "cpu")

    def loaded() -> list[bool]:
        blocks = streamed.blocks.modules
        return [not any(p.is_meta for p in block.parameters()) for block in blocks]

    assert loaded() == [False, False, False]
    block = streamed.load_block(1)
    assert loaded() == [False, True, False]
    assert not any(parameter.requires_grad for parameter in block.parameters())
    streamed.drop_block(1)
    assert loaded() == [False, False, False]


def test_bfloat16_checkpoints_stream_in_float32(tmp_path: Path, ids: Tensor) -> None:
    random_model(llama_config()).bfloat16().save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path, "cpu")
    assert streamed.embed(ids, 5).dtype == torch.float32
    assert {p.dtype for p in streamed.load_block(0).parameters()} == {torch.float32}


def test_a_block_is_read_once_for_its_weights_as_they_run_and_as_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(llama_config()).save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path, "cpu", dtype=torch.bfloat16)
    read: list[str] = []
    get = TensorFolder.get
    monkeypatch.setattr(
        TensorFolder, "get", lambda self, name: read.append(name) or get(self, name)
    )
    block = streamed.load_block(1)
    for name, _ in streamed.blocks.linear_layers():
        if name.startswith(f"{streamed.blocks.name(1)}."):
            assert streamed.matrix(name).dtype == torch.float32
    streamed.drop_block(1)
    assert sorted(read) == sorted(f"{streamed.blocks.name(1)}.{n}" for n in block.state_dict())
