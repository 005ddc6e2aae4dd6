"""One engine's part in a publish: how far it is, and what went wrong."""

from dataclasses import dataclass, field

from millrace.engines.base import Engine
from millrace.errors import EngineError
from millrace.types import Capability
from millrace.weights.audit import EngineAudit
from millrace.weights.report import EngineReport
from millrace.weights.step import StepResult
from millrace.weights.transports.base import PublishTarget


@dataclass(slots=True)
class Update:
    """One engine's transaction.

    begun: it is open, or may be. emptied: the engine is healthy, and has no weights. blameless: `error` is another
    engine's fault. collateral: as in `EngineReport`. paused_at, loading_since: when the engine stopped generating, and
    when the first load began, by `time.monotonic()`. legs: the seconds of each step.
    """

    target: PublishTarget
    error: EngineError | None = None
    begun: bool = False
    committed: bool = False
    emptied: bool = False
    blameless: bool = False
    collateral: bool = False
    paused_at: float | None = None
    loading_since: float | None = None
    legs: dict[str, float] = field(default_factory=dict)
    audit: EngineAudit | None = None

    @property
    def engine(self) -> Engine:
        return self.target.engine

    @property
    def layout(self) -> tuple[str, str, int, bool]:
        """A key that is equal for engines that lay out their tensors and make their own checksums in the same way."""
        info = self.target.info
        return info.kind, info.engine_version, info.ranks, self.target.can(Capability.SAMPLED_CHECKSUMS)

    def take(self, leg: str, result: StepResult) -> None:
        """Take over the result of a step. The first error stays: two buckets may be loaded at the same time."""
        self.legs[leg] = self.legs.get(leg, 0.0) + result.seconds
        if self.error is None:
            self.error, self.blameless = result.error, result.blameless

    def report(self) -> EngineReport:
        return EngineReport(
            engine=self.engine.name,
            error=self.error,
            collateral=self.collateral,
            begin_seconds=self.legs.get("begin", 0.0),
            load_seconds=self.legs.get("load", 0.0),
            attest_seconds=self.legs.get("attest", 0.0),
            commit_seconds=self.legs.get("commit", 0.0),
            pause_seconds=self.legs.get("pause", 0.0),
            audit=self.audit,
        )
