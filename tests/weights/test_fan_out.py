"""The order in which hosts read a bucket from each other."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.weights.transports.fan_out import FanOut

TRAINER = -1


class Rounds:
    """Readers whose copies all take one round. `sources`: from whom each has read, in each round."""

    def __init__(self, readers: int, patience: float = 3600.0) -> None:
        self.fan_out = FanOut(TRAINER, patience)
        self.sources: list[list[int]] = []
        self._copying: list[tuple[int, asyncio.Event]] = []
        self.readers = [asyncio.create_task(self.read(number)) for number in range(readers)]

    async def read(self, number: int, failing: bool = False) -> None:
        async with self.fan_out.source() as source:
            over = asyncio.Event()
            self._copying.append((source, over))
            await over.wait()
        self.fan_out.add(number)

    async def settled(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def run(self) -> None:
        await self.settled()
        while self._copying:
            self.sources.append([source for source, _ in self._copying])
            copying, self._copying = self._copying, []
            for _, over in copying:
                over.set()
            await self.settled()


@given(st.integers(1, 100))
@settings(deadline=None)
def test_the_copies_double_in_each_round(readers: int) -> None:
    async def play() -> None:
        rounds = Rounds(readers)
        await rounds.run()
        assert all(reader.done() for reader in rounds.readers)
        assert len(rounds.sources) == readers.bit_length()  # ceil(log2(readers + 1))
        for sources in rounds.sources:
            assert max(Counter(sources).values()) == 1

    asyncio.run(play())


async def test_a_reader_that_hangs_keeps_no_other_from_the_bucket() -> None:
    rounds = Rounds(1)  # it reads from the trainer and never ends
    await rounds.settled()
    rounds.fan_out._patience = 0.01
    async with rounds.fan_out.source() as source:
        assert source == TRAINER
    rounds.readers[0].cancel()


async def test_a_source_that_fails_is_not_used_again() -> None:
    fan_out = FanOut(TRAINER, 0.01)
    async with fan_out.source():
        fan_out.add(1)
    taken = []
    for _ in range(2):
        with pytest.raises(ConnectionError):
            async with fan_out.source() as source:
                taken.append(source)
                raise ConnectionError
    async with fan_out.source() as source:
        taken.append(source)
    assert sorted(taken) == [TRAINER, TRAINER, 1]
