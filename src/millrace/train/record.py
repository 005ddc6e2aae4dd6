"""The records of a run: its folder, the metrics of each step, its advisories, and all conversations."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from millrace.config import RunConfig, dump_config
from millrace.config.reading import parse_yaml
from millrace.errors import ConfigError, DataError
from millrace.jsonl import drop_torn_tail, read_objects
from millrace.locks import try_lock
from millrace.model_folder import to_disk
from millrace.rollout.sample import Sample
from millrace.train.advice import Advisory
from millrace.train.changes import changed_settings
from millrace.train.metrics import StepMetrics
from millrace.train.sample_files import FOLDER, file_name, forget_samples
from millrace.train.samples import SampleFormat, Trained

logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run, `output_dir/name`. Nothing is written before `create`.

    Raises ConfigError if a new run finds an existing one, or a resumed run finds none.
    """

    def __init__(self, config: RunConfig, *, resume: bool, rank: int = 0) -> None:
        self.path = config.output_dir / config.name
        self._config = config
        self._rank = rank
        if self.metrics_path.exists() and not resume:
            raise ConfigError(f"{self.path} holds a run already; give --resume to continue it, or another name=...")
        if resume and not self.metrics_path.exists():
            raise ConfigError(f"{self.path} holds no run to resume; leave out --resume to start one")

    @contextmanager
    def create(self) -> Iterator[Sequence[str]]:
        """Create the folder, write config.yaml, and lock the folder while the block runs. Only rank 0 does so.

        The block gets a line for each setting that a resumed run has changed, as `changed_settings` returns them.

        Raises ConfigError if another run has the folder, or a resumed run has another model; DataError if it can't be
        written.
        """
        if self._rank:
            yield ()
            return
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            if not try_lock(lock.fileno()):
                raise ConfigError(f"{self.path} is in use by another run; wait until it ends, or give another name=...")
            settings = self.path / "config.yaml"
            changed: Sequence[str] = ()
            with explained(self.path):
                if self.metrics_path.exists() and settings.exists():
                    changed = self._changed(settings)
                replace_file(settings, dump_config(self._config).encode())
            yield changed

    def _changed(self, settings: Path) -> Sequence[str]:
        """Return a line for each setting that differs from those in `settings`.

        Raises ConfigError if a resumed run has another model: its checkpoints would not fit.
        """
        written, now = settings.read_bytes(), self._config.model_dump(mode="json")
        before = settings_of(written)
        model = model_of(before)
        if model is None:
            logger.warning("%s is torn; it is written again, and its model could not be compared", settings)
            return ()
        if model != now["model"]:
            raise ConfigError(
                f"{self.path} was started with model {model}, and a resumed run can't have another ({now['model']}); "
                "leave model as it was, or give another name=..."
            )
        return changed_settings(before, now) if written.endswith(b"\n") else ()

    @property
    def metrics_path(self) -> Path:
        """The file with one StepMetrics a line."""
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        """The file of the fleet's events, as this rank sees them."""
        return self.path / (f"events-{self._rank}.jsonl" if self._rank else "events.jsonl")

    @property
    def logs(self) -> Path:
        """The folder of the engines' logs."""
        return self.path / "logs"

    def add_metrics(self, metrics: StepMetrics) -> None:
        """Append a line to metrics.jsonl. Raises DataError."""
        self._append("metrics.jsonl", [asdict(metrics)])

    def add_advice(self, advice: Sequence[Advisory]) -> None:
        """Append lines to advice.jsonl. Raises DataError."""
        if not advice:
            return
        self._append("advice.jsonl", [one.record for one in advice])

    def add_samples(
        self, step: int, samples: Sequence[Sample], trained: Mapping[str, Trained], form: SampleFormat
    ) -> None:
        """Write this rank's samples of a step to their file. Raises DataError.

        trained: what the trainer made of samples, by their ids.
        """
        path = self.path / FOLDER / file_name(step, self._rank)
        with explained(path):
            path.parent.mkdir(exist_ok=True)
            replace_file(path, form.parquet(step, samples, trained))

    def add_curves(self, png: bytes) -> None:
        """Write curves.png. Raises DataError."""
        with explained(self.path / "curves.png"):
            replace_file(self.path / "curves.png", png)

    def read_metrics(self) -> list[StepMetrics]:
        """Return the metrics of all steps. Raises DataError if a line is damaged."""
        if not self.metrics_path.exists():
            return []
        return [StepMetrics(**record) for _, record in read_objects(self.metrics_path, "step")]

    def forget_after(self, step: int) -> None:
        """Drop the records of steps after `step`, the checkpoint's, when a run is resumed.

        Rank 0 does so for all ranks, of which there may have been more before. The other ranks write nothing before the
        next publish, which all ranks join.
        """
        if self._rank:
            return
        for path in (self.metrics_path, self.path / "advice.jsonl"):
            if path.exists():
                with explained(path):
                    drop_torn_tail(path)
                    kept = [line for line, record in read_objects(path, "step") if record["step"] <= step]
                    # The file is replaced atomically, for a process that dies here and for readers.
                    replace_file(path, b"".join(kept))
        with explained(self.path / FOLDER):
            forget_samples(self.path, after=step)

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        path = self.path / name
        with explained(path), path.open("ab") as file:
            file.write(b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records))


def settings_of(content: bytes) -> dict[str, Any]:
    """Return what is whole of a run's `config.yaml`, which may be torn."""
    whole = content.rstrip(b"\0")
    whole = whole[: whole.rfind(b"\n") + 1]
    try:
        data, _ = parse_yaml(whole.decode(), "config.yaml")
    except (ConfigError, UnicodeDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


def model_of(settings: dict[str, Any]) -> object:
    """Return the model in a run's settings; None if they are torn before the end of that section."""
    return None if next(reversed(settings), "model") == "model" else settings.get("model")


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content atomically, even if the power fails."""
    beside = path.with_suffix(".partial")
    beside.write_bytes(content)
    to_disk(beside)
    beside.replace(path)
    to_disk(path.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DataError that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} can't be written: {error.strerror}") from error
