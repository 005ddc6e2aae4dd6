"""What an engine was asked to quantise, and whether a layer is in that form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.quantisation import METHODS, LayerForm, Quantisation, quantisation_of
from tests.quantised_models import config_of

BLOCK = LayerForm("float8_e4m3fn", 8, (128, 128))
ROWS = LayerForm("float8_e4m3fn", 8, (1, -1))
PLAIN = LayerForm("bfloat16", 16, None)


def asked(option: str | None, config: dict[str, object] | None = None) -> Quantisation:
    found = quantisation_of(option, config)
    assert found is not None
    return found


def test_nothing_is_asked_of_a_plain_server_and_folder() -> None:
    assert quantisation_of(None, None) is None


def test_a_folder_says_blocks_and_what_it_leaves_out() -> None:
    found = asked(None, {**config_of("fp8_block"), "modules_to_not_convert": ["layers.0.self_attn"]})
    assert (found.bits, found.block) == (8, (128, 128))
    assert found.covers("model.layers.1.self_attn.q_proj.weight")
    assert not found.covers("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("form", "bits", "block"),
    [("int8", 8, (1, -1)), ("int4", 4, (1, 128)), ("fp8_channel", 8, (1, -1)), ("mxfp8", 8, (1, 32)),
     ("nvfp4", 4, (1, 16)), ("nvfp4a16", 4, (1, 16))],
)  # fmt: skip
def test_compressed_tensors_are_read(form: str, bits: int, block: tuple[int, int]) -> None:
    found = asked("compressed-tensors", config_of(form))
    assert (found.bits, found.block) == (bits, block)
    assert not found.covers("model.layers.0.mlp.gate.weight")  # by the pattern in its `ignore`


@pytest.mark.parametrize(
    ("form", "text", "bits"),
    [
        ("modelopt_mxfp8", "mxfp8 (modelopt) with scales for blocks of 1x32", 8),
        ("modelopt_nvfp4", "nvfp4 (modelopt) with scales for blocks of 1x16", 4),
    ],
)
def test_modelopts_folders_are_read(form: str, text: str, bits: int) -> None:
    """In both of the places where it has written its table, and with its patterns."""
    nested = config_of(form)
    nested["quantization"]["exclude_modules"] = ["lm_head", "model.layers.0.*"]
    for config in (nested, {**nested["quantization"], "quant_method": "modelopt"}):
        found = asked(None, config)
        assert (str(found), found.bits) == (text, bits)
        assert found.covers("model.layers.1.mlp.up_proj.weight")
        assert not found.covers("model.layers.0.mlp.up_proj.weight")


def test_formats_of_four_and_eight_bits_are_told_apart() -> None:
    mxfp8 = asked("compressed-tensors", config_of("mxfp8"))
    assert mxfp8.admits(LayerForm("float8_e4m3fn", 8, (1, 32)))
    assert mxfp8.admits(LayerForm("int32", 8, (1, 32)))  # as Marlin packs them
    assert not mxfp8.admits(LayerForm("int8", 8, (1, 32)))
    assert not mxfp8.admits(LayerForm("uint8", 4, (1, 16)))


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm",
                                  "model.layers.3.mlp.gate", "visual.blocks.0.mlp.fc1"])  # fmt: skip
def test_engines_may_leave_some_modules_as_they_are(name: str) -> None:
    assert not asked("fp8").covers(f"{name}.weight")
    assert asked("fp8").covers("model.layers.3.mlp.gate_proj.weight")


def test_a_layer_that_is_not_quantised_is_not_admitted() -> None:
    for option in METHODS:
        assert not asked(option).admits(PLAIN)


def test_smaller_blocks_are_admitted_and_larger_ones_are_not() -> None:
    whole = asked("fp8_per_tensor")
    assert whole.admits(ROWS)
    assert whole.admits(BLOCK)
    blocks = asked(None, config_of("fp8_block"))
    assert blocks.admits(BLOCK)
    assert blocks.admits(LayerForm("float8_e4m3fn", 8, (1, 128)))
    assert not blocks.admits(ROWS)
    assert not blocks.admits(LayerForm("float8_e4m3fn", 8, (-1, -1)))


def test_another_kind_of_number_is_not_admitted() -> None:
    assert not asked("fp8").admits(LayerForm("int8", 8, (1, -1)))
    assert not asked("w8a8_int8").admits(ROWS)
    assert asked("fp8").admits(LayerForm("int32", 8, (1, -1)))  # four in one: a kernel packs them so
    assert not asked("mxfp4").admits(LayerForm("float8_e4m3fn", 8, (1, 32)))


def test_an_unknown_method_asks_for_nothing_particular() -> None:
    found = asked("of_tomorrow")
    assert not found.covers("model.layers.0.mlp.up_proj.weight")
    assert found.admits(PLAIN)


@given(st.text(), st.text())
def test_any_names_can_be_read(pattern: str, layer: str) -> None:
    config: dict[str, object] = {"quant_method": "fp8", "ignored_layers": [pattern.removeprefix("re:")]}
    assert isinstance(asked(None, config).covers(layer), bool)
