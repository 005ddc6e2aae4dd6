"""These tests run in an environment of their own, which has verl: `make test-verl`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("verl") else ["test_*.py"]
