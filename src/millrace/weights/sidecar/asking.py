"""Requests to a sidecar."""

from typing import TypeVar

import orjson
from pydantic import ValidationError

from millrace.errors import EngineFailed
from millrace.http.client import HttpClient
from millrace.weights.sidecar.messages import Message

M = TypeVar("M", bound=Message)


async def ask(
    http: HttpClient, path: str, body: Message, answers: type[M], deadline: float, *, repeatable: bool = False
) -> M:
    """Send a message to the sidecar of `http`, and return its answer. Raises EngineError if there is none, or another.

    repeatable: whether the message may be sent again if its answer is lost.
    """
    content = body.model_dump(mode="json")
    answer = await http.control("POST", path, content, deadline=deadline, repeatable=repeatable)
    try:
        return answers.model_validate_json(orjson.dumps(answer))
    except ValidationError as error:
        raise EngineFailed(http.name, f"unexpected answer {answer!r}") from error
