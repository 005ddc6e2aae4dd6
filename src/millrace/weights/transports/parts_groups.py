"""The process groups by which the ranks of a trainer send parts of tensors to the ranks of engines.

Each engine is in a group of its own, so that no engine waits for another. The first ranks of a group are the trainer's,
and the trainer's rank 0 hosts the store at which all meet.
"""

import asyncio
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import orjson

from millrace.buckets import ProcessGroup
from millrace.engines.base import Engine
from millrace.errors import EngineError
from millrace.launch.ports import own_address
from millrace.weights.transports.base import PublishTarget
from millrace.weights.transports.sending_group import hosted_store

LEAVE_DEADLINE = 2.0
LOOPBACK = "127."
END = "end"  # the key that is set when a group ends


class PartsGroup:
    """The group of one engine, in the process of the trainer's rank 0.

    The ranks are gone from the group soon after `close`, whatever they do then.
    """

    def __init__(self, group: ProcessGroup, store: Any, engine: Engine, seconds: float) -> None:
        self.group, self.engine, self.seconds = group, engine, seconds
        self._store = store
        self._announced = 0
        self._entered = False

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def closed(self) -> bool:
        return self._store is None

    async def enter(self) -> None:
        """Have the engine join, if it has not yet. The group is closed if it can't. Raises EngineError then."""
        if not self._entered:
            self._entered = True
            try:
                await self.engine.join_group(self.group, deadline=self.seconds)
            except BaseException:
                self.close()
                raise

    def announce(self, room: int, sizes: Sequence[Sequence[int]]) -> int:
        """Say in the store how many bytes of the next bucket each rank of the trainer sends to each rank of the engine,
        and return the bucket's number. The bucket before the last must have been loaded.

        room: the size of the largest bucket of the update. sizes: for each rank of the engine, from each rank of the
        trainer.
        """
        number, store = self._announced, self._store
        self._announced += 1
        if store is not None:
            store.set(f"{self.name}/bucket/{number}", orjson.dumps([number, room, sizes]).decode())
            store.delete_key(f"{self.name}/bucket/{number - 2}")  # all ranks have read it
        return number

    def close(self) -> None:
        """End the group. Ranks that wait for a bucket leave at once; those that receive one notice the end of the
        store."""
        store, self._store = self._store, None
        if store is not None:
            for key in (f"{self.name}/bucket/{self._announced}", end := f"{self.name}/{END}"):
                store.set(key, "")
            store.check([end])  # so that those who wait have an answer before the store is gone


class PartsGroups:
    """The groups of a fleet's engines, which are kept from one publish to the next."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._groups: list[PartsGroup] = []

    async def opened(
        self, targets: Sequence[PublishTarget], senders: int, *, several_hosts: bool, deadline: float
    ) -> list[PartsGroup]:
        """Return a group for each engine. All must `enter` it, and the ranks of the trainer join it.

        several_hosts: whether the trainer's ranks are on several. Raises OSError or RuntimeError if this process can't
        host the store of a group.
        """
        seconds = deadline / 2  # a group keeps the deadline that it was created with
        engines = [target.engine for target in targets]
        kept = [
            one
            for one in self._groups
            if one.engine in engines and not one.closed and one.group.senders == senders and one.seconds > seconds / 2
        ]
        await self._leave([one for one in self._groups if one not in kept])
        self._groups = kept
        for target in targets:
            if target.engine in [one.engine for one in kept]:
                continue
            made = new_parts_group(target, self._backend, senders, several_hosts=several_hosts, seconds=seconds)
            self._groups.append(made)
        return [next(one for one in self._groups if one.engine is engine) for engine in engines]

    async def close(self) -> None:
        await self._leave(self._groups)
        self._groups = []

    async def _leave(self, groups: Sequence[PartsGroup]) -> None:
        for one in groups:
            one.close()
        for one in groups:
            with suppress(EngineError, TimeoutError):  # an engine that can't leave a group has lost it already
                async with asyncio.timeout(LEAVE_DEADLINE):
                    await one.engine.leave_group(one.name)


def new_parts_group(
    target: PublishTarget, backend: str, senders: int, *, several_hosts: bool, seconds: float
) -> PartsGroup:
    """Return a group for the ranks of an engine. Raises OSError or RuntimeError if this process can't host it."""
    address = own_address(target.engine.url)
    if several_hosts and address.startswith(LOOPBACK):  # the trainer's other hosts can't reach this one there
        address = own_address(f"tcp://{os.environ.get('MASTER_ADDR', '')}")
    world = senders + target.info.ranks
    store, port = hosted_store(address, world, seconds)
    name = f"millrace-parts-{secrets.token_hex(4)}"
    group = ProcessGroup(name, backend, address, port, senders, world, by_bucket=True, senders=senders)
    return PartsGroup(group, store, target.engine, seconds)
