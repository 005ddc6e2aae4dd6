"""The docs: their links lead somewhere, their Python is Python, and the generated pages are up to date."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from tools.pages import anchors, blocks, links

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
TITLE = re.compile(r'title="([^"]+)"')
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@cache
def anchors_of(page: Path) -> frozenset[str]:
    return frozenset(anchors(page.read_text()).values())


def broken(page: Path) -> list[str]:
    """The links of a page to files or headings of the repository that do not exist."""
    found = []
    for line, target in links(page.read_text()):
        place, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / place).resolve() if place else page
        if place and not (file.exists() and file.is_relative_to(ROOT)):
            found.append(f"line {line}: {target}: there is no such file")
        elif anchor and anchor not in anchors_of(file):
            found.append(f"line {line}: {target}: there is no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_of_python_compile(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.info.partition(" ")[0] == "python" and page.name != "api.md":  # which has signatures
            text = "\n" * (block.line - 1) + block.text
            compile(text, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", ["index.md", "own_loop.md", "first_hour.md"])
def test_a_page_does_what_it_shows(name: str, tmp_path: Path) -> None:
    """Files have a title, commands a prompt. Each is run as printed, but for those that install something or serve."""
    commands = []
    for block in blocks((ROOT / "docs" / name).read_text()):
        if title := TITLE.search(block.info):
            (tmp_path / title[1]).write_text(block.text + "\n")
            commands += [f"python {title[1]}"] if name != "first_hour.md" and block.info.startswith("python") else []
        if block.info == "console":
            commands += [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    assert commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        if not re.search(r"venv|\b(install|view)\b", command):
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_the_reference_of_settings_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools/settings_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_is_in_the_navigation() -> None:
    """`make docs` says so too, but needs packages of its own."""
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f" {page.name}\n" not in listed] == []


def test_anchors_are_those_of_github() -> None:
    page = "# A `b_c`: d, e\n\n```\n# no heading\n```\n## [Links](x.md) & more\n## Same\n## Same #\n### Sample's way\n"
    assert list(anchors(page).values()) == ["a-b_c-d-e", "links--more", "same", "same-1", "samples-way"]


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    text = "[a](no.md) `[b](in_code.md)` [c](#there) [d](#nowhere)\n[e\nf](no2.md)\n\n"
    text += "```\n[g](in_block.md)\n```\n# There\n"
    page = tmp_path / "page.md"
    page.write_text(text)
    assert links(text) == [(1, "no.md"), (1, "#there"), (1, "#nowhere"), (3, "no2.md")]
    assert [where.rpartition(": ")[0] for where in broken(page)] == [
        "line 1: no.md",
        "line 1: #nowhere",
        "line 3: no2.md",
    ]


def test_a_block_without_an_end_is_found() -> None:
    with pytest.raises(ValueError, match="the block that starts in line 2 has no end"):
        blocks("text\n```python\nx = 1\n")
