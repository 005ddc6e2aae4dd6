"""Matrices are quantised as the model's folder has them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from millrace.errors import PublishError
from millrace.model_config import read_quantization
from millrace.model_folder import StoredTensor, stored_tensors
from millrace.weights.audit import Samples
from millrace.weights.quantised import as_in_folder, quantised
from millrace.weights.recipes import Recipe, recipes_of
from millrace.weights.rounding import in_blocks, out_of_blocks, pack, quantise
from millrace.weights.source import source_of
from tests.quantised_models import config_of, make_dense_folder, recipe_for, save_quantised

FORMS = ["fp8_block", "fp8_tensor", "fp8_channel", "int8", "int4", "mxfp8", "modelopt_mxfp8", "nvfp4", "nvfp4a16",
         "modelopt_nvfp4"]  # fmt: skip


def dequantised(made: dict[str, torch.Tensor], recipe: Recipe) -> torch.Tensor:
    weight, scales = list(made.values())[:2]
    if recipe.kind == "int4":
        fields = [(weight >> (4 * place)) & 15 for place in range(8)]
        weight = torch.stack(fields, -1).flatten(1) - 8
    blocks = in_blocks(weight.float(), recipe.block)
    down, _, across, _ = blocks.shape
    return out_of_blocks(blocks * scales.float().reshape(down, 1, across, 1), recipe.shape)


@pytest.mark.parametrize(("form", "error"), [("fp8_block", 0.03), ("fp8_tensor", 0.03), ("fp8_channel", 0.03),
                                             ("int8", 0.012), ("int4", 0.14)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_sent_is_near_to_the_trainers_weights(form: str, error: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 384).to(dtype)
    recipe = recipe_for(form, "w.weight", (256, 384))
    made = quantise(weight, recipe)
    assert {name: tuple(one.shape) for name, one in made.items()} == recipe.shapes
    away = (dequantised(made, recipe) - weight.float()).norm() / weight.float().norm()
    assert away < error


def test_fp8_follows_the_engines_convention() -> None:
    """The scale of a block is its largest value over 448; a block of zeros has a scale too."""
    weight = torch.zeros(256, 128)
    weight[3, 5], weight[4, 6] = -3.5, 1.0
    made = quantise(weight, recipe_for("fp8_block", "w.weight", (256, 128)))
    assert made["w.weight_scale_inv"].tolist() == [[pytest.approx(3.5 / 448)], [pytest.approx(1e-4 / 448)]]
    assert made["w.weight"][3, 5].float() == -448
    assert not made["w.weight"][128:].float().any()


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=50)
def test_blocks_that_do_not_fit_are_filled_up(height: int, width: int, rows: int, columns: int) -> None:
    weight = torch.randn(height, width)
    assert torch.equal(out_of_blocks(in_blocks(weight, (rows, columns)), (height, width)), weight)


def test_four_bits_are_packed_from_the_lowest() -> None:
    packed = pack(torch.tensor([[-8, -7, 0, 0, 0, 0, 0, 7]]))
    assert packed.dtype is torch.int32
    assert packed.item() % 2**32 == 0xF8888810


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_says_how_its_matrices_are_quantised(form: str, tmp_path: Path) -> None:
    model = make_dense_folder(tmp_path / "plain")
    folder = save_quantised(tmp_path / "plain", tmp_path / form, form)
    stored = stored_tensors(folder)
    recipes = recipes_of(stored, read_quantization(folder))
    assert len(recipes) == 14
    tensors = list(model.state_dict().items())
    source = as_in_folder(source_of(tensors), stored, read_quantization(folder), Samples(1))
    assert source.shapes() == {name: one.shape for name, one in stored.items()}
    made, held = dict(source), load_file(folder / "model.safetensors")
    assert {name: tuple(one.shape) for name, one in made.items()} == source.shapes()
    assert all(made[name].dtype == one.dtype and torch.equal(made[name], one) for name, one in held.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert recipes[name] == recipe_for(form, name, (256, 256))


def test_modelopts_own_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_quantization(tmp_path) is None
    config = config_of("modelopt_nvfp4")
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": config["quantization"]}))
    assert read_quantization(tmp_path) == config


def test_a_plain_folder_asks_for_nothing(tmp_path: Path) -> None:
    make_dense_folder(tmp_path / "plain")
    assert recipes_of(stored_tensors(tmp_path / "plain"), None) == {}


def test_a_matrix_of_another_shape_is_refused_at_once(tmp_path: Path) -> None:
    recipes = {"w.weight": recipe_for("fp8_block", "w.weight", (256, 128))}
    with pytest.raises(PublishError, match=r"w.weight has shape \(128, 256\), but in the model's folder it is"):
        quantised(source_of([("w.weight", torch.zeros(128, 256))]), recipes)


def test_a_form_that_is_not_known_is_refused(tmp_path: Path) -> None:
    make_dense_folder(tmp_path / "plain")
    folder = save_quantised(tmp_path / "plain", tmp_path / "int4", "int4")
    eight = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    with pytest.raises(PublishError, match=r"with 8 bits; Millrace packs 4"):
        recipes_of(stored_tensors(folder), eight)


def test_matrices_of_one_layer_have_one_global_scale() -> None:
    """They come in any order, and none of them is sent before the last has come."""
    names = [f"layers.0.self_attn.{one}_proj.weight" for one in "kqv"]
    tensors = [(name, torch.randn(32, 64) * 2**number) for number, name in enumerate(names)]
    recipes = {name: recipe_for("nvfp4a16", name, (32, 64)) for name in names}
    tensors.insert(1, ("norm", torch.ones(64)))
    made = dict(quantised(source_of(tensors), recipes))
    assert next(iter(made)) == "norm"
    [scale] = {float(made[f"{recipe.stem}weight_global_scale"]) for recipe in recipes.values()}
    assert scale == pytest.approx(448 * 6 / float(tensors[-1][1].abs().max()))


def test_a_matrix_without_those_of_its_layer_is_refused() -> None:
    recipes = {name: recipe_for("nvfp4a16", name, (32, 64)) for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight")}
    given = [("mlp.up_proj.weight", torch.randn(32, 64))]
    with pytest.raises(
        PublishError, match=r"mlp.up_proj.weight has a scale in common with mlp.gate_proj.weight, which"
    ):
        list(quantised(source_of(given), recipes))


@pytest.mark.parametrize(
    ("weight", "scale"),
    [("U8", "U8"), ("F8_E5M2", "F32"), ("U8", "F8_E4M3"), ("I8", "U8"), ("F8_E4M3", "I32"), ("U8", None)],
)
def test_other_pairs_of_dtypes_are_refused(weight: str, scale: str | None) -> None:
    """Among them MXFP4, and NVFP4 without a global scale."""
    stored = {"w.weight": StoredTensor(Path("f"), weight, (32, 64), 0, 0)}
    if scale is not None:
        stored["w.weight_scale"] = StoredTensor(Path("f"), scale, (32, 4), 0, 0)
    with pytest.raises(
        PublishError, match=f"has w.weight in {weight}, and Millrace can't quantise weights in this way"
    ):
        recipes_of(stored, None)
