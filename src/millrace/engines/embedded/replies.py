"""The answers of the HTTP server."""

from aiohttp import web

from millrace.http.replies import reply


def done(message: str) -> web.Response:
    """Return the answer of a control route that succeeded."""
    return reply({"success": True, "message": message})


def refusal(message: str, status: int) -> web.Response:
    """Return an error, in both formats of SGLang's routes."""
    return reply({"success": False, "message": message, "error": {"message": message}}, status)
