"""Benchmarks that need a GPU. Each takes the engine's settings as JSON, so that it can be tried on the CPU."""
