"""How weights travel from a trainer to the engines."""

from typing import TYPE_CHECKING

from millrace.lazy import exports

if TYPE_CHECKING:
    from millrace.weights.report import EngineReport, PublishReport
    from millrace.weights.sharded import LedTensors, ShardedTensors, follow, leading

__getattr__, __dir__ = exports(
    __name__,
    {
        "millrace.weights.report": ["EngineReport", "PublishReport"],
        "millrace.weights.sharded": ["LedTensors", "ShardedTensors", "follow", "leading"],
    },
)

__all__ = [
    "EngineReport",
    "LedTensors",
    "PublishReport",
    "ShardedTensors",
    "follow",
    "leading",
]
