"""Adapters for other libraries: trainers that generate on a Millrace fleet, and tasks that agents play.

The trainers and verifiers need the extra of the same name, and Harbor its own package.
"""
