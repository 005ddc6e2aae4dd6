"""What can go wrong, as one small tree. A message says what failed, on which engine, and what to do."""

from collections.abc import Sequence


class MillraceError(Exception):
    """The root: whoever catches this catches all that Millrace raises on purpose."""


class ConfigError(MillraceError):
    """A setting is unknown, of the wrong type, or contradicts another. The message names file, line and setting."""


class ArgumentError(MillraceError, ValueError):
    """An argument of a call has the wrong type or makes no sense. The message names it and says what to pass."""


class DataError(MillraceError):
    """A data file, a model folder or a tokenizer is missing or is not what it should be."""


class CheckpointError(MillraceError):
    """A checkpoint could not be written or read. The one before it is whole."""


class LaunchError(MillraceError):
    """A server did not come up. The message ends with the last lines of its own log."""


class EngineError(MillraceError):
    """Something about one engine. `engine` is its name."""

    def __init__(self, engine: str, message: str) -> None:
        super().__init__(f"engine {engine}: {message}")
        self.engine = engine


class EngineUnreachable(EngineError):
    """No connection, or it broke before an answer came. `sent` tells whether the server may have seen the request."""

    def __init__(self, engine: str, message: str, *, sent: bool) -> None:
        super().__init__(engine, message)
        self.sent = sent


class EngineTimeout(EngineError):
    """The deadline of the call passed."""


class EngineRefused(EngineError):
    """The server answered that it will not (HTTP 4xx), or Millrace refused for it what would have crashed it."""


class LocalError(EngineError):
    """This process lacked something that the call needed: a file descriptor, memory, disk space, a port, an answer of
    the name service. The error says nothing about the engine, which is neither suspected nor restarted. `sent` is
    whether the server may have seen the request."""

    def __init__(self, engine: str, message: str, *, sent: bool = False) -> None:
        super().__init__(engine, f"the call failed on this side: {message}")
        self.reason = message
        self.sent = sent


class EngineFailed(EngineError):
    """The server answered that it broke (HTTP 5xx), or answered what makes no sense."""


class NonFiniteLogprobs(EngineError):
    """The engine generated tokens whose logprobs are NaN or infinite. The reason is in the weights that the trainer
    published. The engine is sound, and another engine with the same version answers the same."""


class PublishError(MillraceError):
    """No engine took the weights, or the tensors are not those of the model. The old version goes on serving."""


class EnginesLost(PublishError):
    """Every engine that was published to broke off, as `errors` say. The version can be published again when an engine
    is back."""

    def __init__(self, message: str, errors: Sequence[EngineUnreachable]) -> None:
        super().__init__(message)
        self.errors = errors


class WeightsChanged(PublishError):
    """The trainer's tensors are no longer those of the version that they were published as."""


class NoEngineError(MillraceError):
    """No engine of the fleet can serve the request. The message says how each of them stands."""

    @classmethod
    def closed(cls) -> "NoEngineError":
        """For a fleet whose block has ended."""
        return cls("the fleet is closed: its block has ended, and so have the engines that it started")


class RolloutError(MillraceError):
    """A rollout can't go on: every sample of a step failed, with the reasons."""


class JudgeError(MillraceError):
    """A judge did not grade a sample. The message says why."""


class MonitorError(MillraceError):
    """A fleet's metrics server (`metrics.port`) does not answer, or something else answers there."""
