"""Starts, watches and ends server processes."""
