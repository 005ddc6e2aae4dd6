"""The reward: whether the answer is the right word."""


def right(answer: str, row: dict[str, str]) -> float:
    """1 for the right word."""
    return float(answer.strip() == row["answer"])
