"""What a publish did."""

from dataclasses import dataclass

from millrace.errors import EngineError


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The outcome of a publish on one engine.

    error: why it did not take the version; None if it did. collateral: the engine is healthy, and another engine in its
    broadcast, or its host's sidecar, failed. pause_seconds: how long it generated nothing because of the update.
    """

    engine: str
    error: EngineError | None
    collateral: bool
    begin_seconds: float
    load_seconds: float
    attest_seconds: float
    commit_seconds: float
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class PublishReport:
    """The outcome of a publish.

    stage_seconds: copying into buckets and bringing these to the engines' hosts, most of it while the engines load.
    unstored: why this version, or the one before, is not kept. left_out: the engines that were out of rotation, and
    why; nothing was sent to them.
    """

    version: int
    nbytes: int
    seconds: float
    stage_seconds: float
    engines: tuple[EngineReport, ...]
    unstored: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def failed(self) -> dict[str, EngineError]:
        return {report.engine: report.error for report in self.engines if report.error is not None}
