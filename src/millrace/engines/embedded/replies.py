"""The answers of the HTTP server."""

import orjson
from aiohttp import web


def reply(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def done(message: str) -> web.Response:
    """Return the answer of a control route that succeeded."""
    return reply({"success": True, "message": message})


def refusal(message: str, status: int) -> web.Response:
    """Return an error, in both formats of SGLang's routes."""
    return reply({"success": False, "message": message, "error": {"message": message}}, status)
