"""A frozen fleet, like a judge's, on a stock engine that it did not start and whose weights are unknown."""

from dataclasses import replace
from pathlib import Path

from transformers import AutoModelForCausalLM

from millrace.fleet.fleet import Fleet
from millrace.types import VersionSpan
from millrace.weights.folder import folder_checksums
from tests.conformance.in_flight import greedy
from tests.fleet.test_fleet import expected


async def check_judge_is_restored(fleet: Fleet, folder: Path) -> None:
    [started] = fleet.replicas.by_name.values()
    name, tokens = started.engine.name, expected(AutoModelForCausalLM.from_pretrained(folder))
    judge = Fleet([replace(started, process=None)], None, frozen=True)
    await judge.attest(folder_checksums(folder), 0, folder)
    assert not judge.snapshot.routable
    for turn in range(2):
        await judge.restore(deadline=60)
        made = await judge.generate(greedy(f"turn {turn}"), deadline=60)
        assert (made.output_ids, made.version_spans) == (tokens, (VersionSpan(0, 0, len(tokens)),))
        await judge.sleep()
        assert judge.snapshot.get(name).version is None
    await judge.restore(deadline=60)

    # The same holds for an engine that the fleet started: the weights after its start are the ones it must keep for
    # ever.
    ours = Fleet([started], None, frozen=True)
    await ours.attest(folder_checksums(folder), 0, folder)
    await ours.sleep()
    await ours.restore(deadline=60)
    assert ours.snapshot.get(name).routable
