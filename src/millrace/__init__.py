"""Millrace: rollouts for reinforcement-learning trainers, served by stock inference engines over HTTP."""

from typing import TYPE_CHECKING

from millrace.lazy import exports

if TYPE_CHECKING:
    from millrace.config.engines import EmbeddedEngineConfig, ReplicaRange, SGLangEngineConfig, VLLMEngineConfig
    from millrace.config.models import JudgeConfig
    from millrace.config.routers import SGLangRouterConfig, VLLMRouterConfig
    from millrace.config.sources import TinyModelConfig
    from millrace.engines.base import Engine
    from millrace.errors import (
        ArgumentError,
        CheckpointError,
        ConfigError,
        DataError,
        EngineError,
        EngineFailed,
        EngineRefused,
        EnginesLost,
        EngineTimeout,
        EngineUnreachable,
        JudgeError,
        LaunchError,
        LocalError,
        MillraceError,
        MonitorError,
        NoEngineError,
        NonFiniteLogprobs,
        OwnerError,
        PublishError,
        RolloutError,
        UserCodeError,
        WeightsChanged,
    )
    from millrace.fleet.autoscaler import FleetSize
    from millrace.fleet.client import FleetClient
    from millrace.fleet.event_log import EventLog
    from millrace.fleet.fleet import Fleet
    from millrace.fleet.follower import Follower, follow_fleet
    from millrace.fleet.local import open_fleet
    from millrace.fleet.many import Completion
    from millrace.fleet.owner import SharedFleet
    from millrace.fleet.replica_state import Phase, ReplicaState, Snapshot
    from millrace.types import (
        Capability,
        EngineInfo,
        EngineLoad,
        FinishReason,
        GenerateRequest,
        Generation,
        Health,
        LoraConfig,
        MemoryTag,
        PauseMode,
        RoutingContext,
        SamplingParams,
        VersionSpan,
    )
    from millrace.weights.report import EngineReport, PublishReport

__version__ = "0.2.0"

__getattr__, __dir__ = exports(
    __name__,
    {
        "millrace.config.engines": ["EmbeddedEngineConfig", "ReplicaRange", "SGLangEngineConfig", "VLLMEngineConfig"],
        "millrace.config.models": ["JudgeConfig"],
        "millrace.config.routers": ["SGLangRouterConfig", "VLLMRouterConfig"],
        "millrace.config.sources": ["TinyModelConfig"],
        "millrace.engines.base": ["Engine"],
        "millrace.errors": [
            "ArgumentError",
            "CheckpointError",
            "ConfigError",
            "DataError",
            "EngineError",
            "EngineFailed",
            "EngineRefused",
            "EngineTimeout",
            "EngineUnreachable",
            "EnginesLost",
            "JudgeError",
            "LaunchError",
            "LocalError",
            "MillraceError",
            "MonitorError",
            "NoEngineError",
            "NonFiniteLogprobs",
            "OwnerError",
            "PublishError",
            "RolloutError",
            "UserCodeError",
            "WeightsChanged",
        ],
        "millrace.fleet.autoscaler": ["FleetSize"],
        "millrace.fleet.client": ["FleetClient"],
        "millrace.fleet.event_log": ["EventLog"],
        "millrace.fleet.fleet": ["Fleet"],
        "millrace.fleet.follower": ["Follower", "follow_fleet"],
        "millrace.fleet.local": ["open_fleet"],
        "millrace.fleet.many": ["Completion"],
        "millrace.fleet.owner": ["SharedFleet"],
        "millrace.fleet.replica_state": ["Phase", "ReplicaState", "Snapshot"],
        "millrace.types": [
            "Capability",
            "EngineInfo",
            "EngineLoad",
            "FinishReason",
            "GenerateRequest",
            "Generation",
            "Health",
            "LoraConfig",
            "MemoryTag",
            "PauseMode",
            "RoutingContext",
            "SamplingParams",
            "VersionSpan",
        ],
        "millrace.weights.report": ["EngineReport", "PublishReport"],
    },
)

__all__ = [
    "ArgumentError",
    "Capability",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DataError",
    "EmbeddedEngineConfig",
    "Engine",
    "EngineError",
    "EngineFailed",
    "EngineInfo",
    "EngineLoad",
    "EngineRefused",
    "EngineReport",
    "EngineTimeout",
    "EngineUnreachable",
    "EnginesLost",
    "EventLog",
    "FinishReason",
    "Fleet",
    "FleetClient",
    "FleetSize",
    "Follower",
    "GenerateRequest",
    "Generation",
    "Health",
    "JudgeConfig",
    "JudgeError",
    "LaunchError",
    "LocalError",
    "LoraConfig",
    "MemoryTag",
    "MillraceError",
    "MonitorError",
    "NoEngineError",
    "NonFiniteLogprobs",
    "OwnerError",
    "PauseMode",
    "Phase",
    "PublishError",
    "PublishReport",
    "ReplicaRange",
    "ReplicaState",
    "RolloutError",
    "RoutingContext",
    "SGLangEngineConfig",
    "SGLangRouterConfig",
    "SamplingParams",
    "SharedFleet",
    "Snapshot",
    "TinyModelConfig",
    "UserCodeError",
    "VLLMEngineConfig",
    "VLLMRouterConfig",
    "VersionSpan",
    "WeightsChanged",
    "__version__",
    "follow_fleet",
    "open_fleet",
]
