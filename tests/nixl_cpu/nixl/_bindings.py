"""What the engines need of NIXL's bindings."""

from nixl_cu12._bindings import nixlBackendError, nixlCancelledError, nixlRemoteDisconnectError, nixlXferTelemetry

__all__ = ["nixlBackendError", "nixlCancelledError", "nixlRemoteDisconnectError", "nixlXferTelemetry"]
