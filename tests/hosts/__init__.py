"""Tests with several hosts. Each is a network namespace with an address, processes and files in memory of its own."""
