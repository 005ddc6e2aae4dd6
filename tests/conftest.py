"""What many tests need: a small model on disk."""

from pathlib import Path

import pytest

from millrace.config.models import TinyModelConfig
from millrace.train.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Qwen3 from random weights, its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64), 0, folder)
    return folder
