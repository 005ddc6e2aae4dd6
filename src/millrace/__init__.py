"""Millrace: rollouts for reinforcement-learning trainers, served by stock inference engines over HTTP."""

__version__ = "0.1.0"
