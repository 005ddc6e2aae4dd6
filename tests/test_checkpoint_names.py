"""Tensors of transformers models get the names that `save_pretrained` gives them in a checkpoint, without a copy."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from millrace.checkpoint_names import CheckpointNames, load_config, names_of, read_names
from millrace.errors import DataError
from tests.architectures import ARCHITECTURES, FUSED, make_model


def converted(names: CheckpointNames, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    made: dict[str, torch.Tensor] = {}
    for name in state:
        group = names.groups[name]
        if name not in names.tied and name == next(iter(group.sources)):
            made |= names.convert(group, [state[source] for source in group.sources])
    return made


@pytest.mark.parametrize("stored", [True, False], ids=["with_weights", "config_alone"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_values_are_those_that_save_pretrained_writes(
    architecture: str, stored: bool, tmp_path: Path
) -> None:
    model = make_model(architecture)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    names = read_names(tmp_path, written.keys() if stored else None)
    made = converted(names, model)
    assert made.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(made[name], tensor), name
    shapes = {name: shape for group in names.groups.values() for name, shape in group.shapes.items()}
    assert all(shapes[name] == tuple(tensor.shape) for name, tensor in written.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_copied(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    model.config.save_pretrained(tmp_path)
    held = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    made = converted(read_names(tmp_path, None), model)
    assert {tensor.untyped_storage().data_ptr() for tensor in made.values()} == held
    assert all(tensor.is_contiguous() for tensor in made.values())


@pytest.mark.parametrize("architecture", FUSED)
def test_each_expert_lies_in_the_fused_tensor(architecture: str) -> None:
    model = make_model(architecture)
    names = names_of(model, None)
    fused = next(name for name in names.groups if name.endswith("experts.gate_up_proj"))
    tensor = model.state_dict()[fused]
    parts = names.convert(names.groups[fused], [tensor])
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    assert len(parts) == 2 * tensor.shape[0]
    assert all(first <= part.data_ptr() <= last - part.nbytes for part in parts.values())
    assert sum(part.numel() for part in parts.values()) == tensor.numel()


def test_a_folder_that_has_experts_fused_keeps_them_so(tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    written = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in written
    assert converted(read_names(tmp_path, written.keys()), model).keys() == written.keys()


def test_a_folder_without_the_base_models_prefix_keeps_its_names(tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    model.base_model.save_pretrained(tmp_path)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    made = converted(read_names(tmp_path, written.keys()), model)
    assert "layers.0.mlp.experts.0.gate_proj.weight" in written
    assert made.keys() - written.keys() == {"lm_head.weight"}


def test_a_model_that_transformers_does_not_know_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(DataError, match="transformers can't create the model"):
        read_names(tmp_path, None)


def test_an_older_single_file_does_not_win_over_the_index(tmp_path: Path) -> None:
    make_model("llama", seed=1).save_pretrained(tmp_path)
    stale = tmp_path / "model.safetensors"
    content = stale.read_bytes()
    model = make_model("llama", seed=2)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    stale.write_bytes(content)
    loaded = type(model).from_pretrained(tmp_path, config=load_config(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
