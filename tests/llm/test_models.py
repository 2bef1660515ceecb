import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbllm_cli.errors import ArtifactMissingError, ConfigError
from dbllm_cli.llm.models import (
    copy_other_files,
    empty_model,
    load_config,
    load_model,
    model_folder,
    module_tensor_names,
)
from dbllm_cli.llm.tokenizers import load_tokenizer
from dbllm_cli.store import Artifact, new_staging
from dbllm_cli.tensors import TensorFolder, save_tensors
from tests.llm.conftest import llama_config, random_model


@pytest.fixture
def saved(tmp_path: Path, llama: PreTrainedModel) -> Path:
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    return folder


def _artifact(path: Path) -> Artifact:
    return Artifact(path, "model", "a" * 64, {})


def test_a_folder_under_module_names_is_used_where_it_is(saved: Path, tmp_path: Path) -> None:
    assert model_folder(_artifact(saved), tmp_path / "work") == saved
    assert not (tmp_path / "work").exists()


def test_a_checkpoint_under_other_names_is_imported_once(
    saved: Path, tmp_path: Path, llama: PreTrainedModel
) -> None:
    renamed = {name.removeprefix("model."): t for name, t in TensorFolder(saved).items()}
    save_tensors(renamed, saved / "model.safetensors")
    (saved / "tokenizer.json").write_text("{}")
    work = tmp_path / "work"
    host = new_staging(tmp_path / "other").name.split("+")[0]
    killed = work / ".staging" / f"{host}+{2**22 + 1}+killed"
    killed.mkdir(parents=True)
    folder = model_folder(_artifact(saved), work)
    assert folder.parent == work / "models"
    assert (folder / "tokenizer.json").is_file()
    state = llama.state_dict()
    imported = TensorFolder(folder)
    for name in module_tensor_names(llama):
        assert torch.equal(imported.get(name), state[name])
    assert model_folder(_artifact(saved), work) == folder
    assert not any((work / ".staging").iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_tied_tensors_once(tied: bool) -> None:
    names = module_tensor_names(random_model(llama_config(tie_word_embeddings=tied)))
    assert ("lm_head.weight" in names) == (not tied)
    assert "model.embed_tokens.weight" in names


def test_an_empty_model_has_no_weights_but_real_buffers(saved: Path) -> None:
    model = empty_model(load_config(saved))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training


def test_an_unknown_architecture_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    with pytest.raises(ConfigError, match=r"can't read .*config\.json") as raised:
        load_config(saved)
    assert "--trust-remote-code" in raised.value.hint


def test_a_config_that_is_not_json_is_refused(saved: Path) -> None:
    (saved / "config.json").write_text("{not json")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(saved)


def test_a_model_without_a_causal_head_is_refused(saved: Path) -> None:
    (saved / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match="vit is not a causal language model"):
        empty_model(load_config(saved))


def test_a_loaded_model_is_in_eval_mode_frozen_and_gives_the_logits_of_the_saved_one(
    saved: Path, llama: PreTrainedModel, ids: Tensor
) -> None:
    model = load_model(saved, torch.float32)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert load_model(saved, torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_without_tokenizer_is_missing_it(saved: Path) -> None:
    with pytest.raises(ArtifactMissingError, match="has no tokenizer"):
        load_tokenizer(saved)


@pytest.mark.shared_data
def test_the_tokenizer_of_a_folder_is_read(stories_folder: Path) -> None:
    tokenizer = load_tokenizer(stories_folder)
    assert len(tokenizer) == 512


def test_all_files_but_weights_and_what_stages_write_are_copied(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    kept = ["LICENSE", "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model"]
    dropped = [
        ".hidden", "manifest.json", "metrics.json", "layers.json", "curve.jsonl",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "model.gguf",
    ]  # fmt: skip
    for name in kept + dropped:
        (source / name).write_text(name)
    copy_other_files(source, folder)
    assert sorted(path.name for path in folder.iterdir()) == kept
