"""Configs are read as transformers reads them. A value that a file leaves out has the default of its class."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from millrace.engines.stock.model import read_model
from millrace.errors import DataError
from millrace.model_config import compute_dtype, folder_dtype, head_dim, image_token, vocab_size

WRAPPERS = ("gemma3", "llama4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava", "qwen2_5_omni")
KINDS = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS} & {*CONFIG_MAPPING})


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("full", [True, False], ids=["every-field", "without-defaults"])
def test_every_kind_of_language_model_has_its_vocabulary(tmp_path: Path, full: bool) -> None:
    """Configs are tested as transformers writes them, and with all values written out, as many are on the Hub."""
    seen = 0
    for kind in KINDS:
        try:
            config = CONFIG_MAPPING[kind]()
            text = config.get_text_config()
        except (OSError, ImportError, ValueError, StrictDataclassError):
            continue  # this one needs the config of another model, or a package
        if not isinstance(size := getattr(text, "vocab_size", None), int):
            continue
        (tmp_path / "config.json").write_text(config.to_json_string(use_diff=not full))
        assert vocab_size(tmp_path) == size, kind
        if full and kind == "dbrx":
            continue  # transformers can't read the file that it has written
        try:
            dim = getattr(text, "head_dim", None)
            hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
        except RuntimeError:  # its layers differ
            continue
        if isinstance(dim, int):
            assert head_dim(tmp_path) == dim, kind
        elif isinstance(hidden, int) and isinstance(heads, int):
            assert head_dim(tmp_path) == hidden // heads, kind
        seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"model_type": "qwen3", "vocab_size": 77}, 77),
        ({"model_type": "qwen3", "vocab_size": 77, "text_config": None}, 77),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "vocab_size": 78}}, 78),
        ({"model_type": "llava", "vocab_size": 5, "text_config": {"model_type": "llama", "vocab_size": 79}}, 79),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 64}}, 262208),
        ({"model_type": "gemma3", "text_config": None}, 262208),
        ({"model_type": "gemma3"}, 262208),
        ({"model_type": "of_tomorrow", "vocab_size": 80}, 80),  # transformers need not know the model type
    ],
)
def test_a_vocabulary(config: dict[str, Any], size: int, tmp_path: Path) -> None:
    assert vocab_size(write(tmp_path, config)) == size
    assert read_model(tmp_path).vocab_size == size


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "of_tomorrow"}, "transformers can't read it .*; write vocab_size into the file"),
        ({}, "write vocab_size into the file"),
        ({"model_type": "vit"}, "describes no language model"),
        ([], "it holds list"),
    ],
)
def test_no_vocabulary(config: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        vocab_size(write(tmp_path, config))


@pytest.mark.parametrize("content", ["", "{", "\xff"])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"config\.json can't be read"):
        vocab_size(tmp_path)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": None, "text_config": {"torch_dtype": "float16"}}, "float16"),
        ({"text_config": None}, None),
        ({"dtype": "auto"}, None),
    ],
)
def test_the_dtype_that_a_config_names(config: dict[str, Any], dtype: str | None, tmp_path: Path) -> None:
    assert folder_dtype(write(tmp_path, config)) == dtype
    assert compute_dtype("auto", tmp_path) == dtype or (dtype is None and compute_dtype("auto", tmp_path) == "auto")
    assert compute_dtype("float32", tmp_path) == "float32"


def test_a_dtype_is_what_transformers_would_take(tmp_path: Path) -> None:
    for kind in ("qwen3", "gemma3", "llama4", "mistral3"):
        CONFIG_MAPPING[kind](dtype="bfloat16").save_pretrained(tmp_path)
        assert folder_dtype(tmp_path) == str(AutoConfig.from_pretrained(tmp_path).dtype).removeprefix("torch.")


def test_a_plain_config_needs_no_transformers_and_another_says_what_to_install(tmp_path: Path) -> None:
    """This runs in a process without transformers, as after a plain `pip install millrace`."""
    plain, bare = tmp_path / "plain", tmp_path / "bare"
    for folder, config in ((plain, {"model_type": "qwen3", "vocab_size": 77}), (bare, {"model_type": "qwen3"})):
        folder.mkdir()
        write(folder, config)
    program = f"""
import sys
for name in ("torch", "transformers", "huggingface_hub", "safetensors"):
    sys.modules[name] = None
from pathlib import Path
from millrace.engines.stock.model import read_model
from millrace.errors import DataError
from millrace.model_config import head_dim
assert read_model(Path({str(plain)!r})).vocab_size == 77
assert head_dim(Path({str(bare)!r})) is None
try:
    read_model(Path({str(bare)!r}))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'millrace[train]'" in done.stdout
    assert "or write vocab_size into the file" in done.stdout


@pytest.mark.parametrize(
    ("config", "token"),
    [
        ({"vision_config": {}, "image_token_id": 5}, 5),
        ({"vision_config": {}, "image_token_index": 6}, 6),
        ({"vision_config": {}, "model_type": "qwen3_vl"}, 151655),  # the default of its class
        ({"vocab_size": 10}, None),
    ],
)
def test_the_placeholder_of_an_image(config: dict[str, Any], token: int | None, tmp_path: Path) -> None:
    assert image_token(write(tmp_path, config)) == token
