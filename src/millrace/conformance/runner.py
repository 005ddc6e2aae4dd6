"""Runs the checks one after another, and restores the engine after a check that did not pass."""

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
# Seconds after Ctrl-C until the running check must end by itself, and until the engine must be restored otherwise.
ENDING_SECONDS = 5.0
LEAVING_DEADLINE = 30.0


class Runner:
    """Runs checks on one engine.

        runner = Runner(await attach("http://127.0.0.1:30000", folder=None, other=None))
        async for result in runner.run(select("pause.*")):
            print(result.check, result.outcome, result.reason)

    `lost` is None, or says after which check the engine stopped serving, and why. No check is run after that.
    """

    def __init__(self, subject: Subject, *, deadline: float = CHECK_DEADLINE) -> None:
        self.subject = subject
        self.lost: str | None = None
        self._lost_in = ""  # the name of the check after which the engine was lost
        self._version = subject.info.weight_version  # before the running check
        self._deadline = deadline
        self._examining: asyncio.Task[Result] | None = None

    async def run(self, checks: Sequence[Check]) -> AsyncIterator[Result]:
        """Run the checks and yield their results.

        If it is cancelled, the running check continues. The caller must then call `leave`.
        """
        for check in checks:
            self._examining = asyncio.create_task(self.examine(check), name=check.name)
            yield await asyncio.shield(self._examining)

    async def leave(self, *, ending: float = ENDING_SECONDS) -> None:
        """Restore the engine after `run` was cancelled. If that fails, `lost` says why.

        The running check is cancelled only if it does not end by itself within `ending` seconds. The effect of a
        cancelled control call is unknown, and SGLang crashes if its memory is resumed twice.
        """
        if self._examining is None or self.lost is not None:
            return
        await asyncio.wait([self._examining], timeout=ending)
        if not self._examining.done():
            self._examining.cancel()
            await asyncio.wait([self._examining], timeout=ending)
            await self._recover(self._examining.get_name(), LEAVING_DEADLINE)

    async def examine(self, check: Check) -> Result:
        """Run one check and return its result. Errors of the engine are part of the result, and are never raised."""
        begun = time.monotonic()

        def result(outcome: Outcome, reason: str = "") -> Result:
            return Result(check.name, outcome, reason, time.monotonic() - begun)

        if self.lost is not None:
            reason = f"not run: the server did not serve after {self._lost_in}"
            return Result(check.name, Outcome.LACKING, reason, 0.0, skipped=True)
        if lacking := sorted(check.needs - self.subject.info.capabilities):
            return result(Outcome.LACKING, f"the engine lacks {', '.join(lacking)}")
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
            outcome, reason = Outcome.FAILED, f"the check did not end within {self._deadline:g} s"
        ended = result(outcome, reason)
        await self._recover(check.name, RECOVERY_DEADLINE)
        return ended

    async def _require_serving(self) -> None:
        """Raise CheckFailed unless the engine serves after a check that passed."""
        state = await self.subject.engine.health()
        expect(state is Health.READY, f"the engine is {state} after the check")
        await generate(self.subject, ask(self.subject, "serving", tokens=1))

    async def _recover(self, check: str, deadline: float) -> None:
        """Undo what the check may have changed. If that fails, set `lost`."""
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
            reason = f"it did not recover within {deadline:g} s"
        else:
            return
        self._lost_in = check
        self.lost = f"after check {check} {await self._state()}, and no more checks were run: {reason}"

    async def _restore(self) -> None:
        """Load the folder's weights again.

        If the engine can't load weights, the check could not change them either. If the load fails, the error is raised
        only if the version shows that the weights changed.
        """
        try:
            await restore(self.subject)
        except Lacking:
            pass
        except EngineError:
            if (await self.subject.engine.info()).weight_version != self._version:
                raise

    async def _state(self) -> str:
        """Describe the state of a server that does not serve."""
        try:
            await self.subject.engine.info()
        except EngineUnreachable:
            return "the server was dead"
        except EngineTimeout:
            return "the server did not answer"
        except EngineError:
            pass  # an error is an answer, too
        return "the server answered but did not serve"
