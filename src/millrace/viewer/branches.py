"""The token sequences of one sample as a tree: what they have in common, and where they part. Pure functions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


def branch_tree(sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the tree of sequences that begin alike.

    A node is a stretch of tokens, from `start` to `end`, that all sequences below it share. `sequences` are their
    numbers, and `children` the nodes that follow. A leaf has one sequence, or several that are equal.
    """
    arrays = [np.asarray(one, dtype=np.int64) for one in sequences]
    return _node(arrays, list(range(len(arrays))), 0)


def _node(arrays: Sequence[Tokens], members: list[int], start: int) -> dict[str, Any]:
    end = common(arrays, members, start)
    groups: dict[int | None, list[int]] = {}
    for member in members:
        groups.setdefault(int(arrays[member][end]) if len(arrays[member]) > end else None, []).append(member)
    children: list[dict[str, Any]] = []
    if len(groups) > 1:
        if ended := groups.pop(None, []):
            children.append({"start": end, "end": end, "sequences": ended, "children": []})
        children += [_node(arrays, group, end) for group in groups.values()]  # as deep as there are sequences, at most
    return {"start": start, "end": end, "sequences": members, "children": children}


def common(arrays: Sequence[Tokens], members: Sequence[int], start: int) -> int:
    """Return the position up to which the members are equal, which they are up to `start`."""
    first = arrays[members[0]]
    end = len(first)
    for member in members[1:]:
        other = arrays[member]
        length = min(end, len(other))
        different = np.flatnonzero(first[start:length] != other[start:length])
        end = start + int(different[0]) if len(different) else length
    return end
