"""The folder of a model: there already, on the Hub, or made by the run."""

import re
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from millrace.config.models import ModelConfig, PretrainedModelConfig, TinyModelConfig
from millrace.errors import DataError
from millrace.train.tiny import make_tiny_model

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(model: ModelConfig, made: Path, *, seed: int, anew: bool, setting: str) -> Path:
    """The folder that engines start from. A model that the run makes lies in `made`, and is made `anew` where the run
    begins: a start that failed may have left half of one, or one by other settings. Raises DataError, which names the
    `setting`, where there is no such model."""
    match model:
        case PretrainedModelConfig(path=path):
            folder_or_download = Path(path)
            if not folder_or_download.exists() and HUB_NAME.fullmatch(path):
                folder_or_download = _download(path, setting)
            if not (folder_or_download / "config.json").is_file():
                raise DataError(f"{setting}: {path} is no model's folder, it has no config.json")
            return folder_or_download
        case TinyModelConfig():
            if anew and made.exists():
                shutil.rmtree(made)
            if not made.exists():
                make_tiny_model(model, seed, made)
            return made


def _download(name: str, setting: str) -> Path:
    """A model of the Hugging Face Hub, from the local cache where it is there already."""
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:  # the Hub's own errors are kinds of these
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{setting}: {name} is no folder here and can't be had from the Hub: {reason}") from error
