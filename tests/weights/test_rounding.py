"""Matrices are rounded to the formats in which engines load them, as other implementations round them."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from millrace.weights.recipes import Recipe
from millrace.weights.rounding import largest_of, pack_float4, powers_of_two, quantise
from tests.quantised_models import recipe_for

REFERENCE = Path(__file__).parent / "reference_formats.py"
FLOAT4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SHAPE = (64, 128)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    return FLOAT4[codes & 7] * torch.where(codes > 7, -1.0, 1.0)


def dequantised(made: dict[str, torch.Tensor], recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights, and the scale of each of them. Only torch's own dtypes know what a scale is worth."""
    weight, scales = made[recipe.weight], made[f"{recipe.stem}{recipe.scale}"]
    if recipe.kind == "mxfp8":
        wide = scales.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
        return weight.float() * wide, wide
    whole = made[f"{recipe.stem}{recipe.whole}"]
    factor = 1 / whole if recipe.whole == "weight_global_scale" else whole
    wide = (scales.float() * factor).repeat_interleave(16, 1)
    return unpacked(weight) * wide, wide


weights = st.builds(
    lambda seed, exponent, spread: (
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        * 2.0**exponent
        * 2.0 ** (torch.arange(SHAPE[0]) % (spread + 1))[:, None]
    ),
    st.integers(0, 2**32),
    st.integers(-60, 60),
    st.integers(0, 6),
)


@given(weights)
@settings(max_examples=50)
def test_no_weight_of_mxfp8_is_further_away_than_half_a_step(weight: torch.Tensor) -> None:
    recipe = recipe_for("mxfp8", "w.weight", SHAPE)
    made = quantise(weight, recipe)
    found, scales = dequantised(made, recipe)
    assert ((found - weight).abs() <= torch.maximum(weight.abs() / 16, scales * 2.0**-10)).all()
    most = made["w.weight"].float().reshape(SHAPE[0], -1, 32).abs().amax(2)
    assert ((most > 223) & (most <= 448)).all()  # half of the range is used at least


@given(weights, st.sampled_from(["nvfp4", "nvfp4a16", "modelopt_nvfp4"]))
@settings(max_examples=50)
def test_no_weight_of_nvfp4_is_further_away_than_half_a_step(weight: torch.Tensor, form: str) -> None:
    """A step is 2 between 4 and 6. Scales have 3 bits, so that a block's largest value is at most 6.4 of them."""
    recipe = recipe_for(form, "w.weight", SHAPE)
    found, scales = dequantised(quantise(weight, recipe), recipe)
    assert ((found - weight).abs() <= scales * 1.001).all()


@given(st.lists(st.integers(-126, 110), min_size=1, max_size=20), st.floats(1, 2, exclude_max=True, width=32))
def test_a_scale_of_mxfp8_is_the_least_power_of_two_that_fits(exponents: list[int], fraction: float) -> None:
    most = torch.ldexp(torch.full((len(exponents),), fraction), torch.tensor(exponents))
    stored, factors = powers_of_two(most)
    assert torch.equal(stored.view(torch.float8_e8m0fnu).float() * factors, torch.ones(len(exponents)))
    assert (most * factors <= 448).all()
    assert ((most * factors * 2 > 448) | (stored == 0)).all()


def test_float4_is_rounded_to_even_and_packed_from_the_lower_half() -> None:
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.26, -0.24]
    assert unpacked(pack_float4(torch.tensor([values]))).tolist() == [[0, 1, 1, 2, 2, 4, 4, 6, -0.5, 0]]
    assert pack_float4(torch.tensor([[0.5, -6.0]])).item() == 0xF1


@pytest.mark.parametrize("form", ["mxfp8", "nvfp4"])
def test_zeros_stay_zeros(form: str) -> None:
    recipe = recipe_for(form, "w.weight", SHAPE)
    for weight in (torch.zeros(SHAPE), torch.eye(*SHAPE)):
        made = quantise(weight, recipe)
        assert torch.equal(dequantised(made, recipe)[0], weight)


def test_the_names_and_dtypes_are_those_of_a_checkpoint() -> None:
    made = {form: quantise(torch.randn(SHAPE), recipe_for(form, "w.weight", SHAPE)) for form in
            ("mxfp8", "nvfp4", "modelopt_nvfp4")}  # fmt: skip
    assert {form: {name: (one.dtype, tuple(one.shape)) for name, one in of.items()} for form, of in made.items()} == {
        "mxfp8": {"w.weight": (torch.float8_e4m3fn, SHAPE), "w.weight_scale": (torch.uint8, (64, 4))},
        "nvfp4": {
            "w.weight_packed": (torch.uint8, (64, 64)),
            "w.weight_scale": (torch.float8_e4m3fn, (64, 8)),
            "w.weight_global_scale": (torch.float32, (1,)),
        },
        "modelopt_nvfp4": {
            "w.weight": (torch.uint8, (64, 64)),
            "w.weight_scale": (torch.float8_e4m3fn, (64, 8)),
            "w.weight_scale_2": (torch.float32, ()),
        },
    }


def test_scales_can_be_stored_as_powers_of_two() -> None:
    recipe = replace(recipe_for("mxfp8", "w.weight", SHAPE), scale_dtype="float8_e8m0fnu")
    assert quantise(torch.randn(SHAPE), recipe)["w.weight_scale"].dtype is torch.float8_e8m0fnu


def test_matrices_are_what_vllm_and_compressed_tensors_make(vllm_python: Path, tmp_path: Path) -> None:
    """Bit for bit, computed by their own code in the engine's environment."""
    torch.manual_seed(0)
    rows = 2.0 ** torch.linspace(-12, 4, SHAPE[0])[:, None]
    given = {"normal": torch.randn(SHAPE).bfloat16().float(), "spread": torch.randn(SHAPE) * rows}
    save_file(given, tmp_path / "given.safetensors")
    done = subprocess.run(
        [vllm_python, REFERENCE, tmp_path / "given.safetensors", tmp_path / "made.safetensors"],
        env={"VLLM_TARGET_DEVICE": "cpu", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = load_file(tmp_path / "made.safetensors")
    largest = largest_of(list(given.values()))
    for name, weight in given.items():
        made = quantise(weight, recipe_for("mxfp8", f"{name}.mxfp8.weight", SHAPE))
        made |= quantise(weight, recipe_for("nvfp4", f"{name}.nvfp4.weight", SHAPE), largest)
        for key, tensor in made.items():
            assert torch.equal(tensor.view(torch.uint8), expected[key].view(torch.uint8)), key
