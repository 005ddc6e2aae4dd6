"""The tensors of any trainer become the tensors of the model's folder, or are refused by name."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from millrace.errors import DataError, PublishError
from millrace.model_folder import stored_tensors
from millrace.weights.folder import FolderTensors, folder_checksums
from millrace.weights.source import source_of
from millrace.weights.trained import Trained, read_trained
from tests.architectures import make_model
from tests.weights.faults import Source

Named = tuple[str, torch.Tensor]


def saved(folder: Path, architecture: str) -> PreTrainedModel:
    model = make_model(architecture)
    model.save_pretrained(folder)
    return model


def held(folder: Path) -> dict[str, torch.Tensor]:
    return dict(FolderTensors(folder))


def check(trained: Trained, tensors: Iterable[Named], expected: dict[str, torch.Tensor]) -> None:
    """Requires the expected tensors from a list, from a source without shapes, and from an iterator. A source that can
    be iterated again must give them again, since a publish that is stored goes through it twice."""
    tensors = list(tensors)
    for source in (tensors, Source(tensors), iter(tensors)):
        out = trained.tensors(source_of(source))
        shapes = out.shapes()
        made = list(out)
        assert len(made) == len(dict(made))
        assert dict(made).keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in made)
        if shapes is not None:
            assert shapes == {name: tuple(tensor.shape) for name, tensor in made}
        assert out.once == isinstance(source, Iterator)
        if not isinstance(source, Iterator):
            assert dict(out).keys() == expected.keys()


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP of torch.compile": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointing": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "compiled layers": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "PEFT": lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."),
    "PEFT of whole modules": lambda name: f"base_model.model.{name}".replace(
        "lm_head.", "lm_head.modules_to_save.default."
    ),
    "PEFT in DDP": lambda name: f"module.base_model.model.{name}".replace("o_proj.", "o_proj.base_layer."),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path, Trained]:
    folder = tmp_path_factory.mktemp("moe")
    return saved(folder, "qwen3_moe"), folder, read_trained(folder)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_are_taken_off(wrapping: str, moe: tuple[PreTrainedModel, Path, Trained]) -> None:
    model, folder, trained = moe
    named = [(WRAPPINGS[wrapping](name), tensor) for name, tensor in model.named_parameters()]
    assert dict(named).keys() != dict(model.named_parameters()).keys()
    check(trained, named, held(folder))


@given(order=st.permutations(range(9)))
def test_the_order_does_not_matter(order: list[int], moe: tuple[PreTrainedModel, Path, Trained]) -> None:
    model, folder, trained = moe
    parameters = list(model.named_parameters())
    first = [parameters[index] for index in order]
    check(trained, [*first, *parameters[len(order) :]], held(folder))


@pytest.mark.parametrize(
    "architecture", ["glm4_moe", "deepseek_v3", "qwen2_moe", "mixtral", "gpt_oss", "gemma2", "qwen3"]
)
def test_parameters_alone_and_the_state_dict_are_the_whole_model(architecture: str, tmp_path: Path) -> None:
    """GLM-4 and DeepSeek-V3 have a stored buffer that `named_parameters()` leaves out."""
    model = saved(tmp_path, architecture)
    trained = read_trained(tmp_path)
    check(trained, model.named_parameters(), held(tmp_path))
    check(trained, model.state_dict().items(), held(tmp_path))


def test_a_checkpoints_own_names_are_taken_as_they_are(moe: tuple[PreTrainedModel, Path, Trained]) -> None:
    _, folder, trained = moe
    check(trained, held(folder).items(), held(folder))


def test_tensors_taken_from_the_folder_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = saved(tmp_path, "deepseek_v3")
    caplog.set_level(logging.INFO, "millrace")
    read_trained(tmp_path).tensors(source_of(list(model.named_parameters())))
    assert "e_score_correction_bias" in caplog.text


def test_a_folder_with_a_config_alone_gets_what_save_pretrained_would_write(tmp_path: Path) -> None:
    model = saved(tmp_path / "saved", "qwen3_moe")
    model.config.save_pretrained(tmp_path / "bare")
    check(read_trained(tmp_path / "bare"), model.named_parameters(), held(tmp_path / "saved"))


def test_without_the_folder_only_wrappers_are_taken_off(tmp_path: Path) -> None:
    tensor = torch.zeros(2)
    assert dict(read_trained(tmp_path / "nowhere").tensors(source_of([("module.a.weight", tensor)]))) == {
        "a.weight": tensor
    }


def test_two_names_of_one_tensor_are_refused(moe: tuple[PreTrainedModel, Path, Trained]) -> None:
    model, _, trained = moe
    named = [*model.named_parameters(), ("module.model.norm.weight", torch.zeros(16))]
    for source in (named, iter(named)):
        with pytest.raises(PublishError, match=r"twice: model.norm.weight and module.model.norm.weight are both"):
            list(trained.tensors(source_of(source)))


@pytest.mark.parametrize("name", ["lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default"])
def test_an_adapters_tensors_are_refused(name: str, moe: tuple[PreTrainedModel, Path, Trained]) -> None:
    model, _, trained = moe
    named = [*model.named_parameters(), (f"base_model.model.model.layers.0.self_attn.q_proj.{name}", torch.zeros(2))]
    with pytest.raises(PublishError, match=rf"q_proj.{name} is a tensor of an adapter .*publish_adapter"):
        trained.tensors(source_of(named))


def test_a_fused_tensor_of_another_shape_is_refused(moe: tuple[PreTrainedModel, Path, Trained]) -> None:
    model, _, trained = moe
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    named = {**dict(model.named_parameters()), fused: torch.zeros(0)}
    with pytest.raises(PublishError, match=rf"{fused} has shape \(0,\), but in the model it is \(4, 16, 16\)"):
        trained.tensors(source_of(list(named.items())))


def test_extra_and_missing_tensors_are_left_to_the_engines(
    moe: tuple[PreTrainedModel, Path, Trained],
) -> None:
    model, folder, trained = moe
    named = [(name, tensor) for name, tensor in model.named_parameters() if name != "model.norm.weight"]
    out = trained.tensors(source_of([*named, ("module.value_head.weight", torch.zeros(3))])).shapes()
    assert out is not None
    assert out.keys() ^ held(folder).keys() == {"value_head.weight", "model.norm.weight"}


class TestTied:
    def test_a_stored_copy_gets_the_trained_values_too(self, tmp_path: Path) -> None:
        model = saved(tmp_path, "qwen3")
        with_copy(tmp_path, "lm_head.weight", "model.embed_tokens.weight")
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1)
        expected = held(tmp_path) | dict.fromkeys(
            ("lm_head.weight", "model.embed_tokens.weight"), model.get_input_embeddings().weight.detach()
        )
        trained = read_trained(tmp_path)
        check(trained, model.named_parameters(), expected)
        check(trained, model.state_dict().items(), expected)

    def test_a_copy_that_the_folder_does_not_have_is_not_sent(self, tmp_path: Path) -> None:
        model = saved(tmp_path, "qwen3")
        head = model.get_input_embeddings().weight.detach().clone()
        check(read_trained(tmp_path), [*model.named_parameters(), ("lm_head.weight", head)], held(tmp_path))

    def test_a_folder_may_have_the_head_alone(self, tmp_path: Path) -> None:
        model = saved(tmp_path, "qwen3")
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        check(read_trained(tmp_path), model.named_parameters(), held(tmp_path))

    def test_copies_that_differ_in_the_trainer_are_refused(self, tmp_path: Path) -> None:
        model = saved(tmp_path, "qwen3")
        named = [*model.named_parameters(), ("lm_head.weight", torch.zeros(64, 16))]
        for source in (named, iter(named)):
            with pytest.raises(PublishError, match=r"model.embed_tokens.weight and lm_head.weight differ"):
                list(read_trained(tmp_path).tensors(source_of(source)))

    def test_copies_that_differ_in_the_folder_are_refused(self, tmp_path: Path) -> None:
        saved(tmp_path, "qwen3")
        with_copy(tmp_path, "lm_head.weight", "model.embed_tokens.weight", plus=1)
        with pytest.raises(PublishError, match=r"lm_head.weight differ in .*tie_word_embeddings"):
            read_trained(tmp_path)


def test_buffers_of_older_files_are_taken_from_both_sides(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    named = [*model.named_parameters(), (name, torch.ones(4))]
    check(read_trained(tmp_path), named, held(tmp_path))
    with_copy(tmp_path, name, "model.norm.weight")
    check(read_trained(tmp_path), model.named_parameters(), held(tmp_path))
    check(read_trained(tmp_path), named, held(tmp_path) | {name: torch.ones(4)})


def with_copy(folder: Path, name: str, of: str, plus: float = 0) -> None:
    """Stores one more tensor in the folder, a copy of another."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensors[of] + plus}, folder / "model.safetensors", metadata={"format": "pt"})


class TestFolder:
    def test_the_index_decides_what_the_model_is(self, tmp_path: Path) -> None:
        model = make_model("llama")
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        before = folder_checksums(tmp_path)
        assert len({tensor.file for tensor in stored_tensors(tmp_path).values()}) > 1
        save_file({"layers.0.wq.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
        save_file({"model.norm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
        save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "zz-buffers.safetensors")
        assert folder_checksums(tmp_path) == before
        assert dict(FolderTensors(tmp_path)).keys() == before.keys()
        check(read_trained(tmp_path), model.named_parameters(), held(tmp_path))

    def test_a_single_file_decides_where_there_is_no_index(self, tmp_path: Path) -> None:
        saved(tmp_path, "llama")
        before = folder_checksums(tmp_path)
        save_file({"layers.0.wq.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
        assert folder_checksums(tmp_path) == before

    def test_a_tensor_that_the_index_does_not_list_is_no_part_of_the_model(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
        )
        assert stored_tensors(tmp_path).keys() == {"a"} == dict(FolderTensors(tmp_path)).keys()

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"),
            ('{"weight_map": {"c": "one.safetensors"}}', "one.safetensors has no tensor c"),
            ('{"weight_map": ["a"]}', "is not an index"),
            ("{}", "is not an index"),
            ("no JSON", "is not an index"),
        ],
    )
    def test_a_wrong_index_is_reported(self, index: str, message: str, tmp_path: Path) -> None:
        save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(DataError, match=message):
            stored_tensors(tmp_path)
