"""What `make docs` adds to mkdocs: pages from outside docs/, the links to them, GitHub's anchors, and a check that no
page loads anything from another host.

A page links to other files of the repository as on GitHub. On the site the link goes to the page that stands for the
file.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.pages import LINK, anchors, outside_code  # noqa: E402

# The files outside docs/ that are pages of the site. Each folder of examples is a page too.
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".jsonl": "json"}
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b(?![^>]*canonical)[^>]*\bhref=\"?(?:https?:)?//"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=moved((ROOT / source).read_text(), source, page)))
    for folder in sorted(path for path in (ROOT / "examples").iterdir() if path.is_dir()):
        files.append(File.generated(config, f"examples/{folder.name}.md", content=example(folder)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Give a page's headings GitHub's anchors, and its links the places on the site."""
    path = page.file.src_path
    if (ROOT / "docs" / path).exists():
        markdown = moved(markdown, f"docs/{path}", path)
    lines = markdown.split("\n")
    for number, anchor in anchors(markdown).items():
        lines[number - 1] += f" {{ #{anchor} }}"
    return "\n".join(lines)


def on_post_build(config: MkDocsConfig) -> None:
    """Raise PluginError if a page loads something from another host."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        if found := LOADED.search(page.read_text()):
            raise PluginError(f"{page} loads something from another host: {found[0]}")


def moved(text: str, source: str, page: str) -> str:
    """The text of a file of the repository with its links as those of a page of the site."""

    def place(found: re.Match[str]) -> str:
        target, mark, anchor = found["target"].partition("#")
        if not target or "://" in target:
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (goal := place_of(file)):
            return found["text"]
        link = posixpath.relpath(goal, posixpath.dirname(page) or ".")
        return f"{found['before']}{link}{mark}{anchor}{found['after']}"

    return outside_code(text, lambda prose: LINK.sub(place, prose))


def place_of(file: str) -> str:
    """The page or picture of the site that stands for a file of the repository, or nothing."""
    if file in PAGES:
        return PAGES[file]
    if file.startswith("examples/"):
        return f"examples/{file.split('/')[1]}.md"
    return file.removeprefix("docs/") if file.startswith("docs/") else ""


def example(folder: Path) -> str:
    """A page with the files of a folder of examples."""
    shown = [
        f"## {path.name}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text().rstrip()}\n```\n"
        for path in sorted(folder.iterdir())
        if path.suffix in LANGUAGES
    ]
    return "\n".join([f"# examples/{folder.name}\n", *shown])
