"""Values of a model's config.json, read as transformers reads them.

transformers leaves out values that equal the default of the config's class, and nests the config of a language model in
that of a larger model (`text_config`). Values that are in the file are read without transformers. For the others
transformers is imported, if it is installed.
"""

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import orjson

from millrace.errors import DataError
from millrace.model_folder import has_weights, stored_tensors

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def read_config(folder: Path) -> Mapping[str, Any]:
    """Return the content of config.json. Raises DataError if it can't be read."""
    return _read(folder / "config.json")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a model's config: it holds {type(config).__name__}, not an object")
    return config


def read_quantization(folder: Path) -> Mapping[str, Any] | None:
    """Return the `quantization_config` of a folder whose weights are quantised, or what ModelOpt has written to a file
    of its own; None for others, and if the folder is not on this host. Raises DataError if its config can't be read."""
    if not (folder / "config.json").is_file():
        return None
    found = read_config(folder).get("quantization_config")
    if isinstance(found, dict):
        return found
    path = folder / "hf_quant_config.json"
    return {**_read(path), "quant_method": "modelopt"} if path.is_file() else None


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part that describes the language model: `text_config` if there is one, otherwise the whole config."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def vocab_size(folder: Path) -> int:
    """Return the vocabulary size of the language model.

    Raises DataError if the config can't be read, or if neither the file nor transformers gives the size.
    """
    return _number(folder, "vocab_size", "language model")


def image_token(folder: Path) -> int | None:
    """Return the token that stands for an image in a prompt; None for a model of text.

    Raises DataError if the config can't be read, or describes a vision tower and neither the file nor transformers
    gives the token.
    """
    config = read_config(folder)
    if "vision_config" not in config:
        return None
    token = config.get("image_token_id", config.get("image_token_index"))
    token = token if token is not None else _by_transformers(folder, "image_token_id", of_text=False)
    return token if isinstance(token, int) else None


def head_dim(folder: Path) -> int | None:
    """Return the number of elements of one attention head; None if it is unknown.

    Raises DataError if the config can't be read.
    """
    text = text_part(read_config(folder))

    def value(name: str) -> object:
        if text.get(name) is not None:
            return text[name]
        try:
            return _by_transformers(folder, name)
        except DataError:
            return None

    size = value("head_dim")
    if isinstance(size, int):
        return size
    hidden, heads = value("hidden_size"), value("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def context_length(folder: Path) -> int | None:
    """Return the longest sequence of the model in tokens; None if its config does not say.

    Raises DataError if the config can't be read.
    """
    length = text_part(read_config(folder)).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def decoder_layers(folder: Path) -> int:
    """Return the number of decoder layers of the language model.

    Raises DataError if the config can't be read, or if neither the file nor transformers gives the number.
    """
    return _number(folder, "num_hidden_layers", "decoder")


def _number(folder: Path, name: str, what: str) -> int:
    """Return a number of the language model. Raises DataError if neither the file nor transformers has it."""
    number = text_part(read_config(folder)).get(name)
    number = number if number is not None else _by_transformers(folder, name)
    if not isinstance(number, int):
        raise DataError(f"{folder / 'config.json'} describes no {what}: its {name} is {number}")
    return number


def folder_dtype(folder: Path) -> str | None:
    """Return torch's name of the dtype that the model should compute in, as in `bfloat16`.

    This is the dtype in the config, or else the dtype of most of the folder's weights; None if neither is known. Raises
    DataError if the config can't be read.
    """
    config = read_config(folder)
    for part in (config, text_part(config)):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key)).removeprefix("torch.")
            if name in COMPUTE_DTYPES:
                return name
    prevalent = _prevalent(folder)
    return prevalent if prevalent in COMPUTE_DTYPES else None


def unusual_dtypes(folder: Path) -> dict[str, str]:
    """Return torch's names of the dtypes of floating-point tensors that differ from most of the weights, by name.

    An example is a router's bias in float32. Quantised and integer tensors are left out.
    """
    prevalent, stored = _prevalent(folder), _stored_floats(folder)
    return {name: dtype for name, (dtype, _) in stored.items() if dtype != prevalent}


def compute_dtype(setting: str, folder: Path) -> str:
    """Return the dtype to start an engine with: the setting, or for `auto` the folder's, or `auto` if it is unknown."""
    return setting if setting != "auto" else folder_dtype(folder) or "auto"


def _prevalent(folder: Path) -> str | None:
    elements: Counter[str] = Counter()
    for dtype, size in _stored_floats(folder).values():
        elements[dtype] += size
    return elements.most_common(1)[0][0] if elements else None


def _stored_floats(folder: Path) -> dict[str, tuple[str, int]]:
    """Return torch's dtype name and the number of elements of each floating-point tensor, by name."""
    if not has_weights(folder):
        return {}
    stored = stored_tensors(folder).items()
    return {name: (tensor.float_dtype, prod(tensor.shape)) for name, tensor in stored if tensor.float_dtype is not None}


def _by_transformers(folder: Path, name: str, *, of_text: bool = True) -> object:
    """Return an attribute of a config with its class's defaults; None if the class lacks it.

    of_text: of the language model's config; otherwise of the whole model's.

    Raises DataError if transformers is not installed, or can't read the config.
    """
    path = folder / "config.json"
    try:
        from huggingface_hub.errors import StrictDataclassError  # takes seconds, because it imports torch
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path} has no {name}, and its default comes from transformers, which is not installed; pip install "
            f"'millrace[train]', or write {name} into the file"
        ) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return getattr(config.get_text_config() if of_text else config, name, None)
    except (  # RuntimeError: the config of a whole model has no value for what differs between its layers
        ImportError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StrictDataclassError,
    ) as error:  # fmt: skip
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path} has no {name}, and transformers can't read it ({reason}); write {name} into the file"
        ) from error
