"""The shell commands of the documentation's pages.

They are the lines of blocks that are marked as a shell's, and inline code that is a whole command, like
`sketch-plugins report CHECKPOINT`. Comments, prompts and what stands for a user's own arguments (``...``) are left out.
"""

import re
from typing import NamedTuple

from pages import FENCE, PAGES, ROOT, TOP, blocks, named

SHELLS = ("sh", "bash", "shell", "console", "zsh")
PROGRAMS = (
    "sketch-plugins", "python", "python3", "pip", "make", "bash", "torchrun", "accelerate", "deepspeed", "tune", "trl",
    "llamafactory-cli", "pytest",
)  # fmt: skip
#: docs/quickstart.md is run as a whole, in its order, by tests/docs/test_quickstart.py.
OWN = {ROOT / "docs" / "quickstart.md"}
#: A history: its commands belong to the version that it describes.
HISTORY = {ROOT / "CHANGELOG.md"}
READ = [page for page in [*PAGES, *TOP] if page not in OWN]
START = re.compile(rf"(?:[A-Z_]+=\S* )*(?:{'|'.join(PROGRAMS)}) (?=\S)")
INLINE = re.compile(r"`((?:sketch-plugins|python|pip) [^`]+)`")
#: Inline code of these few words is a command; another one that is as short is the name of a command.
SHORT = {"sketch-plugins info", "sketch-plugins check", "sketch-plugins --version"}
#: It names an option, without a program to run.
NAMES_AN_OPTION = re.compile(r"sketch-plugins run --optim \w+")


class Command(NamedTuple):
    """A command, and the pages that have it."""

    text: str
    pages: tuple[str, ...]


def lines(code):
    """The commands of a block: continued lines are one, without prompts, comments and ``...`` at the end."""
    for line in re.sub(r" *\\\n\s*", " ", code).splitlines():
        line = re.sub(r"^\$ |(?:^|\s+)#.*$", "", line.strip())
        line = re.sub(r"( \.\.\.)+$", "", line.strip())
        if line:
            yield line


def inline(text):
    """The commands in a page's prose."""
    for code in INLINE.findall(FENCE.sub("", text)):
        code = " ".join(code.split())
        words = code.removeprefix("python -m ").split()
        if NAMES_AN_OPTION.fullmatch(code):
            continue
        if code in SHORT or len(words) > 2 or (words[0] == "python" and len(words) == 2):
            yield code


def unmarked(text):
    """Commands in blocks that nothing marks as a shell's: fences without a language, and lines with an indent of 4."""
    plain = [block["code"] for block in FENCE.finditer(text) if block["language"] in ("", "text")]
    plain += re.findall(r"^ {4,}(?=\S).*$", FENCE.sub("", text), re.MULTILINE)
    return [line.strip() for code in plain for line in code.splitlines() if START.match(line.strip())]


def commands(pages=READ):
    """Every command once, in the order of the pages."""
    found = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        here = [line for _, _, code in blocks(page, *SHELLS) for line in lines(code)]
        here += [] if page in HISTORY else inline(text)
        for command in here:
            found.setdefault(command, []).append(named(page))
    return [Command(text, tuple(dict.fromkeys(pages))) for text, pages in found.items()]
