"""Every link of the documentation leads somewhere: to a file, and to a heading where it names one."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pages import MADE, PAGES, ROOT, TOP, anchors, named, prose

LINK = re.compile(r"\]\((?P<target>[^)\s#]*)(?:#(?P<anchor>[^)\s]*))?(?:\s[^)]*)?\)")
SOURCES = [path for folder in ("sketch_plugins", "integrations", "examples") for path in (ROOT / folder).rglob("*.py")]


def found(page, target):
    """The file that a link means; pages of the site that are made of a file at the top are that file."""
    file = (page.parent / target).resolve() if target else page
    if not file.exists() and file.parent == ROOT / "docs" and file.name in MADE:
        return ROOT / MADE[file.name]
    return file


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=named)
def test_every_link_of_a_page(page):
    for link in LINK.finditer(prose(page)):
        if re.match(r"(https?|mailto):", link["target"]):
            continue
        file = found(page, link["target"])
        assert file.exists(), f"{named(page)} links to {link['target']}, which does not exist"
        anchor = link["anchor"]
        if anchor and not anchor.startswith("only-"):  # of a picture: its form for the light or the dark theme
            assert anchor in anchors(file), f"{named(page)}: {named(file)} has no heading #{anchor}: {anchors(file)}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} | set(MADE)


@pytest.mark.parametrize("source", [*SOURCES, *PAGES, *TOP], ids=named)
def test_every_page_that_is_named_exists(source):
    """In docstrings, comments, messages and texts: ``docs/benchmarks.md``."""
    for name in re.findall(r"\bdocs/([\w/]+\.md)\b", source.read_text(encoding="utf-8")):
        assert (ROOT / "docs" / name).is_file(), f"{named(source)} names docs/{name}, which does not exist"


def test_a_link_to_nothing_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n\n[a](missing.md) [b](#two) [c](#one)\n")
    links = [(link["target"], link["anchor"]) for link in LINK.finditer(prose(page))]
    assert links == [("missing.md", None), ("", "two"), ("", "one")]
    assert not found(page, "missing.md").exists() and found(page, "") == page
    assert anchors(page) == ["one"]
