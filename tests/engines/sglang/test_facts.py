"""The capabilities of an SGLang server, derived from what it reports."""

from dataclasses import replace
from typing import Any

import pytest

from millrace.engines.experts import Experts
from millrace.engines.sglang.facts import CAPABILITY_PATHS, capabilities_of, kept_after_flush, read_facts
from millrace.engines.sglang.loading import LOADER
from millrace.engines.stock.facts import TAKES
from millrace.engines.stock.model import Model
from millrace.types import Capability

PATHS = dict.fromkeys([*CAPABILITY_PATHS.values(), "/update_weights_from_tensor"])
SERVED = {"has_image_understanding": False}
SERVER: dict[str, Any] = {
    "version": "0.5.23",
    "device": "cuda",
    "dp_size": 1,
    "pp_size": 1,
    "enable_dp_attention": False,
    "enable_lora": False,
    "disable_overlap_schedule": False,
    "skip_tokenizer_init": False,
    "grammar_backend": "xgrammar",
    "enable_memory_saver": True,
    "load_format": "auto",
    "quantization": None,
}
TEXT = Model(vocab_size=100, shapes=None)
MIXTURE = replace(TEXT, experts=Experts(layers=(0,), decoder_layers=1, count=4))
UPDATES = frozenset[Capability]().union(*TAKES.values())
GROUP = Capability.UPDATE_FROM_PROCESS_GROUP


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({}, {GROUP, Capability.UPDATE_FROM_CUDA_IPC, Capability.UPDATE_FROM_DISK}),
        ({"device": "cpu"}, {GROUP, Capability.UPDATE_FROM_TORCH_STORAGE, Capability.UPDATE_FROM_DISK}),
        ({"dp_size": 2}, {Capability.UPDATE_FROM_DISK}),
        ({"pp_size": 2}, {GROUP, Capability.UPDATE_FROM_DISK}),
        ({"quantization": "fp8"}, set()),
        ({"quantization": "fp8", "load_format": "flash_rl"}, {GROUP, Capability.UPDATE_FROM_CUDA_IPC}),
    ],
)
def test_weights_come_only_by_ways_that_the_server_survives(settings: dict[str, Any], updates: set[Capability]) -> None:
    assert capabilities_of(PATHS, SERVED, SERVER | settings, TEXT) & UPDATES == updates


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"device": "cpu"}, {Capability.UPDATE_FROM_PARTS, Capability.WHOLE_BROADCASTS, Capability.SAMPLED_CHECKSUMS}),
        ({}, {Capability.UPDATE_FROM_PARTS, Capability.WHOLE_BROADCASTS, Capability.SAMPLED_CHECKSUMS}),
        ({"pp_size": 2}, set()),
        ({"quantization": "fp8", "load_format": "flash_rl"}, set()),
        ({"device": "cpu", "custom_weight_loader": None}, set()),
    ],
)
def test_what_the_weight_loader_adds(settings: dict[str, Any], found: set[Capability]) -> None:
    by_loader = {Capability.UPDATE_FROM_PARTS, Capability.WHOLE_BROADCASTS, Capability.SAMPLED_CHECKSUMS}
    server = SERVER | {"custom_weight_loader": [LOADER]} | settings
    assert capabilities_of(PATHS, SERVED, server, TEXT) & by_loader == found


@pytest.mark.parametrize(
    ("config", "loader", "updates"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, [LOADER], {Capability.UPDATE_FROM_CUDA_IPC}),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None, set()),
        ({"quant_method": "fp8"}, [LOADER], set()),
        ({"quant_method": "compressed-tensors"}, [LOADER], set()),
    ],
)
def test_of_quantised_folders_the_loader_takes_those_that_the_server_uses_as_they_are(
    config: dict[str, Any], loader: list[str] | None, updates: set[Capability]
) -> None:
    """The server reports no quantisation: only the folder says it."""
    server, model = SERVER | {"custom_weight_loader": loader}, replace(TEXT, quantization=config)
    found = capabilities_of(PATHS, SERVED, server, model)
    assert found & UPDATES == updates
    assert (Capability.AUDIT in found) is (loader is not None)


def test_penalties_are_right_only_without_overlap() -> None:
    assert Capability.PENALTIES not in capabilities_of(PATHS, SERVED, SERVER, TEXT)
    assert Capability.PENALTIES in capabilities_of(PATHS, SERVED, SERVER | {"disable_overlap_schedule": True}, TEXT)


@pytest.mark.parametrize(
    ("settings", "experts", "there"),
    [
        ({}, MIXTURE, False),
        ({"enable_return_routed_experts": True}, MIXTURE, True),
        ({"enable_return_routed_experts": True}, TEXT, False),
        ({"enable_return_routed_experts": True, "pp_size": 2}, MIXTURE, False),
        ({"enable_return_routed_experts": True, "version": "0.5.15"}, MIXTURE, False),
        ({"enable_return_routed_experts": True, "version": "0.5.15", "disable_overlap_schedule": True}, MIXTURE, True),
    ],
)
def test_routed_experts_are_returned_only_where_they_are_right(
    settings: dict[str, Any], experts: Model, there: bool
) -> None:
    found = capabilities_of(PATHS, SERVED, SERVER | settings, experts)
    assert (Capability.ROUTED_EXPERTS in found) is there


def test_stop_texts_need_a_tokenizer() -> None:
    there = PATHS | {"/v1/detokenize": None}
    assert Capability.STOP_TEXTS in capabilities_of(there, SERVED, SERVER, TEXT)
    assert Capability.STOP_TEXTS not in capabilities_of(there, SERVED, SERVER | {"skip_tokenizer_init": True}, TEXT)
    assert Capability.STOP_TEXTS not in capabilities_of(PATHS, SERVED, SERVER, TEXT)


@pytest.mark.parametrize(
    ("settings", "follows"),
    [
        ({}, True),
        ({"grammar_backend": "none"}, False),
        ({"grammar_backend": None}, False),
        ({"skip_tokenizer_init": True}, False),
        ({"device": "cpu"}, True),
        ({"device": "cpu", "version": "0.5.15"}, False),  # it dies of them
        ({"version": "0.5.15"}, True),
    ],
)
def test_json_schemas_need_a_grammar_backend_and_a_tokenizer(settings: dict[str, Any], *, follows: bool) -> None:
    there = PATHS | {"/v1/detokenize": None}
    assert (Capability.JSON_SCHEMA in capabilities_of(there, SERVED, SERVER | settings, TEXT)) == follows


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("model", [TEXT, replace(TEXT, image_token=7)])
def test_images_need_a_placeholder_and_a_server_that_loaded_the_vision_tower(model: Model, *, sees: bool) -> None:
    found = capabilities_of(PATHS, {"has_image_understanding": sees}, SERVER, model)
    assert (Capability.IMAGES in found) == (sees and model.image_token is not None)


@pytest.mark.parametrize(
    ("settings", "caches"),
    [
        ({}, 1),
        ({"dp_size": 2}, 2),
        ({"dp_size": 2, "enable_dp_attention": True}, 2),  # 0.5.15
        ({"attn_dp_size": 2, "enable_dp_attention": True}, 2),  # 0.5.23
    ],
)
def test_each_data_parallel_rank_has_a_cache(settings: dict[str, Any], caches: int) -> None:
    about = {"tp_size": 2, "max_req_input_len": 100, "dtype": "auto"}
    served = {**SERVED, "model_path": "/model"}
    server = {**SERVER, **about, "enable_deterministic_inference": False, **settings}
    assert read_facts(PATHS, served, server, TEXT).caches == caches


def test_a_cache_that_a_flush_does_not_reach_is_found() -> None:
    offloading = SERVER | {"enable_hierarchical_cache": True, "hicache_storage_backend": None, "enable_lmcache": False}
    assert Capability.KV_OFFLOAD in capabilities_of(PATHS, SERVED, offloading, TEXT)
    assert Capability.KV_OFFLOAD not in capabilities_of(PATHS, SERVED, SERVER, TEXT)
    assert kept_after_flush(offloading) is None
    assert kept_after_flush(offloading | {"hicache_storage_backend": "file"}) == "--hicache-storage-backend"
