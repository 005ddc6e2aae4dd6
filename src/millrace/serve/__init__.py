"""Interfaces for people and other programs: metrics and token routes over HTTP, and the fleet as a table."""

from typing import TYPE_CHECKING

from millrace.lazy import exports

if TYPE_CHECKING:
    from millrace.serve.server import serve_metrics
    from millrace.serve.token_routes import serve_tokens
    from millrace.serve.view import EngineView, FleetView, Observer, TrainingView

__getattr__, __dir__ = exports(
    __name__,
    {
        "millrace.serve.server": ["serve_metrics"],
        "millrace.serve.token_routes": ["serve_tokens"],
        "millrace.serve.view": ["EngineView", "FleetView", "Observer", "TrainingView"],
    },
)

__all__ = [
    "EngineView",
    "FleetView",
    "Observer",
    "TrainingView",
    "serve_metrics",
    "serve_tokens",
]
