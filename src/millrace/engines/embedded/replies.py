"""Answers of the HTTP server."""

import orjson
from aiohttp import web


def reply(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def done(message: str) -> web.Response:
    """What a control route answers when it has done what it was asked for."""
    return reply({"success": True, "message": message})


def refusal(message: str, status: int) -> web.Response:
    """An error, in both shapes that SGLang's routes use."""
    return reply({"success": False, "message": message, "error": {"message": message}}, status)
