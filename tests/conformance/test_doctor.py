"""`millrace doctor` as a user runs it, and the tables that are made from its reports."""

import asyncio
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from millrace.config.sources import TinyModelConfig
from millrace.conformance import CHECKS, Check, Outcome, Result, Runner, Subject, select
from millrace.conformance.attach import require_folders
from millrace.conformance.report import Report, capability_table, check_table, from_json, to_json
from millrace.conformance.requests import alike, fingerprint
from millrace.conformance.weights import by_disk
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import DataError
from millrace.train.tiny import make_tiny_model
from millrace.types import Capability, Health, PauseMode
from tests.conformance.conftest import ADMIN_KEY, API_KEY, embedded_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {"MILLRACE_ENGINE_API_KEY": API_KEY, "MILLRACE_ENGINE_ADMIN_API_KEY": ADMIN_KEY}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with embedded_server(tiny_model, tmp_path_factory.mktemp("logs")) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="module")
async def engine(url: str) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine("embedded", url, api_key=API_KEY, admin_key=ADMIN_KEY)
    yield engine
    await engine.close()


@asynccontextmanager
async def started(*arguments: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Starts the command without the keys of this process's own environment."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "millrace", "doctor", *arguments),
        env={"PATH": "", "HOME": "", "COLUMNS": "200", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        async with asyncio.timeout(60):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def doctor(*arguments: str, **environment: str) -> tuple[int | None, str, str]:
    """Runs the command and returns its status, output and errors."""
    async with started(*arguments, **environment) as process:
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()


async def read_until(stream: asyncio.StreamReader | None, words: str) -> None:
    assert stream is not None
    while words not in (line := (await stream.readline()).decode()):
        assert line, f"the output ended without {words}"


async def test_every_check_is_a_line(url: str) -> None:
    status, out, _ = await doctor(url, "--only", "*.info", **KEYS)
    assert status == 0
    assert "passed  identity.info" in out
    assert "1 passed, 0 failed, 0 lacking" in out


async def test_a_missing_folder_is_reported(url: str) -> None:
    status, out, _ = await doctor(url, "--only", "update.disk", **KEYS)
    assert status == 0
    assert "lacking update.disk" in out
    assert "no folder with other weights" in out


async def test_json_is_a_report(url: str, tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    folders = ("--model", str(tiny_model), "--other", str(other_model))
    status, out, err = await doctor(url, "--only", "update.disk", "--json", *folders, **KEYS)
    assert (status, err) == (0, "")
    path = tmp_path / "report.json"
    path.write_text(out)
    report = from_json(path)
    assert [(r.check, r.outcome) for r in report.results] == [("update.disk", Outcome.PASSED)]
    assert Capability.CHECKSUMS in report.capabilities
    assert "| `checksums` | yes |" in capability_table({report.title: report})
    assert "| passed |" in check_table(select("update.disk"), {report.title: report})
    assert orjson.loads(to_json(report)) == orjson.loads(out)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("{url}",), {}, "error: the key is refused at {url}: "),
        (("{url}",), {}, "its keys are read from MILLRACE_ENGINE_API_KEY"),
        (("{url}", "--only", "nothing"), KEYS, "no check matches nothing"),
        (("http://127.0.0.1:1",), KEYS, "no server listens at http://127.0.0.1:1"),
        (("127.0.0.1:1",), KEYS, "error: URL: '127.0.0.1:1' is not a server's URL; write http://127.0.0.1:1"),
        (("http://127.0.0.1:1", "--other", "/"), KEYS, "error: --other: / has no *.safetensors file"),
    ],
    ids=["no keys", "where keys are read from", "no such check", "no server", "no URL", "no folder"],
)
async def test_a_failed_start_names_the_reason(
    url: str, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    status, _, err = await doctor(*(argument.format(url=url) for argument in arguments), **environment)
    assert status == 1
    assert message.format(url=url) in " ".join(err.split())
    assert ("_KEY" in err) == (not environment)
    assert "Traceback" not in err


def routes(*paths: str) -> web.Application:
    """A server that lists these routes as FastAPI does, and has none of them."""
    app = web.Application()

    async def describe(_: web.Request) -> web.Response:
        return web.json_response({"paths": {path: {} for path in paths}})

    app.add_routes([web.get("/openapi.json", describe)])
    return app


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (routes("/version", "/v1/completions", "/health"), "set VLLM_SERVER_DEV_MODE=1 in the server's environment"),
        (routes("/items"), "no engine answers at"),
        (web.Application(), "no engine answers at"),
    ],
    ids=["vLLM without control routes", "another program", "no routes"],
)
async def test_an_unsuitable_server_is_reported_with_what_it_lacks(app: web.Application, message: str) -> None:
    async with TestServer(app) as server:
        status, out, err = await doctor(str(server.make_url("/")))
    assert (status, out) == (1, "")
    assert message in " ".join(err.split())
    assert "_KEY" not in err
    assert "Traceback" not in err


async def test_an_unusable_folder_is_reported(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    require_folders(None, None)
    require_folders(None, other_model)
    require_folders(tiny_model, other_model)
    make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=128), 0, tmp_path / "wide")
    make_tiny_model(TinyModelConfig(kind="tiny", layers=3), 0, tmp_path / "deep")
    shutil.copytree(tiny_model, tmp_path / "copy")
    for folder, other, says in (
        (tmp_path, None, "--model: .* is not a model's folder, it has no config.json"),
        (tiny_model, tmp_path, r"--other: .* has no \*.safetensors file"),
        (
            tiny_model,
            tmp_path / "wide",
            r"--other: .*/wide is of another model than .* has the shape \(.*\) instead of \(",
        ),
        (
            tiny_model,
            tmp_path / "deep",
            "--other: .*/deep is of another model than .*: the model does not have .*layers.2.*; give",
        ),
        (tmp_path / "deep", tiny_model, "--other: .* is of another model than .*/deep: it does not have .*layers.2"),
        (tiny_model, tiny_model, "--other: .* has the same weights as "),
        (tiny_model, tmp_path / "copy", "--other: .*/copy has the same weights as "),
    ):
        with pytest.raises(DataError, match=says):
            require_folders(folder, other)


async def test_an_interruption_leaves_the_server_as_it_was(url: str, engine: EmbeddedEngine, tiny_model: Path) -> None:
    before = await fingerprint(Subject(engine, await engine.info(), tiny_model))
    async with started(url, "--only", "sleep.*", **KEYS) as process:
        await read_until(process.stdout, "capabilities")
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 130
    assert "the server serves the model's weights as before" in err.decode()
    assert err.decode().endswith("\ninterrupted\n")
    assert await engine.health() is Health.READY
    assert alike(await fingerprint(Subject(engine, await engine.info(), tiny_model)), before)


async def test_a_check_that_does_not_end_is_cancelled_and_undone(
    engine: EmbeddedEngine, tiny_model: Path, other_model: Path
) -> None:
    messed = asyncio.Event()

    async def mess(subject: Subject) -> None:
        await by_disk(subject, other_model, 7)
        await subject.engine.sleep()
        await subject.engine.pause(PauseMode.KEEP)
        messed.set()
        await asyncio.Event().wait()

    subject = Subject(engine, await engine.info(), tiny_model, other_model)
    before = await fingerprint(subject)
    runner = Runner(subject)

    async def examine() -> None:
        async for _ in runner.run([Check("made.up", "as the test has it", frozenset(), mess)]):
            raise AssertionError("it came to an end")

    run = asyncio.create_task(examine())
    await messed.wait()
    run.cancel()
    await asyncio.wait([run])
    await runner.leave(ending=0.01)
    assert (run.cancelled(), runner.lost) == (True, None)
    assert await engine.health() is Health.READY
    assert alike(await fingerprint(subject), before)


async def test_a_second_interruption_says_what_to_send(tiny_model: Path, tmp_path: Path) -> None:
    async with embedded_server(tiny_model, tmp_path, "--faults") as url:
        engine = EmbeddedEngine("embedded", url, api_key=API_KEY, admin_key=ADMIN_KEY)
        await engine.inject_fault("hang")
        await engine.close()
        async with started(url, "--only", "generate.count", **KEYS) as process:
            await read_until(process.stdout, "capabilities")
            process.send_signal(signal.SIGINT)
            await read_until(process.stderr, "Ctrl-C again to leave it as it is")
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
    assert process.returncode == 130
    assert "restart it, or send it POST /resume_memory_occupation" in err.decode()
    assert "Traceback" not in err.decode()


async def test_tables_number_their_reasons(tmp_path: Path) -> None:
    check = CHECKS[0]
    reports = [
        Report("a", "1", frozenset(), (Result(check.name, outcome, reason, 1.0),), None)
        for outcome, reason in ((Outcome.PASSED, ""), (Outcome.FAILED, "no"), (Outcome.LACKING, "no"))
    ]
    table = check_table([check], dict(zip(("one", "two", "three"), reports, strict=True)))
    assert "| passed | failed (1) | lacking (1) |" in table
    assert table.endswith("\n1. no")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(DataError, match=r"broken.json is not a report"):
        from_json(broken)
