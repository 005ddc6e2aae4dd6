"""The tensors that an update may have."""

import pytest

from millrace.engines.stock.state import InvalidStateError
from millrace.engines.stock.tensors import check_shapes, check_whole


def test_tensors_must_be_the_models_and_all_of_them() -> None:
    shapes = {"a": (2, 3), "b": (4,)}
    check_shapes([("a", (2, 3))], shapes)
    check_shapes([("anything", (1,))], None)
    with pytest.raises(InvalidStateError, match="no tensor c"):
        check_shapes([("c", (1,))], shapes)
    with pytest.raises(InvalidStateError, match=r"a has shape \(3, 2\); in the model it has \(2, 3\)"):
        check_shapes([("a", (3, 2))], shapes)
    check_whole({"a", "b"}, shapes)
    with pytest.raises(InvalidStateError, match="1 of 2 tensors are missing, b among them"):
        check_whole({"a"}, shapes)
