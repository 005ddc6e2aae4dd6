"""What a run leaves behind: its folder, a line of figures for every step, and every conversation."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from millrace.config import RunConfig, dump_config
from millrace.config.reading import parse_yaml
from millrace.errors import ConfigError, DataError
from millrace.jsonl import drop_torn_tail, read_objects
from millrace.model_folder import to_disk
from millrace.rollout.chat import ChatFormat
from millrace.rollout.sample import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl. Step 0 is before the reinforcement: an evaluation only, the rest is None."""

    step: int
    weight_version: int  # that the step ended with
    accuracy: float | None  # of greedy answers to held-out problems; None where the step was not evaluated
    reward: float | None = None  # mean over the step's samples
    staleness: float | None = None  # mean over the step's samples, in versions
    rollout_seconds: float = 0.0  # that the trainer waited for samples
    judge_seconds: float = 0.0  # of a colocated judge's turn
    publish_seconds: float = 0.0
    train_seconds: float = 0.0
    sleep_seconds: float = 0.0  # engines going to sleep and waking
    freed_gib: float = 0.0  # of the trainer's GPU by the engines that sleep; 0 on the CPU
    evaluation_seconds: float = 0.0
    step_seconds: float = 0.0
    tokens: int = 0  # that the model made
    tokens_per_second: float = 0.0  # over the time in which the engines generated
    kl: float | None = None
    clip_fraction: float | None = None
    logprob_gap: float | None = None  # mean |engine's logprob - trainer's|, in nats
    entropy: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    samples_finished: int = 0
    samples_failed: int = 0
    samples_aborted: int = 0
    groups_with_signal: int | None = None  # whose rewards differed; the advantages of the others are 0
    groups_dropped: int = 0  # their rewards were all alike, and dynamic sampling took others
    tool_calls: int = 0
    tool_errors: int = 0
    grade: float | None = None  # mean of the judge's, since the step before
    grades: int = 0  # that it gave
    grades_unread: int = 0  # of these, its answers without a grade in them, which count as 0


class RunFolder:
    """`output_dir/name`. Raises ConfigError for a new run where one is already, and for resuming where none is.
    Nothing is written before `create`."""

    def __init__(self, config: RunConfig, *, resume: bool, rank: int = 0) -> None:
        self.path = config.output_dir / config.name
        self._config = config
        self._of_rank = f"-{rank}" if rank else ""  # in the names of what every rank writes for itself
        if self.metrics_path.exists() and not resume:
            raise ConfigError(f"{self.path} holds a run already; give --resume to go on with it, or another name=...")
        if resume and not self.metrics_path.exists():
            raise ConfigError(f"{self.path} holds no run to resume; leave --resume out to start one")

    @contextmanager
    def create(self) -> Iterator[None]:
        """Makes the folder and holds it, for all ranks: another run that wants it meanwhile gets a ConfigError."""
        if self._of_rank:
            yield
            return
        with _explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path} is in use by another run; wait for its end or give another name=..."
                ) from None
            settings = self.path / "config.yaml"
            with _explained(self.path):
                if self.metrics_path.exists() and settings.exists():
                    self._require_same_model(settings)
                _replace(settings, dump_config(self._config).encode())
            yield

    def _require_same_model(self, settings: Path) -> None:
        """Of a run that is resumed. Its checkpoints are of that model."""
        before, now = model_of(settings.read_bytes()), model_of(dump_config(self._config).encode())
        if before is None:
            logger.warning("%s is torn; it is written again, and its model was not compared", settings)
        elif before != now:
            raise ConfigError(
                f"{self.path} was begun with model {before}, and a run that is resumed can't have another ({now}); "
                "leave model as it was, or give another name=..."
            )

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        return self.path / f"events{self._of_rank}.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def add_metrics(self, metrics: StepMetrics) -> None:
        self._append("metrics.jsonl", [asdict(metrics)])

    def add_samples(self, step: int, samples: list[Sample], chat: ChatFormat) -> None:
        """Appends whole conversations, as text and as tokens."""
        self._append(f"samples{self._of_rank}.jsonl", [_as_record(step, sample, chat) for sample in samples])

    def read_metrics(self) -> list[StepMetrics]:
        return [StepMetrics(**record) for _, record in read_objects(self.metrics_path, "step")]

    def forget_after(self, step: int) -> None:
        """Drops what was recorded behind a checkpoint that a run goes on from: by rank 0, for all ranks, of which there
        may have been more before. The others write nothing until the publish that comes next, which they all do."""
        if self._of_rank:
            return
        for name in ("metrics.jsonl", "samples*.jsonl"):
            for path in self.path.glob(name):
                with _explained(path):
                    drop_torn_tail(path)
                    kept = [line for line, record in read_objects(path, "step") if record["step"] <= step]
                    # In place whole: a process that dies here, or reads meanwhile, must not find less than that.
                    _replace(path, b"".join(kept))

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        path = self.path / name
        with _explained(path), path.open("ab") as file:
            file.write(b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records))


def _as_record(step: int, sample: Sample, chat: ChatFormat) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": step,
        "sample": sample.sample_id,
        "problem": sample.problem.problem_id,
        "answer": sample.problem.answer,
        "status": sample.status,
        "reason": sample.reason,
        "reward": sample.reward,
    }
    if episode := sample.episode:
        record |= {
            "end": episode.end,
            "turns": episode.turns,
            "text": chat.decode(episode.token_ids),
            "token_ids": episode.token_ids,
            "loss_mask": episode.loss_mask.astype(int).tolist(),
            "version_spans": [[s.version, s.start, s.end] for s in episode.version_spans],
        }
    return record


def model_of(settings: bytes) -> object:
    """The model that a run's `config.yaml` names; None where the file is torn before the end of that section."""
    whole = settings.rstrip(b"\0")
    whole = whole[: whole.rfind(b"\n") + 1]
    try:
        data, _ = parse_yaml(whole.decode(), "config.yaml")
    except (ConfigError, UnicodeDecodeError):
        return None
    if not isinstance(data, dict) or next(reversed(data), "model") == "model":
        return None
    return data.get("model")


def _replace(path: Path, content: bytes) -> None:
    """At once or not at all, also where the power fails."""
    beside = path.with_suffix(".partial")
    beside.write_bytes(content)
    to_disk(beside)
    beside.replace(path)
    to_disk(path.parent)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} can't be written: {error.strerror}") from error
