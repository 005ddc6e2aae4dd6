"""Millrace: rollouts for reinforcement-learning trainers, served by stock inference engines over HTTP."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from millrace.config.engines import EmbeddedEngineConfig, SGLangEngineConfig, VLLMEngineConfig
    from millrace.fleet.fleet import Fleet
    from millrace.fleet.follower import Follower, follow_fleet
    from millrace.fleet.local import open_fleet
    from millrace.fleet.many import Completion
    from millrace.types import GenerateRequest, Generation, LoraConfig, RoutingContext, SamplingParams, VersionSpan

__version__ = "0.1.0"

# The module of each public name. It is imported on first use, so `import millrace` takes a few milliseconds.
_MODULES = {
    "Completion": "millrace.fleet.many",
    "LoraConfig": "millrace.types",
    "EmbeddedEngineConfig": "millrace.config.engines",
    "Fleet": "millrace.fleet.fleet",
    "Follower": "millrace.fleet.follower",
    "GenerateRequest": "millrace.types",
    "Generation": "millrace.types",
    "RoutingContext": "millrace.types",
    "SGLangEngineConfig": "millrace.config.engines",
    "SamplingParams": "millrace.types",
    "VersionSpan": "millrace.types",
    "VLLMEngineConfig": "millrace.config.engines",
    "follow_fleet": "millrace.fleet.follower",
    "open_fleet": "millrace.fleet.local",
}

__all__ = [
    "Completion",
    "EmbeddedEngineConfig",
    "Fleet",
    "Follower",
    "GenerateRequest",
    "Generation",
    "LoraConfig",
    "RoutingContext",
    "SGLangEngineConfig",
    "SamplingParams",
    "VLLMEngineConfig",
    "VersionSpan",
    "__version__",
    "follow_fleet",
    "open_fleet",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'millrace' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
