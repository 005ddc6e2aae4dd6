"""The conformance suite: checks of the contract in `millrace.engines.base`, for any engine, on a real server."""

from millrace.conformance.check import Check, Outcome, Result, Subject
from millrace.conformance.runner import Runner
from millrace.conformance.suite import CHECKS, select

__all__ = ["CHECKS", "Check", "Outcome", "Result", "Runner", "Subject", "select"]
