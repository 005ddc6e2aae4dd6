"""Interfaces for people and other programs: metrics over HTTP, and the fleet as a table."""
