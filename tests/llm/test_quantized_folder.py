"""Folders of quantized models, and transformers opening them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.quantized import QuantizedMatrix, quantize_matrix
from dbllm_cli.formats.dense import FORMAT
from dbllm_cli.kernels import cpu_kernels
from dbllm_cli.llm.blocks import find_blocks, layer_shape, matrix_of
from dbllm_cli.llm.models import load_model, module_tensor_names
from dbllm_cli.llm.quantized_folder import (
    LATENTS,
    PackedFolder,
    layer_tensors,
    quantized_config,
    write_requantized,
)
from dbllm_cli.llm.quantizer import DbllmConfig, register
from dbllm_cli.store.json_file import write_json
from dbllm_cli.tensors import ShardWriter, TensorFolder
from tests.llm.conftest import VOCABULARY, llama_config, random_model

GROUP = 16
WITH_KERNEL = 32
KEPT = "0.mlp.down_proj"
_GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
)


def _write(
    model: PreTrainedModel, folder: Path, group_size: int = GROUP
) -> dict[str, QuantizedMatrix]:
    """Quantize all linear layers of the blocks but one, and write what init-fdb would."""
    folder.mkdir(exist_ok=True)
    layers = {}
    kept = []
    for name, module in find_blocks(model).linear_layers():
        if name.endswith(KEPT):
            kept.append(name)
            continue
        matrix = matrix_of(module, model.get_parameter(f"{name}.weight"))
        scales = fit_scales(matrix, group_size, "als")
        layers[name] = quantize_matrix(matrix, scales, group_size)
    with ShardWriter(folder) as writer:
        for name, quantized in layers.items():
            writer.add_all(layer_tensors(name, quantized))
        state = model.state_dict()
        replaced = {f"{name}.weight" for name in layers}
        writer.add_all((n, state[n]) for n in module_tensor_names(model) if n not in replaced)
    config = quantized_config(model.config.to_diff_dict(), group_size, kept, "float32")
    config["architectures"] = [type(model).__name__]
    write_json(folder / "config.json", config)
    return layers


def _dense_twin(model: PreTrainedModel, layers: dict[str, QuantizedMatrix]) -> PreTrainedModel:
    """The model with the dequantized matrices in the place of its own."""
    with torch.no_grad():
        for name, quantized in layers.items():
            module = model.get_submodule(name)
            model.get_parameter(f"{name}.weight").copy_(matrix_of(module, quantized.dense()))
    return model


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


_MODELS = [llama_config(), llama_config(tie_word_embeddings=True), _GPT2]


@pytest.mark.parametrize("config", _MODELS, ids=["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize("group_size", [GROUP, WITH_KERNEL])
def test_transformers_loads_a_packed_model_with_the_logits_of_its_dense_twin(
    config: PreTrainedConfig, group_size: int, tmp_path: Path, ids: Tensor
) -> None:
    model = random_model(config)
    layers = _write(model, tmp_path, group_size)
    packed = load_model(tmp_path, torch.float32)
    assert sum(isinstance(module, FdbLinear) for module in packed.modules()) == len(layers)
    expected = _logits(_dense_twin(model, layers), ids)
    assert torch.allclose(
        _logits(packed, ids), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
    )


@pytest.mark.parametrize("group_size", [GROUP, WITH_KERNEL])
def test_loading_in_bfloat16_keeps_planes_and_scales_as_stored(
    tmp_path: Path, group_size: int
) -> None:
    layers = _write(random_model(llama_config()), tmp_path, group_size)
    packed = load_model(tmp_path, torch.bfloat16)
    for name, quantized in layers.items():
        module = packed.get_submodule(name)
        assert isinstance(module, FdbLinear)
        loaded = module.quantized
        assert loaded.scales.dtype == torch.float16
        assert torch.equal(loaded.scales, quantized.scales)
        assert torch.equal(loaded.weight, quantized.weight)


@pytest.mark.parametrize("group_size", [GROUP, WITH_KERNEL])
def test_a_packed_model_saves_and_loads_again(tmp_path: Path, ids: Tensor, group_size: int) -> None:
    _write(random_model(llama_config()), tmp_path / "first", group_size)
    packed = load_model(tmp_path / "first", torch.float32)
    layers = [module for module in packed.modules() if isinstance(module, FdbLinear)]
    tiled = group_size == WITH_KERNEL and cpu_kernels() is not None
    assert {layer.tiles is not None for layer in layers} == {tiled}
    packed.save_pretrained(tmp_path / "second")
    again = load_model(tmp_path / "second", torch.float32)
    assert torch.equal(_logits(again, ids), _logits(packed, ids))


def test_registering_twice_does_nothing() -> None:
    register()
    register()


def test_a_newer_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    _write(random_model(llama_config()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    write_json(tmp_path / "config.json", config)
    register()
    with pytest.raises(ValueError, match="pip install --upgrade dbllm"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert DbllmConfig(group_size=32).to_dict()["quant_method"] == "dbllm"


def test_layers_are_read_as_they_were_written_and_the_rest_beside_them(tmp_path: Path) -> None:
    model = random_model(llama_config())
    layers = _write(model, tmp_path)
    folder = PackedFolder(tmp_path)
    assert folder.group_size == GROUP
    assert folder.layer_names() == sorted(layers)
    for name, quantized in layers.items():
        stored = folder.layer(name, quantized.in_features)
        assert torch.equal(stored.weight, quantized.weight)
        assert torch.equal(stored.scales, quantized.scales)
    others = dict(folder.other_tensors())
    assert f"model.layers.{KEPT}.weight" in others
    assert not any(name.removesuffix(".weight") in layers for name in others)
    assert len(others) + len(layers) == len(module_tensor_names(model))


def test_a_folder_that_is_not_dbllm_s_is_refused(tmp_path: Path) -> None:
    random_model(llama_config()).save_pretrained(tmp_path)
    with pytest.raises(ArtifactCorruptError, match="no quantization_config of dbllm"):
        PackedFolder(tmp_path)


def test_a_layer_of_the_wrong_shape_is_refused_by_name(tmp_path: Path) -> None:
    layers = _write(random_model(llama_config()), tmp_path)
    name, quantized = next(iter(layers.items()))
    with pytest.raises(ArtifactCorruptError, match=name):
        PackedFolder(tmp_path).layer(name, quantized.in_features + 8)


@pytest.mark.parametrize("with_latents", [False, True])
def test_requantizing_writes_new_planes_and_keeps_all_else(
    tmp_path: Path, with_latents: bool
) -> None:
    model = random_model(llama_config())
    layers = _write(model, tmp_path / "student")
    (tmp_path / "student" / "tokenizer.json").write_text("{}")
    (tmp_path / "student" / "metrics.json").write_text("{}")
    student = PackedFolder(tmp_path / "student")
    out = tmp_path / "out"
    out.mkdir()
    changed = {
        name: quantize_matrix(-q.dense(), q.scales.float(), GROUP) for name, q in layers.items()
    }
    latents = {name: -q.dense() for name, q in layers.items()} if with_latents else {}
    write_requantized(student, out, ((n, q, latents.get(n)) for n, q in changed.items()))
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["config.json", "model.safetensors", "tokenizer.json"]
        + (["latents.safetensors"] if with_latents else [])
    )
    written = PackedFolder(out)
    for name, quantized in changed.items():
        stored = written.layer(name, quantized.in_features)
        assert torch.equal(stored.weight, quantized.weight)
        teacher = torch.full((stored.weight.shape[1], stored.in_features), 100.0)
        start = written.latent(name, stored, teacher)
        assert (
            torch.equal(start, latents[name]) if with_latents else not torch.equal(start, teacher)
        )
        assert torch.equal(quantize_matrix(start, stored.scales, GROUP).weight, stored.weight)
    before = dict(student.other_tensors())
    after = dict(written.other_tensors())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert TensorFolder(out).names() == student.tensors.names()
    assert (LATENTS in {p.name.split(".")[0] for p in out.iterdir()}) == with_latents


@pytest.mark.parametrize("config", _MODELS, ids=["llama", "llama tied", "gpt2"])
def test_dense_tensors_are_the_twin_s_in_bfloat16(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = random_model(config)
    twin = _dense_twin(model, _write(model, tmp_path)).state_dict()
    tensors = dict(FORMAT.tensors(PackedFolder(tmp_path), False))
    assert set(tensors) == set(module_tensor_names(model))
    assert all(torch.equal(tensor, twin[name].bfloat16()) for name, tensor in tensors.items())


def test_every_layer_knows_its_inputs(llama: PreTrainedModel) -> None:
    shapes = {layer_shape(module) for _, module in find_blocks(llama).linear_layers()}
    assert shapes == {(32, 32), (32, 16), (32, 44), (44, 32)}
