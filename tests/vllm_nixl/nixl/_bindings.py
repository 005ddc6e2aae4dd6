"""What vLLM needs of NIXL's bindings."""

from nixl_cu12._bindings import nixlXferTelemetry

__all__ = ["nixlXferTelemetry"]
