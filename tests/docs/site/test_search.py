"""The built site: its search answers what a new user asks, and no formula, link or placeholder is left unrendered.

`make docs` builds it into the folder that SITE names. The search is lunr's, as in the browser, over the index that the
browser loads.
"""

import html
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SITE = ROOT / os.environ["SITE"] if os.environ.get("SITE") else None

pytestmark = pytest.mark.skipif(SITE is None, reason="SITE is not set: `make docs` builds the site and sets it")


@pytest.fixture(scope="module")
def search():
    """``search(words)``: the places that the search lists, the best first."""
    lunr = pytest.importorskip("lunr", reason="lunr is not installed: it is in the extra docs")
    built = json.loads((SITE / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert {"stemmer", "stopWordFilter", "trimmer"} <= set(built["config"]["pipeline"])  # lunr's own, as here

    def words(text):
        return re.sub(built["config"]["separator"], " ", html.unescape(re.sub(r"<[^>]+>", "", text)))

    documents = [{**one, **{key: words(one[key]) for key in ("title", "text")}} for one in built["docs"]]
    # The boost of Material for MkDocs: a word in a title weighs more than any number of words in the text.
    index = lunr.lunr("location", [{"field_name": "title", "boost": 1000}, {"field_name": "text"}], documents)
    texts = {one["location"]: one["text"] for one in built["docs"]}

    def found(asked):
        # As in the browser: every word has to be there.
        asked = " ".join(f"+{word}" for word in asked.split())
        return [(one["ref"], texts[one["ref"]]) for one in index.search(asked)]

    return found


@pytest.mark.parametrize(
    ("asked", "place", "said"),
    [
        ("learning rate for lean", "which_optimizer/#learning-rate-for-lean", "1e-2 to 8e-2"),
        ("resume AdamW checkpoint", "checkpoints/#resume-a-checkpoint-that-adamw-wrote", "convert"),
        ("FSDP1", "troubleshooting/#fsdp1-is-refused", "FSDP2"),
    ],
)
def test_a_question_is_answered_by_the_first_results(asked, place, said, search):
    """The first click opens the search, the second one a result: it has the answer in its own section."""
    words = " ".join(word for word in asked.split() if word != "for")  # lunr leaves out words as frequent as this
    first = search(words)[:3]
    assert place in [location for location, _ in first], first
    assert said in dict(first)[place]


@pytest.mark.parametrize("name", ["cs_adam", "sm3", "sketchy", "cs_lion", "CSAdam", "MemSGD"])
def test_names_are_found(name, search):
    assert search(name)


def pages():
    return sorted(SITE.rglob("*.html")) if SITE is not None else []


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(SITE).as_posix())
def test_a_page_is_rendered_whole(page):
    text = page.read_text(encoding="utf-8")
    article = re.search(r"<article.*?</article>", text, re.DOTALL)
    if article is None:
        pytest.skip("this page forwards to another one, and has no article")
    # Code may show any of these.
    body = re.sub(r"<(pre|code)\b.*?</\1>", "", article[0], flags=re.DOTALL)
    for raw in (r":math:", r"\.\. math", r"\{options\}", r"\\\(", r"\\\[", r"``", r"\$\$", r"\]\([^)]*\)"):
        assert not re.search(raw, body), f"{page}: {raw} is left in the page"
    # Nothing is fetched from elsewhere to read a page.
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', text)


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(SITE).as_posix())
def test_every_link_of_a_built_page(page):
    for target in re.findall(r'(?:href|src)="([^"#]+)(?:#[^"]*)?"', page.read_text(encoding="utf-8")):
        if re.match(r"(?:[a-z]+:|//)", target) or target.startswith("/"):
            continue
        file = (page.parent / html.unescape(target)).resolve()
        assert file.exists(), f"{page}: {target}"


def test_the_reference_has_every_public_name():
    import sketch_plugins

    text = "".join(path.read_text(encoding="utf-8") for path in (SITE / "api").rglob("*.html"))
    for name in sketch_plugins.__all__:
        assert f'id="sketch_plugins.{name}"' in text, f"{name} is not in docs/api"
