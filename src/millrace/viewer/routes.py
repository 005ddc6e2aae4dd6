"""The routes of the page: JSON about runs and samples, and the page's own files. All only read."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from millrace import __version__
from millrace.errors import ArgumentError, ConfigError, MonitorError
from millrace.http.replies import reply
from millrace.viewer import query
from millrace.viewer.site import Site

if TYPE_CHECKING:
    from millrace.viewer.index import Place, SampleIndex

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", "": "text/plain",
}  # fmt: skip
MOST_OF_GROUP = 64  # samples side by side
DEADLINE = 15.0  # seconds that a sample is waited for whose file may be new
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_routes(app: web.Application, site: Site) -> None:
    """Add the page at `/` to an application that closes the site when it ends."""
    routes = _Routes(site)
    app.add_routes([
        web.get("/", partial(_file, path=STATIC / "index.html")),
        web.get("/api/runs", routes.runs),
        web.get("/api/metrics", routes.metrics),
        web.get("/api/fleet", routes.fleet),
        web.get("/api/timeline", routes.timeline),
        web.get("/api/samples", routes.samples),
        web.get("/api/choices", routes.choices),
        web.get("/api/search", routes.search),
        web.get("/api/sample", routes.sample),
        web.get("/api/tokens", routes.tokens),
        web.get("/api/group", routes.group),
        *(web.get(f"/static/{path.relative_to(STATIC).as_posix()}", partial(_file, path=path)) for path in _files()),
    ])  # fmt: skip
    app.middlewares.append(_answered)

    async def closed(_: web.Application) -> AsyncIterator[None]:
        yield
        await site.close()

    app.cleanup_ctx.append(closed)


def _files() -> list[Path]:
    return sorted(path for path in STATIC.rglob("*") if path.is_file())


async def _file(http: web.Request, *, path: Path) -> web.StreamResponse:  # noqa: ARG001
    kind = TYPES.get(path.suffix, "text/plain")
    return web.FileResponse(path, headers={"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-cache"})


@web.middleware
async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors of the JSON routes as JSON."""
    if not request.path.startswith("/api/"):
        return await handler(request)
    try:
        return await handler(request)
    except ArgumentError as error:
        return reply({"error": str(error)}, 400)
    except ConfigError as error:  # a package is missing
        return reply({"error": str(error)}, 501)
    except MonitorError as error:
        return reply({"error": str(error)}, 503)
    except web.HTTPException as error:
        return reply({"error": error.text or error.reason}, error.status)


class _Routes:
    """The handlers of the JSON routes. The parameter `run` names the run."""

    def __init__(self, site: Site) -> None:
        self.site = site

    async def runs(self, http: web.Request) -> web.Response:  # noqa: ARG002
        """Return the runs, and whether the server has a fleet."""
        return reply({"version": __version__, "live": self.site.live, "runs": await self.site.summaries()})

    async def metrics(self, http: web.Request) -> web.Response:
        """Return a run's metrics as columns, after the rows that the client has (`epoch`, `count`, `sketched`)."""
        names = ("epoch", "count", "sketched")
        epoch, count, sketched = (int(query.number(name, http.query.get(name, "0"))) for name in names)
        return reply(await self.site.of_run(self._run(http), lambda run: run.metrics_after(epoch, count, sketched)))

    async def fleet(self, http: web.Request) -> web.Response:
        """Return the engines and latest events, as the run's events.jsonl shows them."""
        return reply(await self.site.of_run(self._run(http), lambda run: run.fleet(), events=True))

    async def timeline(self, http: web.Request) -> web.Response:
        """Return what each engine did between two times (`start`, `end`)."""
        given = [http.query.get(name) for name in ("start", "end")]
        start, end = (None if text is None else query.number("start and end", text) for text in given)
        return reply(await self.site.of_run(self._run(http), lambda run: run.lanes(start, end), events=True))

    async def samples(self, http: web.Request) -> web.Response:
        """Return one page of the samples that the filters let through."""
        condition, wanted = query.where(http.query), query.page(http.query)
        index = self.site.index(self._run(http))
        state = _state(index)  # before the rows, which have at least the files that it counts
        rows = await index.page(condition, wanted)
        return reply({
            "total": rows.total, "matched": rows.matched, "columns": rows.columns, "rows": rows.rows, **state
        })  # fmt: skip

    async def choices(self, http: web.Request) -> web.Response:
        """Return the values that filters can have."""
        index = self.site.index(self._run(http))
        answer: dict[str, list[Any]] = {}
        for name in query.EXACT:
            sql = f'SELECT DISTINCT "{name}" FROM samples WHERE "{name}" IS NOT NULL ORDER BY 1 LIMIT 50'  # noqa: S608
            answer[name] = [row[0] for row in await index.rows(sql)]
        return reply(answer)

    async def search(self, http: web.Request) -> web.StreamResponse:
        """Stream the samples whose conversation has the text `q`, as JSON lines, until the client has enough."""
        from millrace.viewer.search import search

        text = http.query.get("q", "").strip()[: query.LONGEST_TEXT]
        if not text:
            raise ArgumentError("q: there is no text to look for")
        condition, index = query.where(http.query), self.site.index(self._run(http))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await response.prepare(http)
        await response.write(orjson.dumps({"columns": query.SHOWN}, option=orjson.OPT_APPEND_NEWLINE))
        async with aclosing(search(index, condition, text)) as progress:
            try:
                async for found in progress:
                    await response.write(orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE))
            except MonitorError as error:
                await response.write(orjson.dumps({"problem": str(error)}, option=orjson.OPT_APPEND_NEWLINE))
        await response.write_eof()
        return response

    async def sample(self, http: web.Request) -> web.Response:
        """Return one sample (`step`, `sample`) without its tokens."""
        from millrace.viewer.details import details

        index, place = await self._place(http)
        return reply(await index.ask(lambda cursor: details(cursor, place)))

    async def tokens(self, http: web.Request) -> web.Response:
        """Return the tokens of one sequence of a sample (`sequence`)."""
        from millrace.viewer.details import tokens

        number = query.whole("sequence", http.query.get("sequence", "0"), 10**6)
        index, place = await self._place(http)
        return reply(await index.ask(lambda cursor: tokens(cursor, place, number)))

    async def group(self, http: web.Request) -> web.Response:
        """Return the samples of one group (`step`, `group`) with their conversations."""
        from millrace.viewer.details import group

        name = http.query.get("group", "")
        condition = query.Where('"group" = ? AND step = ?', (name, query.number("step", http.query.get("step", ""))))
        index = self.site.index(self._run(http))
        places = await index.places(condition, MOST_OF_GROUP)
        return reply(await index.ask(lambda cursor: group(cursor, places)))

    async def _place(self, http: web.Request) -> "tuple[SampleIndex, Place]":
        step, sample = query.number("step", http.query.get("step", "")), http.query.get("sample", "")
        index = self.site.index(self._run(http))
        condition = query.Where("sample = ? AND step = ?", (sample, step))
        if not (places := await index.places(condition, 1)):
            await asyncio.wait({index.fill()}, timeout=DEADLINE)  # its file may be new
            places = await index.places(condition, 1)
        if not places:
            raise web.HTTPNotFound(text=f"the run has no sample {sample[:80]} of step {step:g}")
        return index, places[0]

    def _run(self, http: web.Request) -> str:
        name = http.query.get("run", "")
        if name not in self.site.runs:
            raise web.HTTPNotFound(text=f"there is no run {name[:80]}")
        return name


def _state(index: "SampleIndex") -> Mapping[str, object]:
    """Return how far the index is, and what it could not read."""
    problems = [f"{name}: {why}" for name, why in sorted(index.problems.items(), reverse=True)]
    problems[:0] = [index.trouble] if index.trouble else []
    hidden = len(problems) - 3
    more = [f"{hidden} more files have problems"] if hidden > 0 else []
    return {
        "files": index.files, "indexed": index.indexed, "filling": index.filling, "problems": [*problems[:3], *more]
    }  # fmt: skip
