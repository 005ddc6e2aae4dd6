"""These tests need environments of their own, with OpenEnv and verifiers: `make test-environments`."""

from importlib.util import find_spec

from tests.integrations.environments.openenv_server import PYTHON

collect_ignore_glob = ([] if PYTHON.exists() else ["test_openenv.py"]) + (
    [] if find_spec("verifiers") else ["test_verifiers*.py", "test_renderers*.py"]
)
