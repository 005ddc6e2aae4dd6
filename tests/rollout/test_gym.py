"""Environments with Gymnasium's interface."""

import re
from collections.abc import Mapping
from typing import Any

from millrace.rollout import Action, Step
from millrace.rollout.adapters.gym import UnreadableAction, from_gym


class Walk:
    """As Gymnasium's environments: a walk along a line, to its end."""

    def __init__(self) -> None:
        self.closed = False

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self.place = seed or 0
        return self.place, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.place += action
        return self.place, float(action), self.place >= 3, self.place <= -3, {}

    def close(self) -> None:
        self.closed = True


def read_move(text: str) -> int:
    if (found := re.search(r"-?\d", text)) is None:
        raise UnreadableAction("Say how far.")
    return int(found[0])


def test_a_gym_environment_is_played_by_text() -> None:
    kind = from_gym(Walk, read_action=read_move, write=lambda place: f"at {place}", instructions="Walk.", penalty=-1.0)
    game = kind()
    assert game.reset({"seed": 1}) == "Walk.\nat 1"
    assert game.step(Action("I go 1 on")) == Step("at 2", 1.0, done=False)
    assert game.step(Action("I stay")) == Step("Say how far.", -1.0, done=False)
    assert game.step(Action("2")) == Step("at 4", 2.0, done=True)
    assert game.reset({}) == "Walk.\nat 0"
    assert game.step(Action("-3")) == Step("at -3", -3.0, done=True)  # truncated
    game.close()
    assert game.env.closed
