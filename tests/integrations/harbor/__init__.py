"""Trials of Harbor."""

import os
from pathlib import Path

PYTHON = Path(os.environ.get("HARBOR_PYTHON", ".venv-harbor/bin/python"))  # as `make test-harbor` sets it
