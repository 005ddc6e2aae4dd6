"""How Millrace speaks HTTP: one async client for every engine."""

from millrace.http.client import HttpClient

__all__ = ["HttpClient"]
