"""Environments with Gymnasium's interface: `reset()` returns (observation, info), `step(action)` a tuple of five."""

from collections.abc import Callable, Mapping
from typing import Any

from millrace.rollout.step import Action, Step


class UnreadableAction(Exception):
    """A turn of the model is no action. The model gets the message as the observation."""


def from_gym(
    make: Callable[[], Any],
    *,
    read_action: Callable[[str], Any],
    write: Callable[[Any], str] = str,
    instructions: str = "",
    penalty: float = 0.0,
) -> type:
    """Return an environment class for a config, which plays environments with Gymnasium's interface.

        FrozenLake = from_gym(lambda: gymnasium.make("FrozenLake-v1"), read_action=read_move, instructions="Move: ...")

    make: makes an environment for each episode. read_action: returns the action in the text of a turn; it raises
    UnreadableAction, whose message the model gets, if there is none. write: returns an observation as text.
    instructions: stand before the first observation. penalty: the reward of a turn without an action.

    A row with the column `seed` seeds its episode.
    """

    class GymEnvironment:
        def __init__(self) -> None:
            self.env = make()

        def reset(self, row: Mapping[str, Any]) -> str:
            observation, _ = self.env.reset(seed=row["seed"]) if "seed" in row else self.env.reset()
            return f"{instructions}\n{write(observation)}".strip()

        def step(self, action: Action) -> Step:
            try:
                chosen = read_action(action.text)
            except UnreadableAction as error:
                return Step(str(error), penalty)
            observation, reward, terminated, truncated, _ = self.env.step(chosen)
            return Step(write(observation), float(reward), bool(terminated or truncated))

        def close(self) -> None:
            self.env.close()

    return GymEnvironment
