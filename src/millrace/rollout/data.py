"""Data sets of problems: a file, a Hugging Face data set, or the generator."""

import csv
import io
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from millrace.arguments import shown
from millrace.config.sources import DataConfig, FileDataConfig, GeneratedDataConfig, HubDataConfig, TasksDataConfig
from millrace.config.tasks import ColumnsConfig
from millrace.errors import DataError
from millrace.imports import needs_extra
from millrace.rollout.images import read_image, read_messages
from millrace.rollout.problems import generate_problems
from millrace.rollout.sample import Message, Problem

PROMPT_COLUMNS = ("question", "prompt", "messages")
IMAGE_COLUMNS = ("images", "image")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as it was read. where: its file and number, for error messages."""

    where: str
    problem_id: str
    value: object


def load_problems(
    config: DataConfig,
    *,
    held_out: bool = False,
    prompts: bool = True,
    optional: bool = False,
    check: Callable[[Problem], None] = lambda _: None,
) -> tuple[Problem, ...]:
    """Return all problems of a data set.

    held_out: the generator returns held-out problems, which training never sees. Files and Hub data sets are not
    divided. The tasks of an environment come from it later, so there are none here. prompts: whether the rows have
    prompts; if not, the messages are the system prompt alone. optional: whether there may be no column of prompts,
    which has the same effect. check: raises ValueError if a problem can't be used.

    Raises DataError if the data set is missing or empty, a row lacks a column or has another shape, or `check` refuses
    it. The message names file and row.
    """
    match config:
        case GeneratedDataConfig():
            made = generate_problems(config.seed, config.problems, held_out=held_out)
            problems = tuple(made if prompts else (replace(problem, messages=()) for problem in made))
        case FileDataConfig():
            rows = _read_file(config.path)
            problems = tuple(_problems(rows, config, prompts, optional, check, config.path.parent))
        case HubDataConfig():
            problems = tuple(_problems(_read_hub(config), config, prompts, optional, check, Path()))
        case TasksDataConfig():
            return ()
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


def _problems(
    rows: Iterator[_Row],
    config: ColumnsConfig,
    prompts: bool,
    optional: bool,
    check: Callable[[Problem], None],
    folder: Path,
) -> Iterator[Problem]:
    """Yield the rows as problems. folder: where the relative paths of images begin."""
    columns: ColumnsConfig | None = None
    for row in rows:
        try:
            value = _columns_of(row.value)
            columns = columns or _complete(config, value, prompts, optional)
            problem = _problem(row.problem_id, value, columns, folder)
            check(problem)
        except ValueError as error:
            raise DataError(f"{row.where}: {error}") from error
        yield problem


def _columns_of(row: object) -> Mapping[str, object]:
    match row:
        case Mapping():
            return row
        case _:
            raise ValueError("it is not a JSON object whose keys are the columns")


def _complete(config: ColumnsConfig, row: Mapping[str, object], prompts: bool, optional: bool) -> ColumnsConfig:
    """Return the columns with names in place of None, by those of the first row. No prompt stays None."""
    prompt, answer = config.prompt, config.answer
    if prompts and prompt is None:
        prompt = next((name for name in PROMPT_COLUMNS if name in row), None)
        if prompt is None and not optional:
            raise ValueError(
                f'it has no column "question", "prompt" or "messages"; name the column of the prompt in `prompt:`. '
                f"It has: {_names(row)}"
            )
    if answer is None and "answer" in row:
        answer = "answer"
    images = config.images
    if prompts and images is None:
        images = next((name for name in IMAGE_COLUMNS if name in row), None)
    return ColumnsConfig(prompt=prompt, answer=answer, images=images, system_prompt=config.system_prompt)


def _problem(problem_id: str, row: Mapping[str, object], columns: ColumnsConfig, folder: Path) -> Problem:
    """Return a row as a problem. Raises ValueError, whose message says what is wrong with which column."""
    messages = [] if columns.prompt is None else _messages(columns.prompt, _column(row, columns.prompt))
    images = [] if columns.images is None else _images(_column(row, columns.images), folder)
    messages = read_messages(messages, images, folder)
    if columns.system_prompt is not None:
        if messages and messages[0]["role"] == "system":
            raise ValueError(
                f'the column "{columns.prompt}" begins with a system message, and `system_prompt:` is set too; '
                "leave one of them out"
            )
        messages.insert(0, {"role": "system", "content": columns.system_prompt})
    answer = None if columns.answer is None else _answer(columns.answer, _column(row, columns.answer))
    return Problem(problem_id, tuple(messages), row, answer)


def _column(row: Mapping[str, object], name: str) -> object:
    if name not in row:
        raise ValueError(f'it has no column "{name}"; it has: {_names(row)}')
    return row[name]


def _names(columns: Iterable[str]) -> str:
    return ", ".join(columns) or "none"


def _answer(column: str, value: object) -> str:
    match value:
        case bool():
            pass
        case str():
            return value
        case int() | float():
            return str(value)
    raise ValueError(f'the column "{column}" is {shown(value)}; an answer is a text or a number')


def _images(value: object, folder: Path) -> list[bytes]:
    """Return the images of a row, of which tables write one without a list, and none as None."""
    images = value if isinstance(value, list) else [] if value is None else [value]
    return [read_image(image, folder) for image in images]


def _messages(column: str, value: object) -> list[Message]:
    """Return a prompt as chat messages. Values of None, with which tables fill missing keys, are left out."""
    match value:
        case str():
            if not value.strip():
                raise ValueError(f'the column "{column}" is empty')
            return [{"role": "user", "content": value}]
        case list() if value:
            messages = [_message(f'message {number} of the column "{column}"', one) for number, one in enumerate(value)]
            if messages[-1]["role"] not in ("user", "tool"):
                raise ValueError(
                    f'the last message of the column "{column}" has the role {messages[-1]["role"]}; a prompt ends '
                    "before the model's turn, with a user's message"
                )
            return messages
        case _:
            raise ValueError(f'the column "{column}" is {shown(value)}; a prompt is a text or a list of chat messages')


def _message(where: str, value: object) -> Message:
    match value:
        case {"role": str(role), **rest} if role in ROLES:
            message: dict[str, object] = {"role": role, **{str(k): v for k, v in rest.items() if v is not None}}
            if message.get("tool_calls"):
                message.setdefault("content", "")
            if isinstance(message.get("content"), str | list):
                return message
            raise ValueError(
                f"{where} has the content {shown(message.get('content'))}; it must be text, or a list of text and "
                "image parts"
            )
        case _:
            raise ValueError(f"{where} is {shown(value)}; it needs a role ({', '.join(ROLES)}) and a content")


def _read_file(path: Path) -> Iterator[_Row]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"the data file {path} must be {', '.join(readers)}, and its suffix says which of them it is")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        where = "; it was looked for beside the config and in the current folder" if not path.exists() else ""
        raise DataError(f"the data file {path} can't be read: {error.strerror or error}{where}") from error


def _read_jsonl(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(path.read_bytes().removeprefix(BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = orjson.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: {_undecoded(line) or error}") from error
        yield _Row(where, f"{path.stem}-{number}", value)


def _read_csv(path: Path) -> Iterator[_Row]:
    content = path.read_bytes().removeprefix(BOM_UTF8)
    if reason := _undecoded(content):
        raise DataError(f"{path}: {reason}")
    try:
        rows = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        for number, row in enumerate(rows, start=1):
            where = f"{path}, row {number} (line {rows.line_num})"
            if None in row or None in row.values():
                header = _names(rows.fieldnames or ())
                raise DataError(f"{where}: it has another number of values than the header ({header})")
            yield _Row(where, f"{path.stem}-{number}", row)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: it is not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[_Row]:
    with needs_extra(f"the data file {path}"):
        import pyarrow
        from pyarrow import parquet
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield _Row(f"{path}, row {number}", f"{path.stem}-{number}", row)
    except pyarrow.ArrowException as error:
        raise DataError(f"the data file {path} is not Parquet: {str(error).splitlines()[0]}") from error


def _read_hub(config: HubDataConfig) -> Iterator[_Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("a data set from the Hub needs an extra: pip install 'millrace[hub]'") from error
    try:
        rows = datasets.load_dataset(config.path, config.name, split=config.split)
    except (OSError, ValueError) as error:
        raise DataError(f"the data set {config.path!r} (split {config.split!r}) can't be loaded: {error}") from error
    for number, row in enumerate(_with_image_files(rows)):
        where = f"the data set {config.path!r} (split {config.split!r}), row {number}"
        yield _Row(where, f"{config.path}-{config.split}-{number}", row)


def _with_image_files(rows: Any) -> Any:
    """Return a data set whose images are the contents of their files, not decoded ones, which are many times larger."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows


def _undecoded(content: bytes) -> str | None:
    """Return what is wrong with a text's encoding; None if nothing is."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{content[error.start]:02x} is not UTF-8; save the file in this encoding"
    return None
