"""Which layers of a model have experts, and how a server's table of them becomes a compact array."""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.experts import Experts, compacted, experts_of, with_experts
from millrace.engines.sglang_wire import decode_generate, encode_generate
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.engines.stock.carried import cut
from millrace.engines.stock.model import read_model
from millrace.errors import ConfigError
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams
from tests.architectures import make_model

REQUEST = GenerateRequest((1, 2, 3), SamplingParams(8), request_id="r")
MODEL = Experts(layers=(1, 2), decoder_layers=3, count=4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen3_moe", (0, 1)),
        ("qwen2_moe", (0, 1)),
        ("mixtral", (0, 1)),
        ("gpt_oss", (0, 1)),
        ("olmoe", (0, 1)),
        ("glm4_moe", (1,)),
        ("deepseek_v3", (1,)),
        ("llama", None),
    ],
)
def test_they_are_read_from_the_tensors_of_a_folder(name: str, layers: tuple[int, ...] | None, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    assert read_model(tmp_path).experts == (None if layers is None else Experts(layers, 2, 4))


def test_layers_that_predict_further_tokens_do_not_count() -> None:
    shapes = {
        f"model.layers.{layer}.mlp.experts.{number}.up_proj.weight": (1,) for layer in (1, 2) for number in (0, 6)
    }
    shared = {"model.layers.0.mlp.shared_experts.up_proj.weight": (1,)}
    assert experts_of(shapes | shared, 2) == Experts((1,), 2, 7)


@given(st.data(), st.integers(1, 6), st.integers(1, 3), st.sampled_from([4, 256, 257]))
def test_a_table_keeps_the_layers_with_experts_in_the_smallest_dtype(
    data: st.DataObject, rows: int, chosen: int, count: int
) -> None:
    table = data.draw(arrays(np.int32, (rows, 3, chosen), elements=st.integers(0, count - 1)))
    model = replace(MODEL, count=count)
    compact = compacted(table.reshape(-1), model, rows=rows)
    assert compact is not None
    assert np.array_equal(compact, table[:, 1:])
    assert compact.itemsize == (1 if count <= 256 else 2)
    assert compact.base is None  # it does not keep the server's answer in memory


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (np.zeros(7, np.int32), "7 entries, and not one or more for each of 2 tokens and 3 layers"),
        (np.zeros(0, np.int32), "0 entries"),
        (np.full((2, 3, 1), 4), "4 to 4; the model has 4"),
        (np.full((2, 3, 1), -1), "-1 to -1"),
    ],
)
def test_a_table_that_does_not_fit_the_model_is_malformed(table: np.ndarray[Any, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compacted(table, MODEL, rows=2)


def made(output: int, finish: FinishReason = FinishReason.LENGTH) -> Generation:
    return Generation("r", tuple(range(output)), np.zeros(output, np.float32), finish, (), 3, 0)


def test_an_answer_without_them_is_malformed_unless_it_was_aborted() -> None:
    with pytest.raises(ValueError, match="the answer has no routed experts"):
        with_experts(REQUEST, made(2), None, MODEL)
    for output in (0, 2):
        assert with_experts(REQUEST, made(output, FinishReason.ABORT), None, MODEL).routed_experts is None
    last = replace(REQUEST, routed_experts_start=3)
    assert with_experts(last, made(1), None, MODEL).routed_experts is None  # no layer has read the token


def test_sglang_is_asked_for_them_and_its_text_is_decoded() -> None:
    request = replace(REQUEST, routed_experts_start=2)
    asked = encode_generate(request, experts=True)
    assert (asked["return_routed_experts"], asked["routed_experts_start_len"]) == (True, 2)
    assert "return_routed_experts" not in encode_generate(request)
    table = np.arange(12, dtype=np.int32).reshape(2, 3, 2) % 4
    meta = {
        "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]],
        "weight_version": "1",
        "prompt_tokens": 3,
        "routed_experts": base64.b64encode(table.tobytes()).decode(),
    }
    body = {"output_ids": [5, 6], "meta_info": meta}
    decoded = decode_generate(request, body, MODEL)
    assert decoded.routed_experts is not None
    assert decoded.routed_experts.tolist() == table[:, 1:].tolist()
    assert "routed_experts" not in decoded.extra
    assert decode_generate(request, body).extra["routed_experts"] == meta["routed_experts"]
    unfinished = {"output_ids": [5, 6], "meta_info": {**meta, "finish_reason": None, "routed_experts": None}}
    assert decode_generate(request, unfinished, MODEL).routed_experts is None


def test_with_images_all_are_asked_for_because_positions_differ() -> None:
    request = replace(REQUEST, routed_experts_start=2, images=(b"image",))
    assert encode_generate(request, experts=True)["routed_experts_start_len"] == 0
    table = np.arange(24, dtype=np.int32).reshape(4, 3, 2) % 4
    found = with_experts(request, made(2), table, MODEL).routed_experts
    assert found is not None
    assert found.tolist() == table[2:, 1:].tolist()


def test_a_generation_that_is_cut_at_a_stop_text_loses_those_of_the_cut_tokens() -> None:
    rows = np.arange(5 * 2 * 2, dtype=np.uint8).reshape(5, 2, 2)
    whole = replace(made(3), routed_experts=rows)
    short = cut(whole, 1).routed_experts
    assert short is not None
    assert np.array_equal(short, rows[:3])


async def test_a_model_without_experts_is_named_before_a_server_starts(tiny_model: Path, tmp_path: Path) -> None:
    config = SGLangEngineConfig(kind="sglang", device="cpu", return_routed_experts=True)
    with pytest.raises(ConfigError, match="return_routed_experts is for a mixture of experts, and .* has no experts"):
        await start(config, LaunchSpec(model_path=tiny_model, log_dir=tmp_path))
