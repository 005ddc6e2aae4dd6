"""The exceptions that Millrace raises. Each message says what failed, on which engine, and what to do."""

from collections.abc import Sequence


class MillraceError(Exception):
    """The base class of all exceptions that Millrace raises deliberately."""


class ConfigError(MillraceError):
    """A setting is unknown, of the wrong type, or contradicts another. The message names file, line and setting."""


class ArgumentError(MillraceError, ValueError):
    """An argument of a call has the wrong type or an invalid value. The message names it and says what to pass."""


class DataError(MillraceError):
    """A data file, a model folder or a tokenizer is missing or invalid."""


class CheckpointError(MillraceError):
    """A checkpoint could not be written or read. Earlier checkpoints are intact."""


class LaunchError(MillraceError):
    """A server did not start. The message ends with the last lines of the server's log."""


class EngineError(MillraceError):
    """The base class of errors that concern one engine. `engine` is its name."""

    def __init__(self, engine: str, message: str) -> None:
        super().__init__(f"engine {engine}: {message}")
        self.engine = engine


class EngineUnreachable(EngineError):
    """The connection failed, or it broke before the answer arrived.

    `sent` is True if the server may have received the request.
    """

    def __init__(self, engine: str, message: str, *, sent: bool) -> None:
        super().__init__(engine, message)
        self.sent = sent


class EngineTimeout(EngineError):
    """The deadline of the call passed."""


class EngineRefused(EngineError):
    """The server refused the request (HTTP 4xx), or Millrace refused it because it would crash the server."""


class LocalError(EngineError):
    """This process lacked something that the call needed: a file descriptor, memory, disk space, a port or DNS.

    The error says nothing about the engine, so the fleet neither suspects nor restarts it. `reason` is the message
    without the engine's name. `sent` is True if the server may have received the request.
    """

    def __init__(self, engine: str, message: str, *, sent: bool = False) -> None:
        super().__init__(engine, f"the call failed on this side: {message}")
        self.reason = message
        self.sent = sent


class EngineFailed(EngineError):
    """The server failed (HTTP 5xx), or its answer is invalid."""


class NonFiniteLogprobs(EngineError):
    """The engine generated tokens whose logprobs are NaN or infinite.

    The published weights cause this, not the engine: another engine with the same version gives the same result.
    """


class PublishError(MillraceError):
    """No engine accepted the weights, or the tensors are not those of the model. The old version keeps serving."""


class EnginesLost(PublishError):
    """The connection to every engine broke during a publish. `errors` has the error of each engine.

    The version can be published again when an engine is back.
    """

    def __init__(self, message: str, errors: Sequence[EngineUnreachable]) -> None:
        super().__init__(message)
        self.errors = errors


class WeightsChanged(PublishError):
    """The trainer's tensors have changed since they were published, so the version can't be published again."""


class NoEngineError(MillraceError):
    """No engine of the fleet can serve the request. The message gives the state of each engine."""

    @classmethod
    def closed(cls) -> "NoEngineError":
        """Return the error for calls after the fleet's `async with` block has ended."""
        return cls("the fleet is closed: its block has ended, and so have the engines that it started")


class RolloutError(MillraceError):
    """Every sample of a step failed, so the rollout can't continue. The message gives the reasons."""


class JudgeError(MillraceError):
    """A judge did not grade a sample. The message says why."""


class OwnerError(MillraceError):
    """A shared fleet can't be followed: no owner answers at its URL, or the owner refuses the key."""


class UserCodeError(MillraceError):
    """A reward or an environment of the user raised, hung, or returned an invalid value. The message names it."""


class MonitorError(MillraceError):
    """A fleet's metrics server (`metrics.port`) does not answer, another server answers at its URL, or the files of
    a run can't be read."""
