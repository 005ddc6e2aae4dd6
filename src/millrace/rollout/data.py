"""Data sets of problems: a JSONL file or a Hugging Face data set in GSM8K's format, or the generator."""

from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
import orjson

from millrace.config.models import DataConfig, FileDataConfig, GeneratedDataConfig, HubDataConfig
from millrace.errors import DataError
from millrace.rollout.numbers import parse_number
from millrace.rollout.problems import generate_problems
from millrace.rollout.sample import Problem


def load_problems(config: DataConfig, *, held_out: bool = False) -> tuple[Problem, ...]:
    """Return all problems of a data set.

    held_out: the generator returns held-out problems, which training never sees. Files and Hub data sets are not
    divided. Raises DataError if the data set is missing or empty, or a line of it is not in GSM8K's format.
    """
    match config:
        case GeneratedDataConfig():
            problems = tuple(generate_problems(config.seed, config.problems, held_out=held_out))
        case FileDataConfig():
            problems = tuple(_read_file(config.path))
        case HubDataConfig():
            problems = tuple(_read_hub(config))
    if not problems:
        raise DataError(f"the data set {config!r} has no problems")
    return problems


def problems_at(problems: Sequence[Problem], seed: int, position: int, count: int) -> tuple[Problem, ...]:
    """Return `count` problems from `position` on, in an endless order.

    Each epoch has every problem once, in a different order. The order depends on the seed only, so a resumed run
    continues with the right problem.
    """
    size = len(problems)
    epochs = range(position // size, (position + count - 1) // size + 1)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(size) for epoch in epochs}
    return tuple(problems[orders[index // size][index % size]] for index in range(position, position + count))


def parse_answer(text: str) -> str:
    """Return the number after `####` at the end of a GSM8K answer: a decimal without separators, or a fraction.

    Raises ValueError if the answer does not end in `####` and a number.
    """
    _, mark, tail = text.rpartition("####")
    number = parse_number(tail) if mark else None
    if number is None:
        raise ValueError("its answer does not end in `#### ` and a number")
    try:
        return str(Decimal(tail.strip().replace(",", "").replace("$", "")))
    except InvalidOperation:  # a fraction, an exponent or another form
        return str(number)


def _read_file(path: Path) -> Iterator[Problem]:
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
    except OSError as error:
        raise DataError(f"the data file {path} can't be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _problem(f"{path.stem}-{number}", orjson.loads(line))
        except ValueError as error:  # orjson.JSONDecodeError is a ValueError too
            raise DataError(f"{path}, line {number}: {_reason(line, error)}") from error


def _reason(line: bytes, error: ValueError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as undecoded:
        return f"byte 0x{line[undecoded.start]:02x} is not UTF-8; save the file in this encoding"
    return str(error)


def _read_hub(config: HubDataConfig) -> Iterator[Problem]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("a data set from the Hub needs an extra: pip install 'millrace[hub]'") from error
    try:
        rows = datasets.load_dataset(config.path, config.name, split=config.split)
    except (OSError, ValueError) as error:
        raise DataError(f"the data set {config.path!r} (split {config.split!r}) can't be loaded: {error}") from error
    for number, row in enumerate(rows):
        try:
            yield _problem(f"{config.path}-{config.split}-{number}", row)
        except ValueError as error:
            raise DataError(f"the data set {config.path!r} (split {config.split!r}), row {number}: {error}") from error


def _problem(problem_id: str, row: object) -> Problem:
    """Return a row as a problem. Raises ValueError, whose message says what the row lacks."""
    match row:
        case Mapping():
            question, answer = row.get("question"), row.get("answer")
        case _:
            raise ValueError('it is not a JSON object with "question" and "answer"')
    if not isinstance(question, str) or not question.strip():
        raise ValueError('it has no "question" text')
    if not isinstance(answer, str):
        raise ValueError('it has no "answer" text')
    return Problem(problem_id, question, parse_answer(answer))
