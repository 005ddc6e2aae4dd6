"""Builds the sdist and the wheel, checks them, and installs each into an empty environment of each Python.

    python tools/release.py DIST [--short]

The interpreter that runs this needs build, twine and cyclonedx-bom (`make release` has them). DIST gets the two files
and `millrace-VERSION.cdx.json`, the SBOM of what `pip install millrace` brings. With --short, only the wheel is
installed, and only for the Python that runs this.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
IN_THE_WHEEL = (
    "millrace/py.typed",
    "millrace/_examples/gsm8k_multiturn/cpu.yaml",
    "millrace/extension/millrace_copies.py",
    "millrace/viewer/static/index.html",
)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command and return its output. Ends this program with the output if the command fails."""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(dist: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it. Return both."""
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", dist)
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel), end="")
    names = zipfile.ZipFile(wheel).namelist()
    if missing := [name for name in IN_THE_WHEEL if name not in names]:
        sys.exit(f"the wheel lacks {', '.join(missing)}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files")
    return sdist, wheel


def try_out(python: str, distribution: Path, folder: Path) -> Path:
    """Install a distribution into an empty environment, use the core there, and return the environment's folder."""
    environment = folder / f"{Path(python).name}-{distribution.suffix.removeprefix('.')}"
    run(python, "-m", "venv", environment)
    run(environment / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", distribution)
    run(environment / "bin/python", "-c", "import millrace; millrace.open_fleet, millrace.Fleet", cwd=folder)
    millrace = environment / "bin/millrace"
    version = run(millrace, "version", cwd=folder).strip()
    if not distribution.name.startswith(f"millrace-{version}"):
        sys.exit(f"{distribution.name} says that it is version {version}")
    run(millrace, "config", cwd=folder)
    run(millrace, "examples", "own_reward", "--to", environment, cwd=folder)
    print(f"{run(environment / 'bin/python', '--version').strip()}: {distribution.name} works")
    return environment


def bill_of_materials(environment: Path, to: Path) -> None:
    """Write what an environment has as an SBOM in CycloneDX's form."""
    program = Path(sys.executable).with_name("cyclonedx-py")
    run(program, "environment", "--output-reproducible", "--output-file", to, environment / "bin/python")
    print(f"{to.name}: the SBOM of the core and what it needs")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--short", action="store_true")
    given = parser.parse_args(arguments)
    dist = given.dist.absolute()
    sdist, wheel = build(dist)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        first = try_out(sys.executable, wheel, folder)
        bill_of_materials(first, dist / f"millrace-{wheel.name.split('-')[1]}.cdx.json")
        if given.short:
            return
        for name in PYTHONS:
            python = shutil.which(f"python{name}")
            if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
                print(f"Python {name} is not here, so nothing was tried with it")
                continue
            for distribution in (wheel, sdist):
                try_out(python, distribution, folder)


if __name__ == "__main__":
    main()
