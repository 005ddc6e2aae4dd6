"""A game as an environment: the model guesses a number, and learns each time whether it is higher or lower."""

import re

from millrace.rollout import Action, Step


class GuessNumber:
    """One game. Each episode makes one with the arguments of the config, resets it with its row and plays it."""

    def __init__(self, tries: int = 4) -> None:
        self.tries = tries
        self.number = 0

    def reset(self, row: dict[str, int]) -> str:
        """Return what the model reads first."""
        self.number = row["number"]
        return "How many coins are there?"

    def step(self, action: Action) -> Step:
        """Answer a turn of the model. The rewards of a game add up."""
        self.tries -= 1
        found = re.search(r"\d+", action.text)
        if found is None:
            return Step("How many?", reward=-0.1, done=not self.tries)
        guess = int(found[0])
        if guess == self.number:
            return Step(reward=1.0, done=True)
        return Step("more" if guess < self.number else "less", reward=0.1, done=not self.tries)

    def close(self) -> None:
        """End what the game has started; this one has nothing to end."""
