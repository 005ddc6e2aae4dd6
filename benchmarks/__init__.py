"""Benchmarks that are run by hand. README.md has their commands and results."""
