"""Runs of the placeholder token by which an engine shows how many tokens of a prompt are an image. Pure."""

from collections.abc import Sequence


def runs(token_ids: Sequence[int], placeholder: int) -> list[tuple[int, int]]:
    """Return the start and the length of each run of the placeholder.

    >>> runs([5, 9, 9, 6, 9], 9)
    [(1, 2), (4, 1)]
    """
    found: list[tuple[int, int]] = []
    for place, token in enumerate(token_ids):
        if token != placeholder:
            continue
        if found and sum(found[-1]) == place:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((place, 1))
    return found


def collapsed(token_ids: Sequence[int], placeholder: int) -> tuple[int, ...]:
    """Return the tokens with one placeholder in place of each run.

    >>> collapsed([5, 9, 9, 6, 9], 9)
    (5, 9, 6, 9)
    """
    return tuple(
        token
        for place, token in enumerate(token_ids)
        if token != placeholder or not place or token_ids[place - 1] != placeholder
    )
