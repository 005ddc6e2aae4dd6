"""What counts as a number."""

from collections.abc import Iterator

import pytest
import torch

from millrace.errors import PublishError
from millrace.weights.cast import Dtypes
from millrace.weights.finite import only_finite

AS_IT_IS = Dtypes(None, {})

SOUND = [("a", torch.ones(3)), ("large", torch.full((4,), 2e38)), ("wide", torch.tensor([1e39], dtype=torch.float64))]
BAD = [
    ("nan", torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)),
    ("infinite", torch.tensor([float("inf"), float("-inf")])),
    ("imaginary", torch.tensor([complex(0, float("nan"))])),
]


def test_what_is_finite_passes_though_its_sum_is_not() -> None:
    assert only_finite(SOUND, SOUND, AS_IT_IS) is SOUND
    assert [name for name, _ in only_finite(SOUND, iter(SOUND), AS_IT_IS)] == [name for name, _ in SOUND]


@pytest.mark.parametrize("bad", BAD, ids=[name for name, _ in BAD])
def test_what_is_not_is_named(bad: tuple[str, torch.Tensor]) -> None:
    with pytest.raises(PublishError, match=f"^{bad[0]} has NaN"):
        only_finite(SOUND, [*SOUND, bad], AS_IT_IS)

    def as_they_come() -> Iterator[tuple[str, torch.Tensor]]:
        yield from [*SOUND, bad]

    seen = iter(only_finite(SOUND, as_they_come(), AS_IT_IS))
    with pytest.raises(PublishError, match=f"^{bad[0]} has NaN"):
        list(seen)


@pytest.mark.parametrize(
    ("count", "says"),
    [(1, "^nan has NaN"), (2, "^nan and 1 more tensor have NaN"), (3, "^nan and 2 more tensors have")],
)
def test_the_message_counts_the_tensors(count: int, says: str) -> None:
    with pytest.raises(PublishError, match=says):
        only_finite(BAD[:count], BAD[:count], AS_IT_IS)


def test_float16_holds_less_than_the_trainers_dtype() -> None:
    loud = [("a", torch.ones(2)), ("loud", torch.tensor([70_000.0])), ("norm", torch.tensor([70_000.0]))]
    float16 = Dtypes("float16", {"norm": "float32"})
    with pytest.raises(PublishError, match="^loud has NaN or infinite values in float16"):
        only_finite(loud, loud, float16)
    assert only_finite(loud, loud, Dtypes("bfloat16", {})) is loud
