"""The command line. It only handles arguments and output."""

from millrace.cli.main import app, main

__all__ = ["app", "main"]
