"""The page's routes on real servers, and the command that serves them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from millrace.errors import ConfigError
from millrace.fleet.event_log import EventLog
from millrace.serve import Observer
from millrace.viewer.server import serve_run, serve_runs
from tests.viewer.runs import Writer

STATIC = Path(sys.modules["millrace.viewer.server"].__file__ or "").parent / "static"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    Writer(folder / "first").steps(3)
    Writer(folder / "sub/second", seed=1).steps(2)
    return folder


@pytest.fixture
async def http(folder: Path) -> AsyncIterator[aiohttp.ClientSession]:
    async with serve_runs(folder, "127.0.0.1", 0) as url, aiohttp.ClientSession(url) as session:
        yield session


async def ask(http: aiohttp.ClientSession, path: str, status: int = 200, /, **parameters: str) -> Any:
    async with http.get(path, params=parameters) as response:
        assert response.status == status, await response.text()
        assert response.content_type == "application/json"
        return await response.json()


async def indexed(http: aiohttp.ClientSession, run: str = "first", **parameters: str) -> Any:
    """Return the samples when all files have been read."""
    while True:
        answer = await ask(http, "/api/samples", run=run, **parameters)
        if answer["indexed"] == answer["files"] > 0:
            return answer


async def test_the_page_is_served_with_headers_that_keep_others_out(http: aiohttp.ClientSession) -> None:
    async with http.get("/") as response:
        assert response.content_type == "text/html"
        text = await response.text()
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)", text)  # the policy would refuse it
    assert " style=" not in text
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', text):
        async with http.get(f"/{name}") as response:
            assert response.status == 200, name
            assert response.headers["X-Content-Type-Options"] == "nosniff"
    async with http.get("/static/js/app.js") as response:
        assert response.content_type == "text/javascript"


def test_no_file_of_the_page_names_another_host_or_writes_html() -> None:
    own = [path for path in STATIC.rglob("*") if path.suffix in (".js", ".css", ".html") and "vendor" not in path.parts]
    assert len(own) > 10
    for path in own:
        text = path.read_text()
        assert not re.search(r"https?://|//cdn|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), (
            path
        )


@pytest.mark.parametrize(
    "path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static/", "/etc/passwd", "/static/js"]
)
async def test_no_other_file_is_served(http: aiohttp.ClientSession, path: str) -> None:
    async with http.get(URL(path, encoded=True)) as response:
        assert response.status == 404


async def test_runs_are_listed_and_new_ones_appear(http: aiohttp.ClientSession, folder: Path) -> None:
    answer = await ask(http, "/api/runs")
    assert answer["live"] is False
    assert {run["name"]: run["step"] for run in answer["runs"]} == {"first": 3, "sub/second": 2}
    assert (await ask(http, "/api/metrics", run="sub/second"))["count"] == 3
    assert (await ask(http, "/api/metrics", 404, run="third"))["error"] == "there is no run third"


async def test_samples_are_paged_opened_and_cut_into_tokens(http: aiohttp.ClientSession) -> None:
    answer = await indexed(http, sort="-reward", limit="3")
    assert (answer["total"], len(answer["rows"]), answer["problems"]) == (96, 3, [])
    row = dict(zip(answer["columns"], answer["rows"][0], strict=True))
    place = {"run": "first", "step": str(row["step"]), "sample": row["sample"]}
    sample = await ask(http, "/api/sample", **place)
    assert sample["reward"] == row["reward"]
    tokens = await ask(http, "/api/tokens", **place, sequence="0")
    assert len(tokens["pieces"]) == len(tokens["logprobs"])
    group = await ask(http, "/api/group", run="first", step=place["step"], group=row["group"])
    assert len(group) == 8
    assert (await ask(http, "/api/choices", run="first"))["end"][0] == "answered"


@pytest.mark.parametrize(
    ("path", "parameters", "status", "says"),
    [
        ("/api/samples", {"sort": "x"}, 400, "sort: there is no column 'x'"),
        ("/api/samples", {"tokens_min": "many"}, 400, "tokens_min: 'many' is not a number"),
        ("/api/sample", {"step": "1", "sample": "none"}, 404, "the run has no sample none of step 1"),
        ("/api/sample", {"sample": "none"}, 400, "step: '' is not a number"),
        ("/api/tokens", {"step": "1", "sample": "1-0.0", "sequence": "-1"}, 400, "sequence: '-1' is not"),
        ("/api/search", {"q": " "}, 400, "q: there is no text to look for"),
        ("/api/timeline", {"start": "x"}, 400, "start and end: 'x' is not a number"),
        ("/api/nothing", {}, 404, "Not Found"),
    ],
)
async def test_mistakes_get_one_clear_message(
    http: aiohttp.ClientSession, path: str, parameters: dict[str, str], status: int, says: str
) -> None:
    assert says in (await ask(http, path, status, run="first", **parameters))["error"]


async def test_a_search_streams_what_it_finds(http: aiohttp.ClientSession) -> None:
    await indexed(http)
    async with http.get("/api/search", params={"run": "first", "q": "natalia", "step_max": "2"}) as response:
        lines = [json.loads(line) async for line in response.content]
    assert "sample" in lines[0]["columns"]
    assert [line["read"] for line in lines[1:]] == [0, 1, 2]
    assert sum(len(line["rows"]) for line in lines[1:]) == 64


@pytest.mark.parametrize(
    ("name", "status"),
    [("127.0.0.1", 200), ("localhost:1234", 200), ("[::1]", 200), ("evil.example", 403), ("10.0.0.1:80", 403)],
)
async def test_a_server_on_loopback_answers_to_names_of_loopback_alone(
    http: aiohttp.ClientSession, name: str, status: int
) -> None:
    for path in ("/", "/api/runs", "/static/style.css"):
        async with http.get(path, headers={"Host": name}) as response:
            assert response.status == status


async def test_pages_of_other_sites_get_no_data(http: aiohttp.ClientSession) -> None:
    async with http.get("/api/runs", headers={"Sec-Fetch-Site": "cross-site"}) as response:
        assert response.status == 403
    async with http.get("/api/runs", headers={"Sec-Fetch-Site": "same-origin"}) as response:
        assert response.status == 200


async def test_a_broken_run_says_so(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    writer.steps(1)
    with (writer.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew\n{"step": 3, "reward": NaN}\n')
    writer.step = 3
    writer.steps(1)
    async with serve_runs(writer.folder, "127.0.0.1", 0) as url, aiohttp.ClientSession(url) as http:
        run = (await ask(http, "/api/runs"))["runs"][0]
        assert run["step"] == 4
        assert "2 lines could not be read" in run["troubles"][0]


async def test_large_files_that_are_broken_hide_no_other_and_are_counted(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    writer.steps(3)
    for step in range(4, 9):
        with (tmp_path / f"run/samples/step-{step:06d}.parquet").open("wb") as file:
            file.truncate(10**9)  # a hole, which takes no room
    async with serve_runs(tmp_path, "127.0.0.1", 0) as url, aiohttp.ClientSession(url) as http:
        answer = await indexed(http, "run")
        assert (answer["total"], answer["files"]) == (96, 8)
        assert [text.partition(":")[0] for text in answer["problems"]] == [
            "step-000008.parquet", "step-000007.parquet", "step-000006.parquet", "2 more files have problems"
        ]  # fmt: skip
        writer.step = 8
        writer.steps(1)  # the run goes on
        while answer["total"] < 128:
            answer = await ask(http, "/api/samples", run="run")


async def test_a_fleets_metrics_have_the_page_beside_them(folder: Path) -> None:
    observer = Observer(EventLog())
    async with serve_run(observer, "127.0.0.1", 0, folder / "first") as url, aiohttp.ClientSession(url) as http:
        answer = await ask(http, "/api/runs")
        assert answer["live"] is True
        assert [run["name"] for run in answer["runs"]] == ["first"]
        assert (await ask(http, "/fleet"))["engines"] == []
        assert (await indexed(http))["total"] == 96
        async with http.get("/metrics") as response:
            assert "millrace_waiting_requests" in await response.text()
        for path in ("/metrics", "/fleet"):
            async with http.get(path, headers={"Host": "evil.example"}) as response:
                assert response.status == 403
    async with serve_run(observer, "127.0.0.1", 0) as url, aiohttp.ClientSession(url) as http:
        assert (await ask(http, "/api/runs"))["runs"] == []


async def test_a_port_in_use_and_a_folder_without_runs_are_one_error(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"the page can't be served at 127.0.0.1:{port} .*set another --port"):
            async with serve_runs(folder, "127.0.0.1", port):
                pass
    with pytest.raises(ConfigError, match="there is no run at or below"):
        async with serve_runs(tmp_path, "127.0.0.1", 0):
            pass


@pytest.fixture
def command(folder: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-m", "millrace", "view", str(folder), "--port", "0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        yield process
        process.kill()


async def test_the_command_serves_until_a_signal(command: subprocess.Popen[str]) -> None:
    assert command.stdout is not None
    said = command.stdout.readline()
    url = re.fullmatch(r"the page is at (http://127\.0\.0\.1:\d+)\n", said)
    assert url, said
    async with aiohttp.ClientSession(url[1]) as http:
        assert len((await ask(http, "/api/runs"))["runs"]) == 2
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=20) == 130


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "millrace", "view", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: there is no run at or below {tmp_path}")
    assert done.stderr.count("\n") == 1
