"""Each layer imports only those above it, as docs/architecture.md says."""

import ast
from pathlib import Path

import pytest

import millrace

PACKAGE = Path(millrace.__file__).parent
LAYERS = [
    "lazy",
    "errors",
    "arguments",
    "quantisation",
    "types",
    "buckets",
    "continuation",
    "placeholders",
    "extension",
    "checksum",
    "model_folder",
    "model_config",
    "imports",
    "jsonl",
    "locks",
    "checkpoint_names",
    "config",
    "tracing",
    "http",
    "launch",
    "engines",
    "routers",
    "weights",
    "fleet",
    "conformance",
    "rollout",
    "serve",
    "viewer",
    "gateway",
    "agents",
    "train",
    "integrations",
    "cli",
]
ABOVE_ALL = {"__init__", "__main__", "sync"}  # the public faces


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_its_own_layer_and_those_above(path: Path) -> None:
    layer = layer_of(path)
    if layer in ABOVE_ALL:
        return
    allowed = LAYERS[: LAYERS.index(layer) + 1] + ["sync"] * (layer == "integrations")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("millrace."):
            assert node.module is not None
            assert node.module.split(".")[1] in allowed, f"line {node.lineno} imports {node.module}"
