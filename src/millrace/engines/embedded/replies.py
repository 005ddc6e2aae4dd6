"""Answers of the HTTP server."""

from aiohttp import web

from millrace.http.replies import reply


def done(message: str) -> web.Response:
    """What a control route answers when it has done what it was asked for."""
    return reply({"success": True, "message": message})


def refusal(message: str, status: int) -> web.Response:
    """An error, in both shapes that SGLang's routes use."""
    return reply({"success": False, "message": message, "error": {"message": message}}, status)
