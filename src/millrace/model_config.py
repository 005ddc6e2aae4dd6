"""What a model's config.json says, read as transformers reads it.

transformers leaves out values that equal a class's default, and puts the config of a language model into that of a
larger model (`text_config`). Values that the file has are read without transformers. For values that it leaves out,
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
    """The content of config.json. Raises DataError where it can't be read."""
    path = folder / "config.json"
    try:
        config = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is no model's config: it holds {type(config).__name__}, not an object")
    return config


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model: `text_config` where there is one, otherwise all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def vocab_size(folder: Path) -> int:
    """The size of the language model's vocabulary. Raises DataError where neither the file nor transformers knows it,
    and where the folder has no config that can be read."""
    size = text_part(read_config(folder)).get("vocab_size")
    size = size if size is not None else _by_transformers(folder, "vocab_size")
    if not isinstance(size, int):
        raise DataError(f"{folder / 'config.json'} describes no language model: its vocab_size is {size}")
    return size


def head_dim(folder: Path) -> int | None:
    """Elements of one attention head; None where nothing tells. Raises DataError where the folder has no config that
    can be read."""
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


def folder_dtype(folder: Path) -> str | None:
    """The dtype that the model is meant to compute in (torch's name, as in `bfloat16`): what the config names or, where
    it names none, what most of the folder's weights are stored in. None where neither tells. Raises DataError where the
    folder has no config that can be read."""
    config = read_config(folder)
    for part in (config, text_part(config)):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key)).removeprefix("torch.")
            if name in COMPUTE_DTYPES:
                return name
    prevalent = _prevalent(folder)
    return prevalent if prevalent in COMPUTE_DTYPES else None


def unusual_dtypes(folder: Path) -> dict[str, str]:
    """The dtypes (torch's names) of those floating tensors that the folder stores in another than most of its weights,
    such as a router's bias in float32. Quantised and integer tensors are not among them."""
    prevalent, stored = _prevalent(folder), _stored_floats(folder)
    return {name: dtype for name, (dtype, _) in stored.items() if dtype != prevalent}


def compute_dtype(setting: str, folder: Path) -> str:
    """The dtype to start an engine with: the setting, or for `auto` the folder's. `auto` where that is unknown."""
    return setting if setting != "auto" else folder_dtype(folder) or "auto"


def _prevalent(folder: Path) -> str | None:
    elements: Counter[str] = Counter()
    for dtype, size in _stored_floats(folder).values():
        elements[dtype] += size
    return elements.most_common(1)[0][0] if elements else None


def _stored_floats(folder: Path) -> dict[str, tuple[str, int]]:
    """Of each floating tensor: torch's name of its dtype, and how many elements it has."""
    if not has_weights(folder):
        return {}
    stored = stored_tensors(folder).items()
    return {name: (tensor.float_dtype, prod(tensor.shape)) for name, tensor in stored if tensor.float_dtype is not None}


def _by_transformers(folder: Path, name: str) -> object:
    """The attribute of the language model's config, with its class's defaults. None where the class has none. Raises
    DataError where transformers is not installed, or can't read this config."""
    path = folder / "config.json"
    try:
        from huggingface_hub.errors import StrictDataclassError  # from here on seconds: it imports torch
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path} leaves {name} to its class's default, which transformers knows; pip install 'millrace[train]', "
            f"or write {name} into the file"
        ) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return getattr(config.get_text_config(), name, None)
    except (  # RuntimeError: what layers have each for themselves, the whole config does not tell
        ImportError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StrictDataclassError,
    ) as error:  # fmt: skip
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path} says no {name}, and transformers can't read it ({reason}); write {name} into the file"
        ) from error
