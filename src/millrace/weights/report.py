"""What a publish did."""

from dataclasses import dataclass

from millrace.errors import EngineError
from millrace.weights.audit import EngineAudit


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The outcome of a publish on one engine.

    engine: the engine's name.
    error: why it did not take the version; None if it did.
    collateral: the engine is healthy; another engine in its broadcast, or its host's sidecar, failed.
    load_seconds: from the request to load the first bucket to the answer to the last one.
    pause_seconds: how long the update kept it from generating.
    audit: what its layers hold, if they should be quantised; None if they should not, or can't be audited.
    """

    engine: str
    error: EngineError | None
    collateral: bool
    begin_seconds: float
    load_seconds: float
    attest_seconds: float
    commit_seconds: float
    pause_seconds: float
    audit: EngineAudit | None = None


@dataclass(frozen=True, slots=True)
class PublishReport:
    """The outcome of a publish.

    version: the number of the version.
    nbytes: the size of the tensors.
    seconds: the duration of the whole publish.
    stage_seconds: the time spent on copying into buckets and on bringing these to the engines' hosts. Engines load at
        the same time.
    unstored: why this version, or the one before, is not in the store.
    left_out: the engines that were out of rotation, and why. Nothing was sent to them.
    label: the trainer's own name for the version.
    exchanged: the bytes that the trainer's ranks sent each other, or engines that are apart, if each rank of an engine
        got only the parts of sharded tensors that it needs; None if tensors were gathered.
    """

    version: int
    nbytes: int
    seconds: float
    stage_seconds: float
    engines: tuple[EngineReport, ...]
    unstored: str | None = None
    left_out: tuple[str, ...] = ()
    label: str | int | None = None
    exchanged: int | None = None

    @property
    def failed(self) -> dict[str, EngineError]:
        """The error of each engine that did not take the version, by the engine's name."""
        return {report.engine: report.error for report in self.engines if report.error is not None}
