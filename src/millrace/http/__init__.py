"""The async HTTP client for engines, routers and sidecars."""

from millrace.http.client import HttpClient

__all__ = ["HttpClient"]
