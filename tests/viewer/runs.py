"""Folders of runs as `millrace train` writes them, with invented contents."""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '</script><img src=x onerror="window.hacked = 2">',
    '"><svg onload=window.hacked=3>',
    '<a href="javascript:window.hacked=4">a link</a>',
    "<style>body{display:none}</style>{{7*7}}\u202e\u0000 end",
)
WORDS = "we add the two numbers so that each of them sells twice as many in May and then half".split()  # noqa: SIM905
ENGINES = ("sglang-0", "sglang-1", "sglang-2")

SPAN = pa.struct([("version", pa.int32()), ("start", pa.int32()), ("end", pa.int32())])
SEQUENCE = pa.struct([
    ("end", pa.string()), ("turns", pa.int32()), ("text", pa.string()), ("ends", pa.list_(pa.int32())),
    ("token_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_())), ("logprobs", pa.list_(pa.float32())),
    ("trainer_logprobs", pa.list_(pa.float32())), ("version_spans", pa.list_(SPAN)),
])  # fmt: skip
SCHEMA = pa.schema([
    ("step", pa.int32()), ("sample", pa.string()), ("group", pa.string()), ("problem", pa.string()),
    ("answer", pa.string()), ("status", pa.string()), ("reason", pa.string()), ("end", pa.string()),
    ("reward", pa.float64()), ("rewards", pa.map_(pa.string(), pa.float64())), ("advantage", pa.float64()),
    ("turns", pa.int32()), ("tool_calls", pa.int32()), ("tool_errors", pa.int32()), ("prompt_tokens", pa.int32()),
    ("tokens", pa.int32()), ("oldest_version", pa.int32()), ("newest_version", pa.int32()), ("gap", pa.float64()),
    ("started_at", pa.float64()), ("seconds", pa.float64()), ("timings", pa.map_(pa.string(), pa.float64())),
    ("messages", pa.string()), ("counts", pa.map_(pa.string(), pa.int32())), ("images", pa.list_(pa.string())),
    ("sequences", pa.list_(SEQUENCE)),
])  # fmt: skip


class Writer:
    """Writes a run step by step. `started`: Unix time of the first step."""

    def __init__(self, folder: Path, *, seed: int = 0, started: float | None = None, quality: float = 1.0) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.quality = quality
        self.step = 0
        self.clock = time.time() - 3600 if started is None else started
        (folder / "samples").mkdir(parents=True)
        (folder / "config.yaml").write_text(f"name: {folder.name}\nmode: standalone\n")
        self.opened()
        self.line("metrics.jsonl", {"step": 0, "weight_version": 1, "accuracy": 0.19, "reward": None})

    def opened(self) -> None:
        """A process begins, and its engines start."""
        self.event("opened")
        for number, engine in enumerate(ENGINES):
            self.member(engine, "starting", None, None)
            self.clock += 1.5 + number
            self.member(engine, "ready", "starting", None)

    def closed(self, reason: str | None = None) -> None:
        """The process ends."""
        self.event("closed", reason=reason)

    def line(self, name: str, record: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def event(self, kind: str, engine: str | None = None, **fields: Any) -> None:
        self.line("events.jsonl", {"at": round(self.clock, 4), "kind": kind, "engine": engine, **fields})

    def member(self, engine: str, state: str, was: str | None, version: int | None, **fields: Any) -> None:
        self.event(
            "member", engine, state=state, was=was, version=version, **{"asleep": None, "reason": None, **fields}
        )

    def steps(self, count: int, *, groups: int = 4, samples: int = 8) -> None:
        for _ in range(count):
            self.one_step(groups=groups, samples=samples)

    def one_step(self, *, groups: int = 4, samples: int = 8) -> None:
        self.step += 1
        learned = self.quality * (1 - np.exp(-self.step / 12))
        rows = [
            self.sample(f"{self.step}-{group}", member, learned) for group in range(groups) for member in range(samples)
        ]
        for start in range(0, len(rows), samples):
            advantages(rows[start : start + samples])
        self.fleet()
        write(self.folder, self.step, rows)
        self.line("metrics.jsonl", self.metrics(rows, learned))
        if self.step % 10 == 0:
            self.advise()

    def metrics(self, rows: Sequence[dict[str, Any]], learned: float) -> dict[str, Any]:
        noise, step = self.random.gauss, self.step
        generated = sum(row["tokens"] for row in rows)
        return {
            "step": step, "weight_version": step + 1,
            "accuracy": round(0.19 + 0.75 * learned + noise(0, 0.01), 4) if step % 5 == 0 else None,
            "reward": float(np.mean([row["reward"] for row in rows])),
            "rewards": {"correct": float(np.mean([dict(r["rewards"])["correct"] for r in rows])), "format": 0.8},
            "staleness": abs(noise(0.6, 0.2)), "rollout_seconds": abs(noise(1.2, 0.2)), "judge_seconds": 0.0,
            "publish_seconds": abs(noise(0.1, 0.02)), "train_seconds": abs(noise(2.4, 0.2)),
            "sleep_seconds": abs(noise(0.06, 0.01)), "evaluation_seconds": 0.5 if step % 5 == 0 else 0.0,
            "step_seconds": abs(noise(4.1, 0.3)), "freed_gib": 0.0, "tokens": generated,
            "tokens_per_second": abs(noise(6200, 500)), "kl": abs(noise(0.002 * step**0.5, 0.001)),
            "clip_fraction": abs(noise(0.02, 0.01)), "logprob_gap": abs(noise(0.004 + 0.0001 * step, 0.001)),
            "entropy": max(0.05, 1.1 - 0.6 * learned + noise(0, 0.03)), "loss": noise(0.0, 0.02),
            "grad_norm": abs(noise(0.7, 0.2)), "lr": 1e-5, "samples_finished": len(rows),
            "samples_failed": int(step % 7 == 3),
            "samples_aborted": 0, "groups_with_signal": 3, "groups_dropped": 0, "tool_calls": 40, "tool_errors": 3,
            "branches": 1.2, "requests": 64,
        }  # fmt: skip

    def advise(self) -> None:
        kind, text, do, engine = self.random.choice([
            ("gap_rising", f"the gap between engine and trainer rose from 0.004 to {0.004 + self.step / 4000:.4f} nats "
             "in 10 steps", "check the engine's precision, and train.routing_replay for a mixture of experts", None),
            ("truncated", "61 % of the samples end at a limit", "raise rollout.max_turn_tokens (now 96)", None),
            ("slow_engine", "sglang-2 generates 0.6 times as fast as the others", "look for other work on its host",
             "sglang-2"),
        ])  # fmt: skip
        self.line("advice.jsonl", {"step": self.step, "kind": kind, "text": text, "do": do, "engine": engine})

    def fleet(self) -> None:
        """Write the events of a step: requests, a publish, and now and then a death."""
        begun = self.clock
        for _ in range(12):
            self.clock += self.random.uniform(0.02, 0.2)
            engine = self.random.choice(ENGINES)
            seconds = min(self.random.uniform(0.2, 1.4), self.clock - begun)
            self.event("request", engine, outcome="finished", seconds=round(seconds, 4), prompt_tokens=120,
                       cached_tokens=80, output_tokens=60)  # fmt: skip
        if self.step % 9 == 4:
            reason = "sglang-1 was killed by SIGKILL"
            self.member("sglang-1", "dead", "ready", self.step, reason=reason)
            self.clock += 2.0
            self.member("sglang-1", "starting", "dead", None)
            self.clock += 1.0
            self.event(
                "member", "sglang-1", state="catching_up", was="starting", version=None, asleep=None, reason=None
            )
            self.clock += 0.5
            self.event(
                "member", "sglang-1", state="ready", was="catching_up", version=self.step, asleep=None, reason=None
            )
            self.event("restart", "sglang-1", seconds=3.5, reason=None)
        for engine in ENGINES:
            self.member(engine, "ready", None, self.step, asleep="kv_cache")
        self.clock += 2.4
        for engine in ENGINES:
            self.member(engine, "ready", None, self.step)
        self.clock += 0.6
        for engine in ENGINES:
            self.member(engine, "ready", None, self.step + 1)
            self.event("publish_engine", engine, version=self.step + 1, begin_seconds=0.03, load_seconds=0.3,
                       attest_seconds=0.1, commit_seconds=0.05, pause_seconds=0.2, reason=None)  # fmt: skip
        self.event("publish", version=self.step + 1, label=None, what="weights", nbytes=14_000_000, seconds=0.52,
                   stage_seconds=0.2, engines=3, failed=None, unstored=None)  # fmt: skip

    def sample(self, group: str, member: int, learned: float) -> dict[str, Any]:
        chance = self.random
        correct = float(chance.random() < 0.2 + 0.7 * learned)
        failed = chance.random() < 0.02
        text = " ".join(chance.choices(WORDS, k=chance.randint(6, 30)))
        if member == 5:
            text += " " + HOSTILE[self.step % len(HOSTILE)]
        messages = conversation(group, text, error=member % 4 == 3)
        trained = None if failed else self.step
        sequences = [] if failed else self.sequences(messages, branches=3 if member == 2 else 0)
        tokens = sum(sum(one["loss_mask"]) for one in sequences)
        form = round(chance.uniform(0.5, 1), 3)
        seconds = round(chance.uniform(0.5, 4), 3)
        return {
            "step": self.step, "sample": f"{group}.{member}", "group": group, "problem": f"gsm8k-{group}",
            "answer": "72", "status": "failed" if failed else "finished",
            "reason": "EngineError: engine sglang-1: connection reset" if failed else None,
            "end": None if failed else "token_limit" if len(text) > 160 else "answered",
            "reward": 0.0 if failed else 0.8 * correct + 0.2 * form,
            "rewards": [("correct", correct), ("format", form)], "advantage": None, "turns": 2, "tool_calls": 1,
            "tool_errors": int(member % 4 == 3), "prompt_tokens": 41, "tokens": tokens, "oldest_version": trained,
            "newest_version": trained if trained is None else trained + (member == 6),
            "gap": None if failed else abs(chance.gauss(0.004, 0.002)), "started_at": self.clock, "seconds": seconds,
            "timings": [("queue", seconds * 0.1), ("generate", seconds * 0.7), ("tools", seconds * 0.15),
                        ("reward", seconds * 0.05)],
            "messages": json.dumps(messages, ensure_ascii=False), "counts": [("requests", 2)],
            "images": [], "sequences": sequences,
        }  # fmt: skip

    def sequences(self, messages: list[dict[str, Any]], branches: int) -> list[dict[str, Any]]:
        main = self.sequence(messages)
        cut = len(main["token_ids"]) // 2
        made = []
        for number in range(branches):
            other = self.sequence([*messages[:2], {"role": "assistant", "content": f"Another way, number {number}."}])
            where = cut - 5 * (number % 2)
            made.append(joined(main, other, where))
        return [*made, main]

    def sequence(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        pieces: list[str] = []
        mask: list[bool] = []
        for message in messages:
            ours = message["role"] == "assistant"
            calls = "".join(
                f"<tool_call>{json.dumps(c['function'])}</tool_call>" for c in message.get("tool_calls", ())
            )
            text = f"<think>{message['reasoning']}</think>" if message.get("reasoning") else ""
            for part, own in ((f"<|{message['role']}|>\n", False), (text + message["content"] + calls, ours)):
                cuts = [part[i : i + 4] for i in range(0, len(part), 4)]
                pieces += cuts
                mask += [own] * len(cuts)
        count = len(pieces)
        logprobs = [-abs(self.random.gauss(0, 0.6)) if own else 0.0 for own in mask]
        trainer = [x + self.random.gauss(0, 0.01) if own else 0.0 for x, own in zip(logprobs, mask, strict=True)]
        half = count // 2
        return {
            "end": "answered", "turns": 2, "text": "".join(pieces),
            "ends": np.cumsum([len(piece) for piece in pieces]).tolist(),
            "token_ids": [sum(map(ord, piece)) * 7 % 50_000 for piece in pieces], "loss_mask": mask,
            "logprobs": logprobs, "trainer_logprobs": trainer,
            "version_spans": [{"version": self.step, "start": 0, "end": half},
                              {"version": self.step + 1, "start": half, "end": count}],
        }  # fmt: skip


def joined(main: dict[str, Any], other: dict[str, Any], cut: int) -> dict[str, Any]:
    """Return a branch: the main sequence up to token `cut`, and then the other."""
    at = main["ends"][cut - 1]
    lists = ("token_ids", "loss_mask", "logprobs", "trainer_logprobs")
    return {
        **main,
        **{name: main[name][:cut] + other[name] for name in lists},
        "text": main["text"][:at] + other["text"],
        "ends": main["ends"][:cut] + [at + end for end in other["ends"]],
        "version_spans": [{"version": 1, "start": 0, "end": cut + len(other["token_ids"])}],
    }


def conversation(group: str, text: str, *, error: bool) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "48 + 24"}'}}
    return [
        {"role": "system", "content": "You solve problems. Use the calculator."},
        {"role": "user", "content": f"Natalia sold clips to 48 friends in April, and half as many in May ({group})."},
        {"role": "assistant", "content": "", "reasoning": f"Let me see: {text}", "tool_calls": [call]},
        {"role": "tool", "content": "division by zero" if error else "72", "name": "calculator",
         **({"error": True} if error else {})},
        {"role": "assistant", "content": f"{text}.\n\nThe answer is **72** 🎉"},
    ]  # fmt: skip


def advantages(rows: Sequence[dict[str, Any]]) -> None:
    done = [row for row in rows if row["status"] == "finished"]
    mean = float(np.mean([row["reward"] for row in done])) if done else 0.0
    for row in done:
        row["advantage"] = row["reward"] - mean


def write(folder: Path, step: int, rows: Sequence[dict[str, Any]], schema: pa.Schema = SCHEMA, rank: int = 0) -> Path:
    """Write the samples of a step as a whole, as a run does."""
    path = folder / "samples" / f"step-{step:06d}{f'-rank{rank}' if rank else ''}.parquet"
    beside = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), beside, compression="zstd")
    beside.replace(path)
    return path


def short_rows(step: int, count: int, seed: int = 0) -> pa.Table:
    """Return a table of `count` short samples, made quickly."""
    chance = np.random.default_rng(seed + step)
    names = np.arange(count)
    tokens = chance.integers(5, 400, count)
    rewards = chance.random(count)
    messages = [f'[{{"role": "user", "content": "number {step} {i}"}}]' for i in range(count)]
    empty: list[list[Any]] = [[]] * count
    columns: dict[str, Any] = {
        "step": np.full(count, step), "sample": [f"{step}-{i // 8}.{i % 8}" for i in names],
        "group": [f"{step}-{i // 8}" for i in names], "problem": [f"gsm8k-{i // 8}" for i in names],
        "answer": ["72"] * count, "status": np.where(tokens < 9, "failed", "finished"), "reason": [None] * count,
        "end": np.where(tokens > 390, "token_limit", "answered"), "reward": rewards,
        "rewards": empty, "advantage": rewards - 0.5,
        "turns": tokens % 5, "tool_calls": tokens % 3, "tool_errors": tokens % 2, "prompt_tokens": tokens % 90,
        "tokens": tokens, "oldest_version": np.full(count, step), "newest_version": np.full(count, step),
        "gap": rewards / 100, "started_at": np.full(count, 1.7e9 + step), "seconds": rewards * 4,
        "timings": empty, "messages": messages,
        "counts": empty, "images": empty,
        "sequences": empty,
    }  # fmt: skip
    arrays = []
    for field in SCHEMA:
        values = columns[field.name]
        typed = pa.array(values, type=field.type) if isinstance(values, list) else pa.array(values).cast(field.type)
        arrays.append(typed)
    return pa.table(arrays, schema=SCHEMA)


def write_short(folder: Path, steps: int, each: int) -> None:
    """Write `steps` files of `each` short samples."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for step in range(1, steps + 1):
        pq.write_table(short_rows(step, each), folder / "samples" / f"step-{step:06d}.parquet", compression="zstd")
