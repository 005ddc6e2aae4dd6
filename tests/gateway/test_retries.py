"""An agent that asks again joins the answer that it did not get. What it got before is a sample of its own."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from millrace.errors import DataError
from millrace.gateway.gateway import Gateway
from tests.gateway.wire import KEY, QUESTION, Engine, Served, in_folder, served, until

pytestmark = pytest.mark.asyncio
ASKED = {"model": "any", "messages": [QUESTION]}
STREAMED = {**ASKED, "stream": True}
MORE = {"role": "user", "content": "And more?"}


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Served]:
    async with served() as site:
        yield site


def content(response: Any) -> str:
    """The text of a response, streamed or not."""
    if isinstance(response, dict):
        return str(response["choices"][0]["message"]["content"])
    lines = b"".join(response).split(b"\n\n")
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]
    assert lines[-2:] == [b"data: [DONE]", b""]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


async def interrupted(site: Served, times: int = 1) -> None:
    await until(lambda: site.opened.episode.counts["interrupted"] == times)


@pytest.mark.parametrize("again", [ASKED, STREAMED])
@pytest.mark.parametrize("first", [ASKED, STREAMED])
@pytest.mark.parametrize("finished", [True, False])
async def test_a_connection_that_broke_before_the_first_byte(
    site: Served, first: dict[str, object], again: dict[str, object], finished: bool
) -> None:
    async with site.wire() as wire:
        await wire.send(site.path, first)
        await until(lambda: site.engine.waiting == 1)
        wire.cut()
        await interrupted(site)
    if finished:
        site.engine.let_go()
        await until(lambda: len(site.opened.episode.tree.nodes) == 1)
        assert site.opened.samples() == []  # the agent has nothing yet
    retry = asyncio.create_task(site.ask(again))
    await until(lambda: site.opened.episode.counts["retried"] == 1)
    site.engine.let_go()
    status, response = await retry
    assert (status, site.engine.said, content(response).split()[1]) == (200, 1, "1")
    [sample] = site.opened.samples()
    assert (sample.nodes, sample.reasons, sample.superseded) == ((0,), {}, False)
    assert site.opened.episode.counts["requests"] == 1


@pytest.mark.parametrize("again", [ASKED, STREAMED])
async def test_a_stream_that_broke_in_the_middle(site: Served, again: dict[str, object]) -> None:
    async with site.wire() as wire:
        await wire.send(site.path, STREAMED)
        await wire_begins(site, wire)
        wire.cut()
        await interrupted(site)
    retry = asyncio.create_task(site.ask(again))
    await until(lambda: site.opened.episode.counts["retried"] == 1)
    site.engine.let_go()
    status, response = await retry
    assert (status, site.engine.said) == (200, 1)
    assert content(response) == ("Answer 1 is " + "two " * 20).strip()  # from its first token on
    assert len(site.opened.samples()) == 1


async def wire_begins(site: Served, wire: Any) -> None:
    """Reads a stream up to its first token."""
    site.engine.let_go(4)
    await wire.head()
    while b"Answer" not in await wire.event():
        pass
    await until(lambda: site.engine.waiting == 1)


async def test_an_agent_may_ask_a_third_time(site: Served) -> None:
    for times in (1, 2):
        async with site.wire() as wire:
            await wire.send(site.path, STREAMED)
            await until(lambda: site.engine.waiting == 1)
            await until(lambda times=times: site.opened.episode.counts["retried"] == times - 1)  # type: ignore[misc]
            wire.cut()
            await interrupted(site, times)
    site.engine.let_go()
    assert (await site.ask(ASKED))[0] == 200
    assert site.engine.said == 1


@pytest.mark.parametrize("body", [ASKED, STREAMED])
async def test_a_connection_that_broke_behind_the_last_byte(site: Served, body: dict[str, object]) -> None:
    """The gateway can't know. The agent's second request is a sibling, and the first answer is superseded later."""
    site.engine.let_go()
    await site.ask(body)
    await until(lambda: site.opened.episode.tree.nodes[0].delivered)
    _, again = await site.ask(body)
    assert (site.engine.said, site.opened.episode.counts["retried"]) == (2, 0)
    assert [sample.superseded for sample in site.opened.samples()] == [False, False]
    turn = {"role": "assistant", "content": content(again)}
    await site.ask({**body, "messages": [QUESTION, turn, MORE]})
    await until(lambda: site.opened.episode.tree.nodes[2].delivered)
    second, first = site.opened.samples()
    assert (first.nodes, first.superseded) == ((0,), True)
    assert (second.nodes, second.superseded, second.reasons) == ((1, 2), False, {1: "resampled"})


@pytest.mark.parametrize("body", [ASKED, STREAMED])
async def test_equal_requests_at_once_are_samples_of_their_own(site: Served, body: dict[str, object]) -> None:
    asked = [asyncio.create_task(site.ask(body)) for _ in range(3)]
    await until(lambda: site.engine.waiting == 3)
    site.engine.let_go()
    made = {content(response) for _, response in await asyncio.gather(*asked)}
    assert len(made) == 3
    assert len(site.opened.samples()) == 3


async def test_one_of_two_equal_requests_breaks(site: Served) -> None:
    """The retry joins the one that broke, and not the one that is being answered to another agent."""
    other = asyncio.create_task(site.ask(ASKED))
    await until(lambda: site.engine.waiting == 1)
    async with site.wire() as wire:
        await wire.send(site.path, ASKED)
        await until(lambda: site.engine.waiting == 2)
        wire.cut()
        await interrupted(site)
    retry = asyncio.create_task(site.ask(ASKED))
    await until(lambda: site.opened.episode.counts["retried"] == 1)
    site.engine.let_go()
    assert sorted(content(response)[:8] for _, response in (await other, await retry)) == ["Answer 1", "Answer 2"]


async def test_another_request_does_not_join(site: Served) -> None:
    async with site.wire() as wire:
        await wire.send(site.path, ASKED)
        await until(lambda: site.engine.waiting == 1)
        wire.cut()
        await interrupted(site)
    site.engine.let_go()
    for body in ({**ASKED, "temperature": 0.5}, {**ASKED, "messages": [{**QUESTION, "content": "1 + 1 ?"}]}):
        await site.ask(body)
    assert site.engine.said == 3


async def test_what_failed_is_not_joined(site: Served) -> None:
    async with site.wire() as wire:
        await wire.send(site.path, ASKED)
        await until(lambda: site.engine.waiting == 1)
        wire.cut()
        await interrupted(site)
    [turn] = site.opened.episode.turns
    assert turn.task is not None
    turn.task.cancel()
    await until(turn.task.done)
    site.engine.let_go()
    assert (await site.ask(ASKED))[0] == 200
    assert site.engine.said == 2


@pytest.mark.parametrize("body", [ASKED, STREAMED])
async def test_the_end_of_an_episode_ends_its_requests(site: Served, body: dict[str, object]) -> None:
    running = asyncio.create_task(site.ask(body))
    await until(lambda: site.engine.waiting == 1)
    finish = f"/episodes/{site.opened.id}/finish"
    status, view = await site.ask({"reward": 0.5, "parts": {"tests": 1.0}}, site.control(), finish)
    assert (status, view["status"], view["reward"], view["running"]) == (200, "closed", 0.5, 0)
    status, error = await running
    assert (status, error["error"]["code"]) == (409, "episode_closed")
    assert (await site.ask(body))[0] == 409
    assert (await site.ask({}, site.control(), finish))[0] == 409
    assert site.engine.waiting == 0


async def test_the_end_of_an_episode_ends_a_stream_that_has_begun(site: Served) -> None:
    async with site.wire() as wire:
        await wire.send(site.path, STREAMED)
        await wire_begins(site, wire)
        await site.opened.finish(1.0)
        events = []
        while event := await wire.event():
            events.append(event)
    assert b"this episode is closed" in events[-1]
    assert site.opened.samples() == []


async def test_an_agent_that_is_gone_for_good_costs_its_turn_only(site: Served) -> None:
    async with site.wire() as wire:
        await wire.send(site.path, STREAMED)
        await wire_begins(site, wire)
        wire.cut()
        await interrupted(site)
    await site.opened.finish()
    assert site.engine.waiting == 0
    assert site.opened.samples() == []


async def test_a_key_that_is_unknown(site: Served) -> None:
    for path, headers in [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"Authorization": "Bearer no"}),
        ("/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}),  # the gateway's own key is none of an episode
        ("/v1/chat/completions", {"x-api-key": "no"}),
        ("/e/no/v1/chat/completions", {"Authorization": f"Bearer {site.opened.api_key}"}),
    ]:
        status, error = await site.ask(ASKED, headers, path)
        assert (status, error["error"]["code"]) == (401, "no_episode")
    assert site.engine.asked == []


@pytest.mark.parametrize(
    "headers", ["Authorization: Bearer {}", "authorization: bearer {}", "x-api-key: {}", "api-key: {}"]
)
async def test_a_key_in_a_header(site: Served, headers: str) -> None:
    name, _, value = headers.partition(": ")
    site.engine.let_go()
    status, _ = await site.ask(ASKED, {name: value.format(site.opened.api_key)}, "/v1/chat/completions")
    assert status == 200
    assert len(site.opened.samples()) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_gateway_that_restarts_goes_on(tmp_path: Path, stream: bool) -> None:
    folder = tmp_path / "episodes"
    async with served(in_folder(folder)) as first:
        first.engine.let_go()
        _, response = await first.ask(ASKED)
        turn = {"role": "assistant", "content": content(response)}
        before = first.opened.samples()
        finished = first.gateway.open_episode()
        await finished.finish(1.0, {"a": 0.5})
        async with first.wire() as wire:  # an answer that the agent does not get
            first.engine.steps = asyncio.Semaphore(0)
            await wire.send(first.path, {**ASKED, "messages": [QUESTION, turn, MORE]})
            await until(lambda: first.engine.waiting == 1)
            wire.cut()
            await interrupted(first)
        first.engine.let_go()
        await until(lambda: len(first.opened.episode.tree.nodes) == 2)
    [path] = folder.glob(f"{first.opened.id}*")
    with path.open("ab") as file:
        file.write(b'{"node": 2, "parent": 1, "context_i')  # it was killed while it wrote
    assert first.opened.api_key.encode() not in b"".join(one.read_bytes() for one in folder.iterdir())
    assert path.stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0

    async with served(in_folder(folder), Engine()) as second:
        episode = second.gateway.episodes[first.opened.id]
        assert (episode.metadata, episode.closed) == ({"task": 1}, False)
        assert [sample.nodes for sample in episode.samples()] == [(0,)]
        assert_equal(episode.samples(), before)
        over = second.gateway.episodes[finished.id]
        assert (over.closed, over.reward, over.parts) == (True, 1.0, {"a": 0.5})
        undelivered = episode.tree.nodes[1]
        again = {**ASKED, "messages": [QUESTION, turn, MORE], "stream": stream}
        status, response = await second.ask(again, path=first.path)
        assert (status, content(response)) == (200, undelivered.turn.content)
        assert not second.engine.asked  # it is the answer that the first gateway could not deliver
        await until(lambda: undelivered.delivered)
        [sample] = episode.samples()
        assert (sample.nodes, sample.reasons, episode.counts["retried"]) == ((0, 1), {}, 1)
        second.engine.let_go()
        await second.ask(again, path=first.path)  # it has been delivered, so this is a new sample
        assert [one.reasons for one in episode.samples()] == [{}, {2: "resampled"}]
        [sample, _] = episode.samples()
    async with served(in_folder(folder)) as third:
        assert_equal(third.gateway.episodes[first.opened.id].samples()[:1], [sample])


def assert_equal(samples: list[Any], others: list[Any]) -> None:
    for one, other in zip(samples, others, strict=True):
        assert (one.nodes, one.reasons, one.finish, one.temperatures) == (
            other.nodes, other.reasons, other.finish, other.temperatures,
        )  # fmt: skip
        assert one.episode.token_ids == other.episode.token_ids
        assert (one.episode.loss_mask == other.episode.loss_mask).all()
        assert (one.episode.logprobs == other.episode.logprobs).all()
        assert one.episode.version_spans == other.episode.version_spans
        assert one.episode.messages == other.episode.messages


async def test_what_an_agent_extended_is_kept_as_delivered(tmp_path: Path) -> None:
    """The gateway saw no delivery, and stops before the next answer ends."""
    async with served(in_folder(tmp_path)) as first:
        async with first.wire() as wire:
            await wire.send(first.path, ASKED)
            await until(lambda: first.engine.waiting == 1)
            wire.cut()
            await interrupted(first)
        first.engine.let_go()
        await until(lambda: len(first.opened.episode.tree.nodes) == 1)
        turn = first.opened.episode.tree.nodes[0].turn.message
        first.engine.steps = asyncio.Semaphore(0)
        async with first.wire() as wire:
            await wire.send(first.path, {**ASKED, "messages": [QUESTION, turn, MORE]})
            await until(lambda: first.engine.waiting == 1)
    async with served(in_folder(tmp_path)) as second:
        assert [sample.nodes for sample in second.gateway.episodes[first.opened.id].samples()] == [(0,)]


@pytest.mark.parametrize("line", [b"no json\n", b'{"delivered": [7]}\n', b'{"node": 0}\n', b"[]\n"])
async def test_a_damaged_file_is_named(tmp_path: Path, line: bytes) -> None:
    async with served(in_folder(tmp_path)) as site:
        pass
    [path] = tmp_path.iterdir()  # noqa: ASYNC240
    path.write_bytes(path.read_bytes() + line)
    engines = site.gateway.engines
    with pytest.raises(DataError, match=f"{path.name}: a line is damaged"):
        Gateway(engines.fleet, engines.format, in_folder(tmp_path))


async def test_an_empty_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "torn.jsonl").write_bytes(b'{"episo')
    async with served(in_folder(tmp_path)) as site:
        assert list(site.gateway.episodes) == [site.opened.id]
        assert await site.gateway.delete(site.opened.id)
        assert not await site.gateway.delete(site.opened.id)
    assert "torn.jsonl is no episode" in caplog.text


async def test_a_deleted_episode_leaves_nothing(tmp_path: Path) -> None:
    async with served(in_folder(tmp_path)) as site:
        running = asyncio.create_task(site.ask(ASKED))
        await until(lambda: site.engine.waiting == 1)
        async with site.wire() as wire:
            await wire.send(f"/episodes/{site.opened.id}", b"", site.control(), "DELETE")
            assert (await wire.response())[0] == 200
        assert (await running)[0] == 409
        assert (await site.ask(ASKED))[0] == 401
        assert not list(tmp_path.iterdir())  # noqa: ASYNC240


async def test_a_folder_that_can_not_be_written_any_more_is_named(tmp_path: Path) -> None:
    async with served(in_folder(tmp_path / "gone")) as site:
        site.engine.let_go()
        (tmp_path / "gone" / f"{site.opened.id}.jsonl").unlink()
        (tmp_path / "gone").rmdir()
        status, error = await site.ask(ASKED)
        assert status == 500
        assert "gateway.folder: " in error["error"]["message"]
