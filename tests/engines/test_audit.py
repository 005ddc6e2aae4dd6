"""What an engine's process measures of its layers, and how the ranks' answers come together."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from millrace.engines.audit import Answers, HeldLayer, WeightSample, texts_of
from millrace.engines.stock.launching import EXTENSION
from millrace.quantisation import LayerForm
from millrace.weights.audit import Samples
from millrace.weights.rounding import quantise
from millrace.weights.source import source_of
from tests.quantised_models import recipe_for

SHAPE = (256, 384)


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXTENSION))
    import millrace_audit

    assert Path(millrace_audit.__file__).is_relative_to(EXTENSION)
    return sys.modules["millrace_audit"]


class Method:
    """How a layer is applied: by weights that a kernel has packed, here in reverse order."""

    def apply(self, layer: Any, x: torch.Tensor, bias: None) -> torch.Tensor:
        assert bias is None
        scales = layer.weight_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
        weight = layer.weight.float().flip(0) * scales[: layer.rows, : layer.columns]
        return torch.nn.functional.linear(x.float(), weight)


class Packed(torch.nn.Module):
    """A linear layer in fp8."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        made = quantise(weight, recipe_for("fp8_block", "weight", (weight.shape[0], weight.shape[1])))
        self.rows, self.columns = weight.shape
        self.weight = torch.nn.Parameter(made["weight"].flip(0), requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(made["weight_scale_inv"], requires_grad=False)
        self.quant_method, self.params_dtype = Method(), torch.bfloat16


class Plain(torch.nn.Module):
    """A linear layer that is not quantised."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


def samples_of(tensors: dict[str, torch.Tensor], version: int = 3, experts: int = 0) -> list[WeightSample]:
    samples = Samples(version, experts=experts)
    assert list(samples.keep(source_of(list(tensors.items())))) == list(tensors.items())
    return list(samples.all())


def held(audit: Any, samples: list[WeightSample], ranks: list[tuple[dict[str, torch.nn.Module], Any]]) -> Answers:
    answers = Answers()
    for first, text in texts_of(samples):
        read = audit.read_samples(text)
        found = [audit.audited(read, places, modules) for modules, places in ranks]
        answers.add(first, json.loads(json.dumps(found)))
    return answers


def whole(audit: Any, module: str = "layer", parameter: str = "weight") -> Any:
    """Places of matrices that one module holds as they are."""

    def places(sample: Any) -> list[Any]:
        (height, width) = sample.shape
        return [audit.Place(module, parameter, ((0, height), (0, width)), (0, 1), 0, (width, 1), sample.shape)]

    return places


def test_a_packed_layer_is_measured_by_using_it(audit: Any) -> None:
    weight = torch.randn(SHAPE).bfloat16()
    answers = held(audit, samples_of({"w": weight}), [({"layer": Packed(weight)}, whole(audit))])
    [layer] = answers.layers()
    assert (layer.layer, layer.tensor, layer.form) == ("layer", "w", LayerForm("float8_e4m3fn", 8, (128, 128)))
    assert layer.error is not None
    assert 0.01 < layer.error < 0.04
    assert answers.unplaced() == []


def test_scales_that_are_wrong_by_a_factor_show(audit: Any) -> None:
    weight = torch.randn(SHAPE).bfloat16()
    packed = Packed(weight)
    packed.weight_scale_inv.mul_(1.5)
    [layer] = held(audit, samples_of({"w": weight}), [({"layer": packed}, whole(audit))]).layers()
    assert layer.error == pytest.approx(0.5, abs=0.05)


def test_a_nan_is_a_large_error(audit: Any) -> None:
    weight = torch.randn(SHAPE).bfloat16()
    packed = Packed(weight)
    packed.weight_scale_inv[1, 1] = torch.nan
    [layer] = held(audit, samples_of({"w": weight}), [({"layer": packed}, whole(audit))]).layers()
    assert layer.error is not None
    assert layer.error > 1e100


def test_a_plain_layer_has_no_error(audit: Any) -> None:
    weight = torch.randn(SHAPE).bfloat16()
    [layer] = held(audit, samples_of({"w": weight}), [({"layer": Plain(weight)}, whole(audit))]).layers()
    assert layer == HeldLayer("layer", "w", LayerForm("bfloat16", 16, None), 0.0)


def test_parts_of_a_fused_layer_and_of_several_ranks_come_together(audit: Any) -> None:
    """Two matrices are one layer, and each of two ranks has half of the columns."""
    first, second = (torch.randn(SHAPE).bfloat16() for _ in range(2))
    half = SHAPE[1] // 2
    ranks: list[tuple[dict[str, torch.nn.Module], Any]] = []
    for rank in range(2):
        columns = slice(rank * half, (rank + 1) * half)

        def places(sample: Any, rank: int = rank) -> list[Any]:
            box = (0, SHAPE[0]), (rank * half, (rank + 1) * half)
            offset = (sample.name == "second") * SHAPE[0] * half
            return [audit.Place("layer", "weight", box, (0, 1), offset, (half, 1), (2 * SHAPE[0], half))]

        ranks.append(({"layer": Plain(torch.cat((first[:, columns], second[:, columns])))}, places))
    samples = samples_of({"first": first, "second": second})
    [layer] = held(audit, samples, ranks).layers()
    assert layer.error == 0
    for modules, _ in ranks[:1]:
        modules["layer"].get_parameter("weight")[SHAPE[0] :] = 0
    [layer] = held(audit, samples, ranks).layers()
    assert layer.error is not None
    assert 0.4 < layer.error < 0.6  # a quarter of it is gone


def test_experts_are_read_from_memory_if_their_kernel_uses_them_as_they_are(audit: Any) -> None:
    weights = [torch.randn(SHAPE).bfloat16() for _ in range(8)]
    made = [quantise(one, recipe_for("fp8_block", "weight", SHAPE)) for one in weights]
    experts = torch.nn.Module()
    experts.w2_weight = torch.nn.Parameter(torch.stack([one["weight"] for one in made]), requires_grad=False)
    scales = torch.stack([one["weight_scale_inv"] for one in made])
    experts.w2_weight_scale_inv = torch.nn.Parameter(scales, requires_grad=False)
    experts.quant_method = SimpleNamespace(fp8_backend=SimpleNamespace(name="TRITON"))  # type: ignore[assignment]
    size = SHAPE[0] * SHAPE[1]

    def places(sample: Any) -> list[Any]:
        box = (0, SHAPE[0]), (0, SHAPE[1])
        number = int(sample.name.split(".")[-2])
        return [audit.Place("experts", "w2_weight", box, (0, 1), number * size, (SHAPE[1], 1), (8, *SHAPE))]

    tensors = {f"layers.0.mlp.experts.{number}.w": one for number, one in enumerate(weights)}
    samples = samples_of(tensors, version=1, experts=8)
    assert [one.name for one in samples] == [f"layers.0.mlp.experts.{number}.w" for number in (1, 3, 5, 7)]
    [layer] = held(audit, samples, [({"experts": experts}, places)]).layers()
    assert layer.form == LayerForm("float8_e4m3fn", 8, (128, 128))
    assert layer.error is not None
    assert layer.error < 0.04
    experts.quant_method = SimpleNamespace(fp8_backend=SimpleNamespace(name="MARLIN"))  # type: ignore[assignment]
    [layer] = held(audit, samples, [({"experts": experts}, places)]).layers()
    assert layer.error is None
    assert "rearranged" in layer.note


@pytest.mark.parametrize(
    ("form", "kernel", "held_as", "least", "most"),
    [
        ("mxfp8", "mxfp8_backend", LayerForm("float8_e4m3fn", 8, (1, 32)), 0.01, 0.04),
        ("modelopt_nvfp4", "nvfp4_backend", LayerForm("uint8", 4, (1, 16)), 0.05, 0.13),
    ],
)
def test_experts_in_formats_of_small_blocks_are_dequantised(
    audit: Any, form: str, kernel: str, held_as: LayerForm, least: float, most: float
) -> None:
    """As vLLM's emulation keeps them: bytes as scales, two weights in a byte, and a scale of the whole."""
    weights = [torch.randn(SHAPE).bfloat16() * 2**number for number in range(4)]
    recipe = recipe_for(form, "w2_weight", SHAPE)
    made = [quantise(one, recipe) for one in weights]
    experts = torch.nn.Module()
    for name in made[0]:
        stacked = torch.nn.Parameter(torch.stack([one[name] for one in made]), requires_grad=False)
        experts.register_parameter(name, stacked)
    experts.quant_method = SimpleNamespace(**{kernel: SimpleNamespace(name="EMULATION")})  # type: ignore[assignment]
    sent = recipe.sent_as
    width = sent.shape[1]

    def places(sample: Any) -> list[Any]:
        box = (0, SHAPE[0]), (0, width)
        number = int(sample.name.split(".")[-2])
        return [audit.Place("experts", "w2_weight", box, (0, 1), number * SHAPE[0] * width, (width, 1),
                            (4, SHAPE[0], width))]  # fmt: skip

    tensors = {f"layers.0.mlp.experts.{number}.w": one for number, one in enumerate(weights)}
    samples = Samples(1, {name: replace(sent, name=name) for name in tensors}, experts=4)
    list(samples.keep(source_of(list(tensors.items()))))
    [layer] = held(audit, list(samples.all()), [({"experts": experts}, places)]).layers()
    assert layer.form == held_as
    assert layer.error is not None
    assert least < layer.error < most
    scales = experts.get_parameter("w2_weight_scale")
    scales.view(torch.uint8)[2] += 1 if form == "mxfp8" else 4
    [layer] = held(audit, list(samples.all()), [({"experts": experts}, places)]).layers()
    assert layer.error is not None
    assert layer.error > held_as.bound


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [((256, 384), (2, 3), (128, 128)), ((300, 200), (3, 2), (128, 128)), ((192, 256), (192, 8), (1, 32)),
     ((96, 64), (1, 96), (1, -1)), ((96, 256), (2, 96), (1, 128)), ((96, 64), (), (-1, -1)),
     ((384, 128), (3, 1), (128, 128)), ((384, 128), (3,), (128, -1))],
)  # fmt: skip
def test_the_block_of_scales_follows_from_their_shape(
    audit: Any, shape: tuple[int, int], grid: tuple[int, ...], block: tuple[int, int]
) -> None:
    """Also where the last block is not full, where a block is as wide as the weight, and where a kernel keeps the
    scales transposed."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(shape).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(torch.ones(grid), requires_grad=False)
    assert audit.form_of(layer, "weight", shape) == ("float8_e4m3fn", 8, block)


def test_a_kernel_that_fails_is_a_note(audit: Any) -> None:
    weight = torch.randn(SHAPE).bfloat16()
    packed = Packed(weight)
    del packed.rows
    [layer] = held(audit, samples_of({"w": weight}), [({"layer": packed}, whole(audit))]).layers()
    assert layer.error is None
    assert "rows" in layer.note


def test_a_matrix_that_no_rank_has_is_named(audit: Any) -> None:
    weight = torch.randn(SHAPE).bfloat16()
    nowhere: Any = ({}, lambda _: [])
    answers = held(audit, samples_of({"w": weight}), [nowhere, nowhere])
    assert answers.unplaced() == [0]
    assert answers.layers() == []
