"""`millrace config` shows every setting as it is in the models."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from millrace.cli import app
from millrace.config.base import Model
from millrace.config.describe import describe
from millrace.config.serve import ServeConfig
from millrace.errors import ConfigError


def models(base: type[BaseModel] = Model) -> Iterator[type[BaseModel]]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def test_every_setting_is_named_with_its_meaning() -> None:
    text = " ".join(f"{describe()} {describe(kind=ServeConfig)}".split())
    for model in models():
        if model.__module__.startswith("millrace.") and not model.__subclasses__():
            for name, field in model.model_fields.items():
                assert field.description, f"{model.__name__}.{name} has no docstring"
                assert f"{name}: " in text
                assert " ".join(field.description.split()) in text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("train.lr", "train.lr: number above 0, required\n    Learning rate after the warm-up."),
        ("seed", "seed: whole number, default 0\n    Seed of everything random in the run."),
        (
            "engine.kv_cache_memory_bytes",
            "engine.kv_cache_memory_bytes: whole number above 0 or null, default null (kind: "
            "vllm)\n    Size of the KV cache, in bytes. None keeps vLLM's default on a GPU, and is 256 MB on the CPU.",
        ),
    ],
)
def test_one_setting_has_its_type_its_default_and_its_meaning(name: str, says: str) -> None:
    assert describe(name) == says


def test_a_section_has_all_of_its_settings_and_no_other() -> None:
    lines = [line for line in describe("engine.sglang").splitlines() if not line.startswith(" ")]
    assert lines[0] == "engine with kind: sglang"
    assert all(line.endswith(" (kind: sglang)") for line in lines[1:] if not line.startswith("engine.kind: "))
    assert "engine.tp_size: whole number above 0, default 1 (kind: sglang)" in lines


def test_a_setting_is_named_as_in_a_file() -> None:
    assert describe("engine.tp_size").count("engine.tp_size: ") == 2  # SGLang's and vLLM's
    assert describe("engine.sglang.tp_size").splitlines() == describe("engine.tp_size").splitlines()[:2]
    assert "engine.sglang." not in describe()


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("engine.sglong", "engine.sglang"),
        ("train.step", "train.steps"),
        ("trian", "train"),
        ("engine.sglang.tp_siz", "engine.sglang.tp_size"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"no section or setting {wrong}; did you mean '{near}'\?$"):
        describe(wrong)


def test_an_unknown_name_with_none_near_gets_the_sections() -> None:
    with pytest.raises(ConfigError, match="no section or setting zzz; the sections are .*engine.sglang, .*train"):
        describe("zzz")


def commands(command: Any, *names: str) -> Iterator[tuple[str, ...]]:
    yield names
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *names, name)


def test_h_is_help_everywhere() -> None:
    from typer.main import get_command

    found = list(commands(get_command(app)))
    assert ("engines", "install") in found
    assert ("config",) in found
    for names in found:
        short, long = (CliRunner().invoke(app, [*names, flag]) for flag in ("-h", "--help"))
        assert short.exit_code == 0
        assert short.output == long.output
        assert "Usage" in short.output
