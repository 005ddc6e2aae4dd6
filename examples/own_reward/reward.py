"""Rewards of your own. A function names what it wants to see, and is called with that."""


def mentions(answer: str, row: dict[str, list[str]]) -> float:
    """The share of the row's words that the answer mentions."""
    return sum(word in answer for word in row["words"]) / len(row["words"])


def letters(answer: str) -> float:
    """The share of letters in the answer."""
    return sum(character.isalpha() for character in answer) / max(len(answer), 1)


async def shortest(answers: list[str]) -> list[float]:
    """1 for the shortest answers of the group. Functions with plural parameters see all samples of a group at once."""
    least = min(map(len, answers))
    return [float(len(answer) == least) for answer in answers]
