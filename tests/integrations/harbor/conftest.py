"""These tests need an environment of their own, with Harbor: `make test-harbor`."""

from tests.integrations.harbor import PYTHON

collect_ignore = [] if PYTHON.exists() else ["test_harbor.py"]
