"""The samples of a step as the content of a Parquet file, one row a sample. docs/training.md describes the columns."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import ArrayLike
from pyarrow import parquet

from millrace.rollout.chat import ChatFormat
from millrace.rollout.sample import Episode, Group, Message, Sample
from millrace.train.batch import TrainSample
from millrace.train.token_ends import TokenEnds
from millrace.types import Float32Array

_SPANS = pa.list_(pa.struct({"version": pa.int32(), "start": pa.int32(), "end": pa.int32()}))
SEQUENCE = pa.struct(
    {
        "end": pa.string(),
        "turns": pa.int32(),
        "text": pa.string(),
        "ends": pa.list_(pa.int32()),
        "token_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "logprobs": pa.list_(pa.float32()),
        "trainer_logprobs": pa.list_(pa.float32()),
        "version_spans": _SPANS,
    }
)
SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "sample": pa.string(),
        "group": pa.string(),
        "problem": pa.string(),
        "answer": pa.string(),
        "status": pa.string(),
        "reason": pa.string(),
        "end": pa.string(),
        "reward": pa.float64(),
        "rewards": pa.map_(pa.string(), pa.float64()),
        "advantage": pa.float64(),
        "turns": pa.int32(),
        "tool_calls": pa.int32(),
        "tool_errors": pa.int32(),
        "prompt_tokens": pa.int32(),
        "tokens": pa.int32(),
        "oldest_version": pa.int32(),
        "newest_version": pa.int32(),
        "gap": pa.float64(),
        "started_at": pa.float64(),
        "seconds": pa.float64(),
        "timings": pa.map_(pa.string(), pa.float64()),
        "messages": pa.string(),
        "counts": pa.map_(pa.string(), pa.int32()),
        "images": pa.list_(pa.string()),
        "sequences": pa.list_(SEQUENCE),
    }
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What the trainer made of a sample. logprobs: of each of its sequences, as in StepStats."""

    advantage: float
    logprobs: tuple[Float32Array, ...]


def trained_samples(
    groups: Iterable[Group], sequences: Iterable[TrainSample], logprobs: Iterable[Float32Array]
) -> dict[str, Trained]:
    """Return what the trainer made of the groups' samples, by their ids.

    sequences: of all samples, in their order. logprobs: of each sequence.
    """
    rest, found = zip(sequences, logprobs, strict=True), {}
    for sample in (sample for group in groups for sample in group.samples):
        own = list(islice(rest, len(sample.sequences)))
        found[sample.sample_id] = Trained(own[0][0].advantage, tuple(one for _, one in own))
    return found


class SampleFormat:
    """Writes samples as the content of Parquet files, also in another thread than the one that encodes prompts.

    chat: the format of their conversations. A copy of its tokenizer is made, which takes a second if it is large.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self._chat, self._ends = chat, TokenEnds.of(chat)

    def parquet(self, step: int, samples: Sequence[Sample], trained: Mapping[str, Trained]) -> bytes:
        """Return the content of a step's file. trained: what the trainer made of samples, by their ids."""
        rows = [_row(step, sample, trained.get(sample.sample_id)) for sample in samples]
        columns = {name: pa.array([row[name] for row in rows], SCHEMA.field(name).type) for name in SCHEMA.names[:-1]}
        columns["sequences"] = self._sequences(samples, trained)
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.table(columns, SCHEMA), sink, compression="zstd")
        return bytes(sink.getvalue())

    def _sequences(self, samples: Sequence[Sample], trained: Mapping[str, Trained]) -> pa.Array:
        """Return the column of the token sequences. Its arrays are made of NumPy's, without a Python object a token."""
        episodes = [one for sample in samples for one in sample.sequences]
        ids = [np.asarray(one.token_ids, np.int32) for one in episodes]
        texts, ends = zip(*(self._text(one.token_ids) for one in episodes), strict=True) if episodes else ((), ())
        computed: list[Float32Array | None] = []
        for sample in samples:
            made = trained.get(sample.sample_id)
            computed += made.logprobs if made is not None else [None] * len(sample.sequences)
        spans = [[(s.version, s.start, s.end) for s in one.version_spans] for one in episodes]
        arrays = [
            pa.array([str(one.end) for one in episodes], pa.string()),
            pa.array([one.turns for one in episodes], pa.int32()),
            pa.array(texts, pa.string()),
            _lists(ends, pa.int32()),
            _lists(ids, pa.int32()),
            _lists([one.loss_mask for one in episodes], pa.bool_()),
            _lists([one.logprobs for one in episodes], pa.float32()),
            _lists(computed, pa.float32()),
            pa.array([[dict(zip(("version", "start", "end"), s, strict=True)) for s in one] for one in spans], _SPANS),
        ]
        offsets = np.cumsum([0, *(len(sample.sequences) for sample in samples)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, fields=list(SEQUENCE)))

    def _text(self, token_ids: Sequence[int]) -> tuple[str, ArrayLike]:
        """Return the text of token ids, and the end of each in it. An image is one placeholder in the text."""
        folded = self._chat.folded(token_ids)
        text = self._ends.text(folded)
        ends = np.asarray(self._ends.ends(folded, text), np.int32)
        if isinstance(vision := self._chat.vision, str) or len(folded) == len(token_ids):
            return text, ends
        places = np.asarray(token_ids) == vision.placeholder
        again = np.concatenate([[False], places[1:] & places[:-1]])
        return text, ends[np.cumsum(~again) - 1]  # all placeholders of a run are where the first one is


def _lists(rows: Sequence[ArrayLike | None], values: pa.DataType) -> pa.Array:
    arrays = [np.empty(0) if row is None else np.asarray(row) for row in rows]
    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    flat = np.concatenate(arrays) if arrays else np.empty(0)
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat.astype(values.to_pandas_dtype()), values), mask=missing
    )


def _row(step: int, sample: Sample, trained: Trained | None) -> dict[str, Any]:
    """Return the columns of a sample, without its sequences."""
    episode, timings = sample.episode, sample.timings
    answers = [one for one in episode.messages if one["role"] == "tool"] if episode is not None else []
    return {
        "step": step,
        "sample": sample.sample_id,
        "group": sample.group_id,
        "problem": _written(sample.problem.problem_id),
        "answer": _written(sample.problem.answer),
        "status": str(sample.status),
        "reason": _written(sample.reason),
        "end": None if episode is None else str(episode.end),
        "reward": sample.reward,
        "rewards": dict(sample.rewards),
        "advantage": None if trained is None else trained.advantage,
        "turns": sum(one.turns for one in sample.sequences),
        "tool_calls": len(answers),
        "tool_errors": sum(bool(one.get("error")) for one in answers),
        "prompt_tokens": 0 if episode is None else _prompt_tokens(episode),
        "tokens": sample.generated_tokens,
        "oldest_version": sample.oldest_version,
        "newest_version": sample.newest_version,
        "gap": None if trained is None else _gap(sample.sequences, trained.logprobs),
        "started_at": timings.started_at,
        "seconds": timings.seconds,
        "timings": dict(timings.parts),
        "messages": conversation_json(sample.conversation),
        "counts": dict(sorted(sample.counts.items())),
        "images": [] if episode is None else [sha256(image).hexdigest() for image in episode.images],
    }


def _prompt_tokens(episode: Episode) -> int:
    """Return how many tokens come before the first one that is trained."""
    places = np.flatnonzero(episode.loss_mask)
    return int(places[0]) if places.size else len(episode.token_ids)


def _gap(sequences: Sequence[Episode], logprobs: Sequence[Float32Array]) -> float | None:
    """Return the mean of |engine's - trainer's logprob| over the trained tokens; None without any."""
    gaps = [
        np.abs(one.logprobs - own)[one.loss_mask].astype(np.float64)
        for one, own in zip(sequences, logprobs, strict=True)
    ]
    joined = np.concatenate(gaps) if gaps else np.empty(0)
    return float(joined.mean()) if joined.size else None


def conversation_json(messages: Sequence[Message]) -> str:
    """Return chat messages as JSON, with `{"type": "image"}` in place of each image."""
    shown = [{**message, "content": _without_images(message.get("content"))} for message in messages]
    try:
        return orjson.dumps(shown, default=str).decode()
    except TypeError:  # a number of more than 64 bits, or half of a surrogate pair
        return json.dumps(shown, default=str)


def _without_images(content: object) -> object:
    if not isinstance(content, list | tuple):
        return content
    return [{"type": "image"} if part.get("type") == "image" else part for part in content]


def _written(text: str | None) -> str | None:
    """Return a text as UTF-8 can write it: an error may quote a file's name that is none."""
    return None if text is None else text.encode("utf-8", "replace").decode()
