"""The packages to install for each engine: a tested list of pins, or the engine with pip's choice of dependencies."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import ConfigError

LOCKS = Path(__file__).parent  # the lists of pins are beside this file
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!]*")  # no hyphen, which separates the parts of a folder's name


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an engine is installed for one device.

    locks: version to a file that pins every package, which is installed with `--no-deps`. None: any version, with the
    dependencies that pip chooses. check: Python code that must run in the finished environment. hint: advice to the
    user if it fails.
    """

    locks: Mapping[str, Path] | None
    check: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Requirements:
    """The text of a pip requirements file. complete: it names every package, so pip need not look for dependencies."""

    text: str
    complete: bool

    @property
    def lines(self) -> list[str]:
        """The lines that name packages."""
        return [line for line in self.text.splitlines() if line.strip() and not line.startswith("#")]

    @property
    def sha256(self) -> str:
        """The hash of the packages. Comments do not count, so changing one does not require another installation."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    @property
    def packages(self) -> int | None:
        """The number of packages, or None if pip chooses the dependencies."""
        return len(self.lines) if self.complete else None


Recipes = Mapping[tuple[str, str], Recipe]  # by engine and device

CPU_CHECK = "import torch"
CPU_HINT = (
    "torch does not load. PyPI has the CUDA build of torch, which needs packages that are not installed for the CPU; "
    "set PIP_EXTRA_INDEX_URL to the index of torch's CPU builds, and install again"
)
RECIPES: Recipes = {
    ("sglang", "cpu"): Recipe(
        locks={version: LOCKS / f"sglang-{version}-cpu.txt" for version in ("0.5.15", "0.5.23")},
        check=CPU_CHECK,
        hint=CPU_HINT,
    ),
    ("vllm", "cpu"): Recipe(locks={"0.32.0": LOCKS / "vllm-0.32.0-cpu.txt"}, check=CPU_CHECK, hint=CPU_HINT),
    # Routers need no GPU, also in front of engines that have one.
    ("sglang-router", "cpu"): Recipe(
        locks={"0.3.2": LOCKS / "sglang-router-0.3.2-cpu.txt"}, check="from sglang_router.router import Router"
    ),
    ("vllm-router", "cpu"): Recipe(
        locks={"0.1.17": LOCKS / "vllm-router-0.1.17-cpu.txt"}, check="from vllm_router.router import Router"
    ),
    # Several GB. Our tests, which have no GPU, never install them.
    ("sglang", "cuda"): Recipe(locks=None),
    ("vllm", "cuda"): Recipe(locks=None),
}
DEFAULT_VERSIONS: Mapping[str, str] = {
    "sglang": "0.5.23",
    "vllm": "0.32.0",
    "sglang-router": "0.3.2",
    "vllm-router": "0.1.17",
}


def recipe_for(engine: str, device: str, recipes: Recipes) -> Recipe:
    """Return the recipe. Raises ConfigError, which names the known engines and devices, if there is none."""
    if (engine, device) not in recipes:
        known = ", ".join(f"{engine} ({device})" for engine, device in sorted(recipes))
        raise ConfigError(f"there is no environment for {engine} ({device}); there are: {known}")
    return recipes[engine, device]


def requirements(engine: str, version: str, device: str, recipes: Recipes) -> Requirements:
    """Return the packages to install. Raises ConfigError for an unknown engine, device or version."""
    locks = recipe_for(engine, device, recipes).locks
    if not VERSION.fullmatch(version):
        raise ConfigError(f"{version!r} is not a version of a package, such as {DEFAULT_VERSIONS.get(engine, '1.2.3')}")
    if locks is None:
        return Requirements(f"{engine}=={version}\n", complete=False)
    if version not in locks:
        raise ConfigError(
            f"{engine} {version} has no tested list of packages for the {device}; these versions have one: "
            f"{', '.join(locks)}. For another, make an environment yourself and set `python` to its interpreter"
        )
    return Requirements(locks[version].read_text(), complete=True)
