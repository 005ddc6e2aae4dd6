"""torchvision for an environment that has none."""

import subprocess
from pathlib import Path

# The operators are never called here. A CUDA build of torchvision can't load its own with a CPU build of torch.
OPERATORS = """
import torch

if not hasattr(torch.ops.torchvision, "nms"):
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def install_torchvision(python: Path, folder: Path) -> Path:
    """Installs torchvision into a folder, for the PYTHONPATH of this interpreter. Returns the folder. Processors of
    images need its transforms only."""
    options = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([python, "-m", "pip", "install", *options, "torchvision==0.28.0"], check=True)
    module = folder / "torchvision" / "_meta_registrations.py"
    module.write_text(OPERATORS + module.read_text())
    return folder
