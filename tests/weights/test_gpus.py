"""The GPUs that the trainer's process sees, and which of them an engine's ranks are on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.weights.transports.gpus import VisibleGpus, names_of

UUIDS = tuple(f"{letter * 8}-1111-2222-3333-444444444444" for letter in "abcdef01")


def see(visible: str | None, host: tuple[str, ...] = UUIDS) -> VisibleGpus:
    """A process with this CUDA_VISIBLE_DEVICES on a host with these GPUs."""
    names = range(len(host)) if visible is None else visible.split(",")
    found = [host[int(name)] if str(name).isdecimal() else str(name).removeprefix("GPU-") for name in names]
    return VisibleGpus(names_of(visible, len(found)), tuple(found))


@pytest.mark.parametrize(
    ("visible", "gpus", "indices"),
    [
        (None, ("0",), (0,)),
        (None, ("3", "1"), (3, 1)),  # in the order of the ranks
        ("4,5,6,7", ("6", "7"), (2, 3)),
        ("7,6", ("6",), (1,)),
        (f"GPU-{UUIDS[3]},GPU-{UUIDS[1]}", (f"GPU-{UUIDS[1]}",), (1,)),
        ("2,1", (f"GPU-{UUIDS[1]}",), (1,)),
        ("2,1", ("GPU-BBBB",), (1,)),
        (None, (), ()),
    ],
)
def test_a_gpu_is_found_by_its_index_and_by_its_uuid(
    visible: str | None, gpus: tuple[str, ...], indices: tuple[int, ...]
) -> None:
    assert see(visible).indices(gpus) == indices
    assert see(visible).unseen(gpus) == ()


@pytest.mark.parametrize(
    ("visible", "gpus", "unseen"),
    [
        ("0", ("0", "1"), ("1",)),  # a Ray worker, and an engine over two GPUs
        ("1", ("0",), ("0",)),
        ("0,1", (f"GPU-{UUIDS[2]}",), (f"GPU-{UUIDS[2]}",)),
    ],
)
def test_a_gpu_of_another_process_is_not_seen(visible: str, gpus: tuple[str, ...], unseen: tuple[str, ...]) -> None:
    assert see(visible).unseen(gpus) == unseen
    assert see(visible).indices(gpus) == ()


@pytest.mark.parametrize("visible", [f"GPU-{UUIDS[0]}", "0,9"])
def test_what_can_t_be_compared_is_unknown(visible: str) -> None:
    """The process knows its GPU only by its UUID, or CUDA ignores an entry that names no GPU."""
    seen = VisibleGpus(names_of(visible, 1), UUIDS[:1])
    assert seen.unseen(("0",)) == ()
    assert seen.indices(("0",)) == ()


@given(st.permutations(range(8)), st.integers(1, 8), st.data())
def test_trainer_and_engine_mean_the_same_gpus(order: list[int], count: int, data: st.DataObject) -> None:
    """The engine's ranks get the GPUs of its own CUDA_VISIBLE_DEVICES, by index or UUID."""
    visible = order[:count]
    ranks = data.draw(st.lists(st.sampled_from(range(8)), unique=True, min_size=1))
    by_uuid = data.draw(st.booleans())
    gpus = [f"GPU-{UUIDS[gpu]}" if by_uuid else str(gpu) for gpu in ranks]
    seen = see(",".join(map(str, visible)))
    if set(ranks) <= set(visible):
        assert [seen.uuids[index] for index in seen.indices(gpus)] == [UUIDS[gpu] for gpu in ranks]
    else:
        assert seen.indices(gpus) == ()
    assert seen.unseen(gpus) == tuple(name for name, gpu in zip(gpus, ranks, strict=True) if gpu not in visible)
