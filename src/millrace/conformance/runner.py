"""Makes the checks, one after another, and brings the engine back after one that went wrong."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from millrace.conformance.check import Check, CheckFailed, Lacking, Outcome, Result, Subject, expect
from millrace.conformance.requests import GENERATE_DEADLINE, ask, generate, until_idle
from millrace.conformance.weights import restore
from millrace.errors import EngineError, EngineTimeout, EngineUnreachable, MillraceError
from millrace.types import Health

CHECK_DEADLINE = 60.0  # seconds for one check; the slowest take ten on a loaded CPU
RECOVERY_DEADLINE = 60.0
# After Ctrl-C, while somebody waits: for the check to end by itself, and to bring the engine back where it does not.
ENDING_SECONDS = 5.0
LEAVING_DEADLINE = 30.0


class Runner:
    """Examines one engine. `lost` says in which check it stopped serving, and why; after that no check is made."""

    def __init__(self, subject: Subject, *, deadline: float = CHECK_DEADLINE) -> None:
        self.subject = subject
        self.lost: str | None = None
        self._lost_in = ""  # the check
        self._version = subject.info.weight_version  # before the check that is being made
        self._deadline = deadline
        self._examining: asyncio.Task[Result] | None = None

    async def run(self, checks: Sequence[Check]) -> AsyncIterator[Result]:
        """Whoever cancels this calls `leave`: until then the check that was being made goes on."""
        for check in checks:
            self._examining = asyncio.create_task(self.examine(check), name=check.name)
            yield await asyncio.shield(self._examining)

    async def leave(self, *, ending: float = ENDING_SECONDS) -> None:
        """After `run` was cancelled: the engine is as it was before the checks, or `lost` says why not.

        A check is cancelled only where it does not end by itself within `ending` seconds: nobody knows what became of a
        control call that was cancelled, and SGLang dies of memory that is taken back twice."""
        if self._examining is None or self.lost is not None:
            return
        await asyncio.wait([self._examining], timeout=ending)
        if not self._examining.done():
            self._examining.cancel()
            await asyncio.wait([self._examining], timeout=ending)
            await self._bring_back(self._examining.get_name(), LEAVING_DEADLINE)

    async def examine(self, check: Check) -> Result:
        """Makes one check. Never raises what is the engine's fault: that is in the result."""
        begun = time.monotonic()

        def result(outcome: Outcome, reason: str = "") -> Result:
            return Result(check.name, outcome, reason, time.monotonic() - begun)

        if self.lost is not None:
            reason = f"not made: the server did not serve after {self._lost_in}"
            return Result(check.name, Outcome.LACKING, reason, 0.0, skipped=True)
        if lacking := sorted(check.needs - self.subject.info.capabilities):
            return result(Outcome.LACKING, f"without {', '.join(lacking)}")
        try:
            async with asyncio.timeout(self._deadline):
                self._version = (await self.subject.engine.info()).weight_version
                await check.examine(self.subject)
                await self._require_serving()
            return result(Outcome.PASSED)
        except Lacking as error:
            outcome, reason = Outcome.LACKING, str(error)
        except (CheckFailed, MillraceError) as error:
            outcome, reason = Outcome.FAILED, str(error)
        except TimeoutError:
            outcome, reason = Outcome.FAILED, f"it was not done within {self._deadline:g} s"
        ended = result(outcome, reason)
        await self._bring_back(check.name, RECOVERY_DEADLINE)
        return ended

    async def _require_serving(self) -> None:
        """A check that passed has left the engine as it was."""
        state = await self.subject.engine.health()
        expect(state is Health.READY, f"the check left it {state}")
        await generate(self.subject, ask(self.subject, "serving", tokens=1))

    async def _bring_back(self, check: str, deadline: float) -> None:
        """Undoes what the check may have left; notes where that fails that the engine is lost."""
        engine = self.subject.engine
        try:
            async with asyncio.timeout(deadline):
                with suppress(EngineError):
                    await engine.rollback()
                await engine.wake()
                await self._restore()
                await engine.resume()
                await engine.abort()
                await until_idle(self.subject)
                await engine.generate(ask(self.subject, "back", tokens=1), deadline=GENERATE_DEADLINE)
        except (CheckFailed, MillraceError) as error:
            reason = str(error)
        except TimeoutError:
            reason = f"it did not come back within {deadline:g} s"
        else:
            return
        self._lost_in = check
        self.lost = f"after check {check} {await self._state()}, and no more checks were made: {reason}"

    async def _restore(self) -> None:
        """Brings the folder's weights back. Where that is not possible, the check could not change them either, or the
        version tells."""
        try:
            await restore(self.subject)
        except Lacking:
            pass
        except EngineError:
            if (await self.subject.engine.info()).weight_version != self._version:
                raise

    async def _state(self) -> str:
        """What became of a server that does not serve."""
        try:
            await self.subject.engine.info()
        except EngineUnreachable:
            return "the server was dead"
        except EngineTimeout:
            return "the server answered nothing"
        except EngineError:
            pass  # which is an answer
        return "the server answered, and did not serve"
