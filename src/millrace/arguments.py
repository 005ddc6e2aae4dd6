"""Checks and conversions for the arguments of public calls. Pure functions that don't import torch.

Callers pass lists, arrays, tensors and NumPy numbers. Each function returns the plain Python value that engines take,
or raises an ArgumentError that names the argument.
"""

import math
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import orjson

from millrace.errors import ArgumentError

TEXT_SHOWN = 60  # characters of a wrong value that an error message quotes
T = TypeVar("T")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return token ids as a tuple.

    `value` is a list, a tuple, or an array or tensor of integers of shape [T] or [1, T] (also on a GPU), or a mapping
    with `input_ids` such as a BatchEncoding. Raises ArgumentError for anything else.
    """
    if type(value) is tuple and set(map(type, value)) <= {int}:
        return value
    if isinstance(value, Mapping):
        if "input_ids" not in value:
            raise ArgumentError(f"{name} is a mapping without input_ids; pass the token ids")
        return token_ids(name, value["input_ids"])
    if isinstance(value, str | bytes):
        raise ArgumentError(f"{name} is text, {shown(value)}; pass its token ids, which the model's tokenizer returns")
    rows = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(rows, Sequence):
        raise ArgumentError(
            f"{name} must be a list, tuple, array or tensor of integers, and is {shown(value)} ({type(value).__name__})"
        )
    if rows and _is_row(rows[0]):
        if len(rows) > 1:
            raise ArgumentError(
                f"{name} holds {len(rows)} prompts; a request has one prompt, so send a request for each of them"
            )
        return token_ids(name, rows[0])
    return tuple(_token(name, index, token) for index, token in enumerate(rows))


def whole(name: str, value: Any) -> int:
    """Return an integer of Python or NumPy as `int`. Raises ArgumentError for anything else."""
    integer = _index(value)
    if integer is None:
        raise ArgumentError(f"{name} must be an integer, and is {shown(value)} ({type(value).__name__})")
    return integer


def count(name: str, value: Any, least: int = 0) -> int:
    """Return an integer of `least` or more as `int`. Raises ArgumentError for anything else."""
    if (integer := whole(name, value)) < least:
        raise ArgumentError(f"{name} must be {least} or more, and is {integer}")
    return integer


def real(name: str, value: Any) -> float:
    """Return a number of Python or NumPy as `float`. Raises ArgumentError for anything else, and for NaN."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise ArgumentError(f"{name} must be a number, and is {shown(value)} ({type(value).__name__})")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return a truth value of Python or NumPy as `bool`. Raises ArgumentError for anything else."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):  # NumPy's, by either name
        raise ArgumentError(f"{name} must be True or False, and is {shown(value)} ({type(value).__name__})")
    return bool(value)


def text(name: str, value: Any) -> str:
    """Return a string that JSON can carry. Raises ArgumentError for anything else, and for lone surrogates."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name} must be text, and is {shown(value)} ({type(value).__name__})")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ArgumentError(
            f"{name} contains half a character (a lone surrogate), which JSON can't carry: {value!a:.80}"
        )
    return value


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """Return a mapping whose keys are strings. Raises ArgumentError for anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ArgumentError(f"{name} must be a mapping with names as keys, and is {shown(value)}")
    return value


def instance(name: str, value: Any, kind: type[T]) -> T:
    """Return an object of this class. Raises ArgumentError for anything else."""
    if not isinstance(value, kind):
        raise ArgumentError(f"{name} must be a {kind.__name__}, and is {shown(value)}")
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Return an iterable of strings as a tuple. Raises ArgumentError for anything else, and for a single string."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ArgumentError(f"{name} must be a list of texts, and is {shown(value)}; write [{shown(value)}]")
    return tuple(text(f"{name}[{index}]", item) for index, item in enumerate(value))


def images(name: str, value: Any) -> tuple[bytes, ...]:
    """Return images as the contents of image files: PIL images as PNG, paths as their files' contents, bytes unchanged.

    Raises ArgumentError for anything else, for a single image, and for a file that can't be read.
    """
    if isinstance(value, str | bytes | PathLike) or not isinstance(value, Iterable):
        raise ArgumentError(f"{name} must be a list of images, and is {shown(value)}; write [image]")
    return tuple(_image(f"{name}[{index}]", item) for index, item in enumerate(value))


def biases(name: str, value: Any) -> dict[int, float]:
    """Return a mapping of token ids to numbers as a dict. Raises ArgumentError for anything else."""
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} must be a mapping of token ids to numbers, and is {shown(value)}")
    return {whole(f"a token of {name}", token): real(f"{name}[{token}]", bias) for token, bias in value.items()}


def json_schema(name: str, value: Any) -> str:
    """Return a JSON schema, a mapping or a JSON text, as text. Raises ArgumentError for anything else."""
    try:
        schema = orjson.loads(value) if isinstance(value, str) else value
        if isinstance(schema, Mapping):
            return orjson.dumps(dict(schema)).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        raise ArgumentError(f"{name} is no JSON: {error}") from error
    raise ArgumentError(f"{name} must be a JSON schema, a mapping or text, and is {shown(value)}")


def path(name: str, value: Any) -> Path:
    """Return a path, expanded as by `expand`. Raises ArgumentError if it is empty or neither text nor a path."""
    return Path(location(name, value))


def location(name: str, value: Any) -> str:
    """Return a path or a URL as text, expanded as by `expand`. Raises ArgumentError as `path` does."""
    if not isinstance(value, str | PathLike) or not str(value):
        raise ArgumentError(f"{name} must be a path, and is {shown(value)} ({type(value).__name__})")
    try:
        return expand(str(value))
    except ValueError as error:
        raise ArgumentError(f"{name}: {error}") from error


def expand(path: str) -> str:
    """Return the path with `~` at its start and every `$NAME` and `${NAME}` replaced. The rest stays unchanged.

    Raises ValueError if a variable is not set, or a user's home folder is not known.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} in {path} is not set")
        return os.environ[name]

    replaced = _VARIABLE.sub(value_of, path)
    expanded = os.path.expanduser(replaced)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"the home folder {user} in {path} is not known; set HOME, or write ./{user} for a folder")
    return expanded


def shown(value: object) -> str:
    """Return the value's repr in ASCII, on one line and cut to TEXT_SHOWN characters."""
    written = " ".join(ascii(value).split())
    return written if len(written) <= TEXT_SHOWN else f"{written[:TEXT_SHOWN]}..."


def _is_row(value: Any) -> bool:
    dimensions = getattr(value, "ndim", None)
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) if dimensions is None else dimensions > 0


def _token(name: str, index: int, value: Any) -> int:
    integer = _index(value)
    if integer is None:
        raise ArgumentError(f"{name}[{index}] is {shown(value)} ({type(value).__name__}); token ids are integers")
    return integer


def _index(value: Any) -> int | None:
    """Return the integer, or None for anything else, truth values of Python, NumPy and torch included."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _image(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | PathLike):
        try:
            return Path(location(name, value)).read_bytes()
        except OSError as error:
            raise ArgumentError(f"{name}: the image file can't be read: {error}") from error
    if not hasattr(value, "save"):
        raise ArgumentError(
            f"{name} must be a PIL image, a path, or the content of an image file, and is {shown(value)} "
            f"({type(value).__name__})"
        )
    file = BytesIO()
    value.save(file, "PNG")
    return file.getvalue()
