"""What an audit says about an engine."""

from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.audit import HeldLayer
from millrace.quantisation import LayerForm, Quantisation, quantisation_of
from millrace.weights.audit import EngineAudit, Samples, SentAs, experts_in, spread
from millrace.weights.source import source_of

FP8 = LayerForm("float8_e4m3fn", 8, (128, 128))
PLAIN = LayerForm("bfloat16", 16, None)
HEAD = HeldLayer("lm_head", "lm_head.weight", PLAIN, 0.0)


def mlp(form: LayerForm, error: float | None, note: str = "") -> HeldLayer:
    return HeldLayer("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj.weight", form, error, note)


def asked(option: str = "fp8") -> Quantisation | None:
    return quantisation_of(option, None)


def test_a_sound_engine_has_no_faults() -> None:
    audit = EngineAudit(asked(), (mlp(FP8, 0.026), HEAD))
    assert audit.faults() == []
    assert str(audit) == (
        "1 layers float8_e4m3fn with scales for blocks of 128x128: error 0.0260, at most 0.0260 "
        "(model.layers.0.mlp.down_proj); 1 layers bfloat16: error 0.0000, at most 0.0000 (lm_head)"
    )


def test_a_layer_that_is_not_quantised_is_a_fault() -> None:
    assert EngineAudit(asked(), (mlp(PLAIN, 0.0), HEAD)).faults() == [
        "model.layers.0.mlp.down_proj is bfloat16, and fp8 was asked for"
    ]


@pytest.mark.parametrize("option", ["int8_per_channel_weight_only", "of_tomorrow"])
def test_an_engine_of_which_no_layer_is_quantised_is_found(option: str) -> None:
    """vLLM has accepted the first of these for a dense model, and has quantised nothing."""
    [fault] = EngineAudit(asked(option), (mlp(PLAIN, 0.0), HEAD)).faults()
    assert "is bfloat16, as are all others, and" in fault


@pytest.mark.parametrize("error", [0.5, inf, nan])
def test_an_implausible_error_is_a_fault(error: float) -> None:
    [fault] = EngineAudit(None, (mlp(FP8, error),)).faults()
    assert fault.endswith("away from the trainer's weights, where at most 0.1 is plausible")


def test_what_could_not_be_measured_is_said() -> None:
    audit = EngineAudit(asked(), (mlp(FP8, None, "packed"),), ("a.weight", "b.weight"))
    assert audit.faults() == []
    assert str(audit).endswith("not measured (packed); 2 matrices not found, such as a.weight")


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(0, 10**6))
def test_places_are_inside_and_different(size: int, count: int, shift: int) -> None:
    places = spread(size, count, shift)
    assert len(places) == min(size, count)
    assert all(0 <= place < size for place in places)


def test_only_matrices_are_sampled_and_a_few_experts() -> None:
    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(16)]
    assert experts_in(names) == 16
    tensors = [(name, torch.zeros(2, 2)) for name in [*names, "q.weight"]] + [("norm.weight", torch.zeros(2))]
    chosen = []
    for version in (1, 2, 3, 4):
        samples = Samples(version, experts=16)
        list(samples.keep(source_of(tensors)))
        found = [one.name for one in samples.all()]
        assert found[-1] == "q.weight"
        chosen += found[:-1]
    assert sorted(chosen) == sorted(names)  # after some publishes, each was compared


def test_a_sample_names_what_is_sent_for_it() -> None:
    samples = Samples(0, {"w": SentAs("w_packed", "int32", (2, 1), 8)})
    list(samples.keep(source_of([("w", torch.ones(2, 8))])))
    [one] = samples.all()
    assert (one.name, one.dtype, one.shape, one.packed) == ("w_packed", "int32", (2, 1), 8)
    assert one.values == torch.ones(2, 8, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
