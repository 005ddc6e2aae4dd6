"""Measures a publish of a 1 GB model, compared with its floor. The floor is one memcpy of the model for shared memory,
one trip through a TCP connection of this host for gloo, and one bare READ of NIXL from another process for UCX.

    python -m benchmarks.publish [--transport shm] [--replicas 1] [--repeats 9]

The time includes all parts of a publish: copying into buckets or sending, loading, checksums on both sides, commit. The
floor moves the same bytes in the same run. The first publish pays the page faults of new memory and is shown apart.
"""

import argparse
import asyncio
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.sidecar import sidecar
from millrace.config import EmbeddedEngineConfig
from millrace.config.models import TransportName
from millrace.extension.millrace_environment import settings
from millrace.fleet.local import open_fleet
from millrace.weights.ucx import TCP_SETTINGS, load


def make_model(folder: Path) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=16_384, hidden_size=1024, intermediate_size=3072, num_hidden_layers=19, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return model


class Memcpy:
    """The floor of shared memory: one thread copies the tensors' bytes into memory that was touched before."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._sources = [tensor.numpy() for tensor in tensors]
        self._copies = [source.copy() for source in self._sources]

    def seconds(self) -> float:
        started = time.perf_counter()
        for copy, source in zip(self._copies, self._sources, strict=True):
            np.copyto(copy, source)
        return time.perf_counter() - started


class Tcp:
    """The floor of gloo: the tensors' bytes are sent to another process of this host, which says when it has them."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._sources: Sequence[memoryview] = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]
        with socket.create_server(("127.0.0.1", 0)) as server:
            size = sum(source.nbytes for source in self._sources)
            multiprocessing.Process(target=receive, args=(server.getsockname()[1], size), daemon=True).start()
            self._connection, _ = server.accept()

    def seconds(self) -> float:
        started = time.perf_counter()
        for source in self._sources:
            self._connection.sendall(source)
        self._connection.recv(1)
        return time.perf_counter() - started


def receive(port: int, size: int) -> None:
    place = memoryview(bytearray(size))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while True:
            have = 0
            while have < size:
                have += (got := connection.recv_into(place[have:]))
                if not got:
                    return
            connection.sendall(b"1")


class Read:
    """The floor of UCX: another process of this host READs the tensors' bytes where they lie."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._agent = agent("floor")
        self._agent.register_memory(tensors)
        there = [(tensor.data_ptr(), tensor.nbytes, 0) for tensor in tensors]
        spawn = multiprocessing.get_context("spawn")  # a fork would have the state of UCX without its threads
        self._pipe, end = spawn.Pipe()
        spawn.Process(target=read, args=(end, self._agent.get_agent_metadata(), there), daemon=True).start()

    def seconds(self) -> float:
        self._pipe.send_bytes(b"read")
        return float(self._pipe.recv_bytes())


def read(pipe: Connection, metadata: bytes, there: list[tuple[int, int, int]]) -> None:
    own = agent("reader")
    place = torch.zeros(sum(nbytes for _, nbytes, _ in there), dtype=torch.uint8)
    own.register_memory(place)
    starts = np.cumsum([0, *(nbytes for _, nbytes, _ in there)])
    here = [(place.data_ptr() + int(start), nbytes, 0) for start, (_, nbytes, _) in zip(starts, there, strict=False)]
    peer = own.add_remote_agent(metadata)
    with suppress(EOFError):  # its parent has ended
        while pipe.recv_bytes():
            started = time.perf_counter()
            descriptors = own.get_xfer_descs(here, "DRAM"), own.get_xfer_descs(there, "DRAM")
            transfer = own.initialize_xfer("READ", *descriptors, peer)
            state = own.transfer(transfer)
            while state == "PROC":
                time.sleep(0.0005)
                state = own.check_xfer_state(transfer)
            seconds = time.perf_counter() - started
            assert state == "DONE"
            transfer.release()
            pipe.send_bytes(repr(seconds).encode())


def agent(name: str) -> Any:
    """Returns a NIXL agent with the same TCP settings as Millrace's own."""
    nixl = load()
    with settings({name: value for name, value in TCP_SETTINGS.items() if name not in os.environ}):
        return nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))


FLOORS: dict[str, type[Memcpy] | type[Tcp] | type[Read]] = {"shm": Memcpy, "gloo": Tcp, "ucx": Read}


async def measure(transport: TransportName, replicas: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = make_model(folder)
        tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        nbytes = sum(tensor.nbytes for _, tensor in tensors)
        bare = FLOORS[transport]([tensor for _, tensor in tensors])
        name = type(bare).__name__.lower()
        print(f"{nbytes / 1e9:.2f} GB to {replicas} engine(s) by {transport}")
        config = EmbeddedEngineConfig(kind="embedded", replicas=replicas, max_running_requests=2, cached_prefixes=0)
        async with AsyncExitStack() as stack:
            sidecars = [stack.enter_context(sidecar("--device", "cpu"))] if transport == "ucx" else []
            fleet = await stack.enter_async_context(
                open_fleet(config, folder, log_dir=folder / "logs", transport=transport, sidecars=sidecars)
            )
            floors, publishes = [], []
            for version in range(1, repeats + 3):
                floor = bare.seconds()
                report = await fleet.publish(tensors, version)
                assert not report.failed
                engine = max(report.engines, key=lambda e: e.load_seconds)
                print(
                    f"version {version}: {name} {floor:.3f} s, publish {report.seconds:.3f} s (stage "
                    f"{report.stage_seconds:.3f}, load {engine.load_seconds:.3f}, attest {engine.attest_seconds:.3f}, "
                    f"commit {engine.commit_seconds:.3f}), ratio {report.seconds / floor:.2f}"
                )
                if version > 2:  # by then, both of the engine's sets of tensors have been written once
                    floors.append(floor)
                    publishes.append(report.seconds)
            floor, seconds = statistics.median(floors), statistics.median(publishes)
            print(f"medians: {name} {floor:.3f} s, publish {seconds:.3f} s, ratio {seconds / floor:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transport", choices=sorted(FLOORS), default="shm")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.transport, arguments.replicas, arguments.repeats))


if __name__ == "__main__":
    main()
