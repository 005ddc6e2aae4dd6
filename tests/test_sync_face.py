"""The blocking face is what its generator makes of the async classes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_generated_file_is_up_to_date() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "tools/generate_sync.py", "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
