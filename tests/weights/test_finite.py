"""Which tensors count as finite."""

from collections.abc import Iterator

import pytest
import torch

from millrace.errors import PublishError
from millrace.weights.cast import Dtypes
from millrace.weights.finite import only_finite
from millrace.weights.source import source_of

AS_IT_IS = Dtypes(None, {})

SOUND = [("a", torch.ones(3)), ("large", torch.full((4,), 2e38)), ("wide", torch.tensor([1e39], dtype=torch.float64))]
BAD = [
    ("nan", torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)),
    ("infinite", torch.tensor([float("inf"), float("-inf")])),
    ("imaginary", torch.tensor([complex(0, float("nan"))])),
]


def test_finite_tensors_pass_even_if_their_sum_is_not_finite() -> None:
    sound = source_of(SOUND)
    assert only_finite(sound, AS_IT_IS) is sound
    assert [name for name, _ in only_finite(source_of(iter(SOUND)), AS_IT_IS)] == [name for name, _ in SOUND]


@pytest.mark.parametrize("bad", BAD, ids=[name for name, _ in BAD])
def test_a_tensor_that_is_not_finite_is_named(bad: tuple[str, torch.Tensor]) -> None:
    with pytest.raises(PublishError, match=f"^{bad[0]} has NaN"):
        only_finite(source_of([*SOUND, bad]), AS_IT_IS)

    def as_they_come() -> Iterator[tuple[str, torch.Tensor]]:
        yield from [*SOUND, bad]

    seen = iter(only_finite(source_of(as_they_come()), AS_IT_IS))
    with pytest.raises(PublishError, match=f"^{bad[0]} has NaN"):
        list(seen)


@pytest.mark.parametrize(
    ("count", "says"),
    [(1, "^nan has NaN"), (2, "^nan and 1 more tensor have NaN"), (3, "^nan and 2 more tensors have")],
)
def test_the_message_counts_the_tensors(count: int, says: str) -> None:
    with pytest.raises(PublishError, match=says):
        only_finite(source_of(BAD[:count]), AS_IT_IS)


def test_float16_holds_less_than_the_trainers_dtype() -> None:
    loud = source_of([("a", torch.ones(2)), ("loud", torch.tensor([70_000.0])), ("norm", torch.tensor([70_000.0]))])
    float16 = Dtypes("float16", {"norm": "float32"})
    with pytest.raises(PublishError, match="^loud has NaN or infinite values in float16"):
        only_finite(loud, float16)
    assert only_finite(loud, Dtypes("bfloat16", {})) is loud
