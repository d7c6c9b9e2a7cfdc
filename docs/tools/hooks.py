"""What `mkdocs build` does besides rendering docs/: it adds files from outside docs/ and turns formulas into MathML.

The pages link to files of the repository (``../examples/demo_lm.py``, ``../benchmarks/results/quality_lm.png``). Such
links work on a code host and in an editor. A site holds only what is in docs/, so the hooks add those files to it and
point the links at them. A link to a file that does not exist stays as it is, and the strict build fails on it.

Formulas become MathML when the site is built. Browsers draw MathML themselves, so no script is fetched to read a page.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Files at the top of the repository that are pages of the site -> the page.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
#: README.md says in short what the home page says, so links to it lead there.
HOME = {"README.md": "index.md"}
#: Folders whose files are copied when a page links to them -> suffixes of the copies; a source is shown as text.
COPIED = {".png": ".png", ".svg": ".svg", ".csv": ".csv"}

LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?P<after>\))")
MATH = re.compile(
    r'<(?P<tag>div|span) class="arithmatex">\\(?P<open>[\[(])(?P<tex>.*?)\\[\])]</(?P=tag)>',
    re.DOTALL,
)


def outside(page: str, target: str) -> str | None:
    """The path from the repository's root of a link that leaves docs/, or None where it does not."""
    if re.match(r"[a-z]+:", target):
        return None
    folder = "" if page in PAGES.values() else posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(folder, target))
    if path.startswith("docs/"):
        # From a page whose source is at the top of the repository: docs/x.md is x.md here.
        return path if page in PAGES.values() else None
    return path if (ROOT / path).is_file() else None


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES or path in HOME:
        return {**PAGES, **HOME}[path]
    suffix = posixpath.splitext(path)[1]
    return f"repository/{path}" + ("" if suffix in COPIED else ".txt")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the top of the repository, and every file outside docs/ that a page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    wanted = set()
    for file in files.documentation_pages():
        for link in LINK.finditer(file.content_string):
            path = outside(file.src_uri, link["target"])
            if path is not None and place(path).startswith("repository/"):
                wanted.add(path)
    for path in sorted(wanted):
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links that leave docs/ at what `on_files` has added."""
    source = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        path = outside(source, link["target"])
        if path is None:
            return link[0]
        target = posixpath.relpath(place(path), posixpath.dirname(source) or ".")
        return f"{link['before']}{target}{link['anchor'] or ''}{link['after']}"

    return LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace LaTeX by MathML."""

    def converted(found: re.Match[str]) -> str:
        display = "block" if found["open"] == "[" else "inline"
        tex = html.unescape(found["tex"]).replace("aligned}", "align*}").strip()
        made = latex2mathml.converter.convert(tex, display=display)
        return f'<{found["tag"]} class="arithmatex">{made}</{found["tag"]}>'

    return MATH.sub(converted, content)
