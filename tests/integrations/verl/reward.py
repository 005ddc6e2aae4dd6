"""The reward of the tests: the share of digits in the response."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: object = None, **_: object
) -> float:
    return sum(character.isdigit() for character in solution_str) / max(len(solution_str), 1)
