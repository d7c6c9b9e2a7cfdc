"""The pages of the documentation as tests see them: texts, headings, links, blocks of code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Of the repository's top, the files that link to pages.
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
#: Of the site alone: pages that are made of the files at the top (docs/tools/hooks.py).
MADE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<options>[^\n]*)\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)


def named(path):
    """A page's name in the ids of tests."""
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))


def anchors(path):
    """The ids that the headings of a page get, on a code host and on the site alike."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def blocks(path, *languages):
    """(language, options, code) of each block, its indent taken off."""
    for block in FENCE.finditer(path.read_text(encoding="utf-8")):
        if block["language"] in languages:
            code = re.sub(rf"^{block['indent']}", "", block["code"], flags=re.MULTILINE)
            yield block["language"], block["options"].strip(), code
