"""The choice of a transport, from what the trainer sees."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.models import TransportName
from millrace.errors import PublishError
from millrace.fleet.local import agreeing_on_memory
from millrace.types import Capability
from millrace.weights.transports.choice import TransportCandidate, choose
from millrace.weights.transports.registry import CLASSES, needs

MEMORY_FILE = Capability.UPDATE_FROM_SHARED_MEMORY
TORCH = Capability.UPDATE_FROM_TORCH_STORAGE
IPC = Capability.UPDATE_FROM_CUDA_IPC
BARE = Capability.UPDATE_FROM_BARE_NCCL
GROUP = Capability.UPDATE_FROM_PROCESS_GROUP

candidates = st.lists(
    st.builds(
        TransportCandidate,
        st.sampled_from(["a", "b", "c"]),
        st.booleans(),
        st.frozensets(st.sampled_from([MEMORY_FILE, TORCH, IPC, BARE, GROUP])),
    ),
    min_size=1,
    max_size=3,
)


def see(*capabilities: Capability, here: bool = True) -> TransportCandidate:
    return TransportCandidate("here" if here else "away", here, frozenset(capabilities))


@pytest.mark.parametrize(
    ("engines", "gpu", "name", "why"),
    [
        ([see(MEMORY_FILE, GROUP)] * 2, False, "shm", "on this host"),
        ([see(TORCH, GROUP)], False, "shm", "on this host"),
        ([see(IPC, GROUP)], True, "cuda_ipc", "on this host"),
        ([see(MEMORY_FILE, GROUP), see(MEMORY_FILE, GROUP, here=False)], False, "gloo", "away is on another host"),
        ([see(IPC, GROUP, here=False)] * 2, True, "nccl", "away, away are on another host"),
        ([see(BARE, here=False)], True, "nccl", "away is on another host"),
        ([see(IPC, GROUP, here=False), see(GROUP, here=False)], True, "gloo", "away, away are on another host"),
        ([see(IPC, GROUP, here=False), see(IPC, GROUP)], True, "gloo", "away is on another host"),
        ([see(BARE)], True, None, "no memory is shared"),
        ([see(IPC, GROUP)], False, "gloo", "no memory is shared"),
        ([see(IPC, GROUP, here=False)], False, "gloo", "away is on another host"),
        ([see(MEMORY_FILE, here=False)], False, None, "not every engine can join a process group"),
        ([see(MEMORY_FILE), see(IPC)], True, None, "no memory is shared"),
    ],
)
def test_memory_where_all_share_it_and_a_broadcast_otherwise(
    engines: list[TransportCandidate], gpu: bool, name: TransportName | None, why: str
) -> None:
    choice = choose("auto", engines, trainer_has_gpu=gpu, folder=False)
    assert choice.name == name
    assert why in choice.why


def test_the_disk_is_the_last_choice() -> None:
    attached = see(Capability.UPDATE_FROM_DISK, here=False)
    assert choose("auto", [attached], trainer_has_gpu=True, folder=True).name == "disk"
    assert choose("auto", [attached], trainer_has_gpu=True, folder=False).name is None
    both = see(MEMORY_FILE, GROUP, Capability.UPDATE_FROM_DISK)
    assert choose("auto", [both], trainer_has_gpu=True, folder=True).name == "shm"


def test_cuda_ipc_needs_a_trainer_that_sees_the_gpus_of_all_engines() -> None:
    engines = [
        see(IPC, GROUP),
        TransportCandidate("hidden", here=True, capabilities=frozenset({IPC, GROUP}), unseen=("1",)),
    ]
    choice = choose("auto", engines, trainer_has_gpu=True, folder=False)
    assert choice.name == "gloo"
    for why in (choice.why, refused("cuda_ipc", engines)):
        assert "hidden is on GPU 1, which this process does not see" in why
        assert "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1" in why
    assert choose("gloo", engines, trainer_has_gpu=True, folder=False).name == "gloo"


def refused(wanted: TransportName, engines: list[TransportCandidate]) -> str:
    with pytest.raises(PublishError) as caught:
        choose(wanted, engines, trainer_has_gpu=True, folder=False)
    return str(caught.value)


def test_sidecars_are_used_if_there_are_any() -> None:
    engines = [see(MEMORY_FILE, GROUP), see(TORCH, GROUP, here=False), see(IPC, GROUP, here=False)]
    choice = choose("auto", engines, trainer_has_gpu=True, folder=False, sidecars=True)
    assert choice.name == "ucx"
    assert "there are sidecars" in choice.why
    with pytest.raises(PublishError, match="^away can't take weights by the transport"):
        choose("auto", [see(MEMORY_FILE), see(GROUP, here=False)], trainer_has_gpu=True, folder=False, sidecars=True)


@given(candidates, st.booleans())
def test_every_engine_can_use_the_chosen_transport(engines: list[TransportCandidate], gpu: bool) -> None:
    choice = choose("auto", engines, trainer_has_gpu=gpu, folder=False)
    if choice.name is not None:
        assert all(engine.capabilities & needs(choice.name) for engine in engines)
        assert gpu or choice.name not in ("cuda_ipc", "nccl")
        assert choice.name in ("gloo", "nccl") or all(engine.here for engine in engines)
    else:
        assert not all(engine.here and GROUP in engine.capabilities for engine in engines)


@given(candidates, st.sampled_from(sorted(CLASSES)))
def test_the_transport_of_the_config_is_used_or_refused(
    engines: list[TransportCandidate], wanted: TransportName
) -> None:
    if all(engine.capabilities & needs(wanted) for engine in engines):
        assert choose(wanted, engines, trainer_has_gpu=False, folder=True).name == wanted
    else:
        with pytest.raises(PublishError, match=f"can't take weights by the transport {wanted}; choose another"):
            choose(wanted, engines, trainer_has_gpu=False, folder=True)


@pytest.mark.parametrize("inherited", ["0", "1"])
def test_an_sglang_gets_the_setting_of_nccls_memory_unless_it_inherits_one(inherited: str) -> None:
    assert agreeing_on_memory({"PATH": "/bin"}) == {"NCCL_CUMEM_ENABLE": "-2"}
    assert agreeing_on_memory({"NCCL_CUMEM_ENABLE": inherited}) == {}


def test_the_registry_has_a_transport_for_every_name_of_the_setting() -> None:
    assert set(CLASSES) == set(get_args(TransportName)) - {"auto"}
    assert all(needs(name) for name in CLASSES)
