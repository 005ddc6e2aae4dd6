"""How weights travel from a trainer to the engines."""

from typing import TYPE_CHECKING

from millrace.lazy import exports

if TYPE_CHECKING:
    from millrace.engines.audit import HeldLayer
    from millrace.quantisation import LayerForm, Quantisation
    from millrace.weights.audit import EngineAudit
    from millrace.weights.report import EngineReport, PublishReport
    from millrace.weights.sharded import LedTensors, ShardedTensors, follow, leading

__getattr__, __dir__ = exports(
    __name__,
    {
        "millrace.engines.audit": ["HeldLayer"],
        "millrace.quantisation": ["LayerForm", "Quantisation"],
        "millrace.weights.audit": ["EngineAudit"],
        "millrace.weights.report": ["EngineReport", "PublishReport"],
        "millrace.weights.sharded": ["LedTensors", "ShardedTensors", "follow", "leading"],
    },
)

__all__ = [
    "EngineAudit",
    "EngineReport",
    "HeldLayer",
    "LayerForm",
    "LedTensors",
    "PublishReport",
    "Quantisation",
    "ShardedTensors",
    "follow",
    "leading",
]
