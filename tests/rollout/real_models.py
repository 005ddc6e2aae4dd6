"""Chat templates and tokenizers of real models, from wheels that are downloaded once and kept in the cache."""

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from millrace.engines.environments import environments_home

_WHEELS = Path(__file__).with_name("wheels.txt")
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def real_models() -> Path:
    """Returns a folder with `NAME.jinja` for each template, and `qwen.json` and `mistral.json`, two tokenizers without
    their control tokens."""
    made_of = _WHEELS.read_bytes() + Path(__file__).read_bytes()
    folder = environments_home().parent / "tests" / f"models-{hashlib.sha256(made_of).hexdigest()[:16]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(_WHEELS)]
        subprocess.run([sys.executable, "-m", "pip", *download, "-d", scratch], check=True, timeout=600)
        made = Path(scratch) / "made"
        made.mkdir()
        _take_templates(_wheel(scratch, "trl"), made)
        _take_qwen(_wheel(scratch, "dashscope"), made / "qwen.json")
        _take_mistral(_wheel(scratch, "mistral_common"), made / "mistral.json")
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process has made it meanwhile
                raise
    return folder


def load_tokenizer(
    file: Path, *, bos: str, eos: str, special: Iterable[str] = (), plain: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Loads a tokenizer of `real_models()` with these special tokens, and with added tokens that are not special."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (bos, eos, *special)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def _wheel(folder: str, package: str) -> zipfile.ZipFile:
    [path] = Path(folder).glob(f"{package}-*.whl")
    return zipfile.ZipFile(path)


def _take_templates(wheel: zipfile.ZipFile, folder: Path) -> None:
    for name in wheel.namelist():
        if name.startswith("trl/chat_templates/") and name.endswith(".jinja"):
            (folder / Path(name).name).write_bytes(wheel.read(name))


def _take_qwen(wheel: zipfile.ZipFile, file: Path) -> None:
    lines = wheel.read("dashscope/resources/qwen.tiktoken").splitlines()
    _save([base64.b64decode(line.split()[0]) for line in lines], _QWEN_WORDS, normalizers.NFC(), file)


def _take_mistral(wheel: zipfile.ZipFile, file: Path) -> None:
    tekken = json.loads(wheel.read("mistral_common/data/tekken_240911.json"))
    size = tekken["config"]["default_vocab_size"] - tekken["config"]["default_num_special_tokens"]
    tokens = [base64.b64decode(token["token_bytes"]) for token in tekken["vocab"][:size]]
    _save(tokens, tekken["config"]["pattern"], None, file)


def _save(tokens: list[bytes], words: str, normalizer: normalizers.Normalizer | None, file: Path) -> None:
    """Saves a byte-level BPE from tokens in the order of their ranks. Each token is a merge of any two tokens that make
    it up."""
    letters = bytes_to_unicode()
    spelled = {token: "".join(letters[byte] for byte in token) for token in tokens}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[a], spelled[b]) for a, b in known]
    vocabulary = {text: ranks[token] for token, text in spelled.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))
