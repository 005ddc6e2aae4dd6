"""The command line: argument handling and nothing else."""

from millrace.cli.main import app, main

__all__ = ["app", "main"]
