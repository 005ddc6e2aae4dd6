"""JSON responses of HTTP servers."""

import orjson
from aiohttp import web


def reply(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
