"""What a config starts from: the folder of its model, and the fleet of its engines.

A model's folder is a local one, a download from the Hub, or one that the run creates.
"""

import re
import shutil
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from huggingface_hub import snapshot_download

from millrace.config.models import RunConfig
from millrace.config.serve import ServeConfig
from millrace.config.sources import ModelConfig, PretrainedModelConfig, TinyModelConfig
from millrace.errors import DataError
from millrace.fleet.event_log import EventLog
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.train.tiny import make_tiny_model

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(model: ModelConfig, created: Path, *, seed: int, fresh: bool, setting: str) -> Path:
    """Return the folder that engines start from.

    created: the folder of a model that the run creates. fresh: whether to create it again, as a new run must: a failed
    start may have left an incomplete model, or one with other settings. Raises DataError, which names `setting`, if
    there is no such model.
    """
    match model:
        case PretrainedModelConfig(path=path):
            folder_or_download = Path(path)
            if not folder_or_download.exists() and HUB_NAME.fullmatch(path):
                folder_or_download = _download(path, setting)
            if not (folder_or_download / "config.json").is_file():
                raise DataError(f"{setting}: {path} is no model's folder, it has no config.json")
            return folder_or_download
        case TinyModelConfig():
            if fresh and created.exists():
                shutil.rmtree(created)
            if not created.exists():
                make_tiny_model(model, seed, created)
            return created


def configured_fleet(
    config: RunConfig | ServeConfig, model: Path, *, log_dir: Path, event_log: EventLog
) -> AbstractAsyncContextManager[Fleet]:
    """Return the fleet of a config's engines, as `open_fleet` does. model: the folder of their starting model."""
    return open_fleet(
        config.engine,
        model,
        log_dir=log_dir,
        seed=config.seed,
        transport=config.publish.transport,
        folder=config.publish.folder,
        keep=config.publish.keep,
        sidecars=config.publish.sidecars,
        restarts=config.restarts,
        event_log=event_log,
        router=config.router,
    )


def _download(name: str, setting: str) -> Path:
    """Return the folder of a model of the Hugging Face Hub, which is downloaded if it is not in the local cache."""
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are subclasses of these
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{setting}: {name} is not a local folder, and can't be downloaded from the Hub: {reason}"
        ) from error
