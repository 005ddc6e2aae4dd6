"""The index of a run's samples, over files as a run writes them."""

import asyncio
import json
from pathlib import Path

import pyarrow as pa
import pytest

from millrace.errors import ArgumentError, MonitorError
from millrace.viewer import query
from millrace.viewer.details import conversation, details, group, pieces, tokens
from millrace.viewer.index import Cursor, Rows, SampleIndex
from millrace.viewer.query import SHOWN
from millrace.viewer.search import MOST_FOUND, search
from tests.viewer.runs import SCHEMA, Writer, write, write_short


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    Writer(folder).steps(6)
    return folder


async def pages(index: SampleIndex, **parameters: str) -> Rows:
    return await index.page(query.where(parameters), query.page(parameters))


def column(rows: Rows, name: str) -> list[object]:
    return [row[list(rows.columns).index(name)] for row in rows.rows]


async def opened(folder: Path) -> SampleIndex:
    index = SampleIndex(folder / "samples")
    await index.fill()
    return index


async def test_filters_and_sorting_choose_rows(run: Path) -> None:
    index = await opened(run)
    every = await pages(index)
    assert (every.total, every.matched, index.indexed, index.problems) == (192, 192, 6, {})
    assert column(every, "step")[:1] == [6]
    some = await pages(index, step_min="2", step_max="3", sort="-tokens", limit="5")
    assert some.matched == 64
    assert set(column(some, "step")) <= {2, 3}
    assert (sizes := column(some, "tokens")) == sorted(sizes, reverse=True)  # type: ignore[type-var]
    assert column(await pages(index, group="4-2"), "group") == ["4-2"] * 8
    assert set(column(await pages(index, status="failed"), "status")) <= {"failed"}
    good = await pages(index, reward_min="0.9", end="answered")
    assert all(reward >= 0.9 for reward in column(good, "reward") if isinstance(reward, float))
    assert 0 < good.matched < 192
    second = await pages(index, offset="100")
    assert not set(column(second, "sample")) & set(column(every, "sample"))
    await index.close()


async def test_a_version_range_has_samples_of_several_versions(run: Path) -> None:
    index = await opened(run)
    found = await pages(index, version_min="4", version_max="4", limit="500")
    both = list(zip(column(found, "oldest_version"), column(found, "newest_version"), strict=True))
    assert (3, 4) in both
    assert (4, 5) in both
    await index.close()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"sort": "messages"}, "there is no column 'messages'"),
        ({"sort": "step; DROP TABLE samples"}, "there is no column"),
        ({"limit": "501"}, "not a whole number from 0 to 500"),
        ({"offset": "-1"}, "offset: '-1' is not a whole number"),
        ({"reward_min": "nan"}, "reward_min: 'nan' is not a number"),
        ({"step_max": "x"}, "step_max: 'x' is not a number"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, str], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        query.where(parameters), query.page(parameters)


async def test_values_of_filters_are_never_sql(run: Path) -> None:
    index = await opened(run)
    assert (await pages(index, group="' OR true --")).matched == 0
    assert (await pages(index, status='x"; DROP TABLE samples; --')).matched == 0
    assert (await pages(index)).total == 192
    await index.close()


async def test_new_files_appear_and_replaced_ones_change(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    index = await opened(tmp_path / "run")
    assert (await pages(index)).total == 0
    writer.steps(2)
    await index.fill()
    assert (await pages(index)).total == 64
    (tmp_path / "run/samples/step-000002.parquet").unlink()  # a run is resumed after step 1, with fewer groups
    writer.step = 1
    writer.steps(1, groups=1)
    await index.fill()
    assert (await pages(index)).total == 40
    write(tmp_path / "run", 2, [writer.sample("other", 0, 0.5)], rank=1)
    await index.fill()
    assert (await pages(index, group="other")).matched == 1
    await index.close()


async def test_a_file_of_another_version_shows_what_it_has(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    writer.steps(2)
    rows = [writer.sample("old", 0, 0.5)]
    older = pa.schema([field for field in SCHEMA if field.name not in ("gap", "timings")])
    write(tmp_path / "run", 3, [{k: v for k, v in row.items() if k in older.names} for row in rows], older)
    (tmp_path / "run/samples/step-000004.parquet").write_bytes(b"PAR1 torn")
    other = pa.schema([("text", pa.string())])
    write(tmp_path / "run", 5, [{"text": "x"}], other)
    index = await opened(tmp_path / "run")
    assert (await pages(index)).total == 65
    assert "lacks gap" in index.problems["step-000003.parquet"]
    assert "could not be read" in index.problems["step-000004.parquet"]
    assert str(tmp_path) not in index.problems["step-000004.parquet"]
    assert "holds no samples of this version" in index.problems["step-000005.parquet"]
    places = await index.places(query.where({"group": "old"}), 1)
    assert "timings" not in await index.ask(lambda cursor: details(cursor, places[0]))
    (tmp_path / "run/samples/step-000004.parquet").unlink()
    await index.fill()
    assert "step-000004.parquet" not in index.problems
    await index.close()


async def test_a_sample_has_its_tokens_and_branches(run: Path) -> None:
    index = await opened(run)
    rows = await index.rows("SELECT sample FROM samples WHERE step = 4 AND sample LIKE '%.2' AND status = 'finished'")
    place = (await index.places(query.where({"sample": rows[0][0], "step_min": "4", "step_max": "4"}), 1))[0]
    found = await index.ask(lambda cursor: details(cursor, place))
    assert found["rewards"].keys() == {"correct", "format"}
    assert found["timings"].keys() == {"queue", "generate", "tools", "reward"}
    assert [one["role"] for one in found["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert len(found["sequences"]) == 4
    assert found["tree"]["sequences"] == [0, 1, 2, 3]
    main = await index.ask(lambda cursor: tokens(cursor, place, 3))
    assert "".join(main["pieces"]).startswith("<|system|>\nYou solve problems.")
    lengths = {len(main[name]) for name in ("pieces", "ids", "mask", "logprobs", "trainer_logprobs")}
    assert lengths == {found["sequences"][3]["length"]}
    with pytest.raises(MonitorError, match="has no sequence 9"):
        await index.ask(lambda cursor: tokens(cursor, place, 9))
    places = await index.places(query.where({"group": found["group"], "step_min": "4", "step_max": "4"}), 64)
    assert len(await index.ask(lambda cursor: group(cursor, places))) == 8
    await index.close()


def test_tokens_are_cut_by_characters() -> None:
    assert pieces("a🎉é", [1, 1, 2, 3]) == ["a", "", "🎉", "é"]


def test_what_is_not_a_conversation_is_one_message() -> None:
    assert conversation('{"a": 1}') == [{"role": "unknown", "content": '{"a": 1}'}]
    assert conversation("torn [") == [{"role": "unknown", "content": "torn ["}]
    assert conversation(None) == []


async def test_a_text_is_found_in_the_newest_files_first(run: Path) -> None:
    index = await opened(run)
    steps = [row[0] async for found in search(index, query.where({}), 'IMG src=X onerror="') for row in found.rows]
    assert steps == [6] * 4 + [1] * 4
    none = [found async for found in search(index, query.where({"step_max": "5"}), "no such text")]
    assert [(found.read, found.files) for found in none] == [(n, 5) for n in range(6)]
    await index.close()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("twice as many, REASONED", "reasoning"),
        ('{"expression": "6 * 7"}', "a tool call"),
        ("café at noon", "the arguments of a tool call, in ASCII"),
        ("division by nothing", "a tool's answer"),
        ('reset by "peer"', "the error"),
        ("forty-two", "the wanted answer"),
        ("<|template|>", "the text of a sequence"),
        ("only in a branch", "the text of another sequence"),
    ],
)
async def test_a_text_is_found_wherever_a_sample_has_it(tmp_path: Path, text: str, where: str) -> None:
    writer = Writer(tmp_path / "run")
    row = writer.sample("odd", 0, 0.5)
    calls = [
        {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "6 * 7"}'}},
        {"id": "2", "type": "function", "function": {"name": "say", "arguments": json.dumps({"text": "café at noon"})}},
    ]
    row["messages"] = json.dumps([
        {"role": "assistant", "content": "", "reasoning": "Twice as many, reasoned", "tool_calls": calls},
        {"role": "tool", "content": "division by nothing", "error": True},
    ])  # fmt: skip
    row |= {"reason": 'EngineError: reset by "peer"', "answer": "Forty-two"}
    main = {**writer.sequence([]), "text": "<|template|>answer"}
    row["sequences"] = [{**main, "text": "only in a branch"}, main]
    write(tmp_path / "run", 1, [row, writer.sample("other", 1, 0.5)])
    index = await opened(tmp_path / "run")
    found = [row[SHOWN.index("group")] async for one in search(index, query.where({}), text) for row in one.rows]
    assert found == ["odd"], where
    await index.close()


async def test_a_search_ends_at_its_limit(tmp_path: Path) -> None:
    write_short(tmp_path, 8, 200)
    index = await opened(tmp_path)
    found = [one async for one in search(index, query.where({}), "number")]
    assert sum(len(one.rows) for one in found) == MOST_FOUND
    assert found[-1].full
    assert found[-1].read == 3
    await index.close()


async def test_a_question_ends_at_its_deadline_and_when_its_caller_leaves(run: Path) -> None:
    index = await opened(run)

    def endless(cursor: Cursor) -> object:
        return cursor.execute("SELECT count(*) FROM range(100000000000) AS a WHERE a.range % 3 = 1").fetchone()

    with pytest.raises(MonitorError, match=r"not read within 0\.2 s"):
        await index.ask(endless, deadline=0.2)
    asking = asyncio.create_task(index.ask(endless, deadline=60))
    await asyncio.sleep(0.1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(5):
        while index.asked:  # the threads are free again
            await asyncio.sleep(0.01)
    assert (await pages(index)).total == 192
    await index.close()


async def test_a_hundred_thousand_samples_are_read_and_sorted(tmp_path: Path) -> None:
    write_short(tmp_path, 40, 2500)
    index = await opened(tmp_path)
    rows = await pages(index, sort="-reward", offset="99990")
    assert (rows.total, len(rows.rows)) == (100_000, 10)
    await index.close()
