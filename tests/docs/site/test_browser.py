"""The built site in a real browser, at the width of a phone and of a desktop: nothing is wider than the window.

The browser is the distribution's Chromium, without a window and without a driver: a page of our own loads each page of
the site in a frame of the width in question, and writes down how wide its content is. Pictures of five pages lie in
SITE/screenshots afterwards: part of what was built, not of the repository.
"""

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[3] / os.environ["SITE"] if os.environ.get("SITE") else None
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"phone": 390, "desktop": 1280}
SHOWN = ("", "which_optimizer/", "sketchy/", "api/optimizers/", "troubleshooting/")
MEASURE = """<!doctype html><body><iframe style="height:900px;border:0"></iframe><script>
const found = [], frame = document.querySelector("iframe");
(async () => {
  for (const width of %s) for (const page of %s) {
    frame.style.width = width + "px";
    await new Promise(loaded => { frame.onload = loaded; frame.src = page; });
    found.push([page, width, frame.contentDocument.documentElement.scrollWidth]);
  }
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
})();
</script></body>"""

pytestmark = [
    pytest.mark.skipif(SITE is None, reason="SITE is not set: `make docs` builds the site and sets it"),
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: no page is looked at in a browser"),
]


@pytest.fixture(scope="module")
def address():
    """Where the site is served, with the page that measures."""
    pages = ["/" + path.parent.relative_to(SITE).as_posix().replace(".", "") for path in SITE.rglob("index.html")]
    page = MEASURE % (json.dumps(list(WIDTHS.values())), json.dumps([f"{one.rstrip('/')}/" for one in pages]))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/measure":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def browse(*arguments, folder):
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def test_no_page_is_wider_than_the_window(address, tmp_path):
    shown = browse("--virtual-time-budget=120000", "--dump-dom", f"{address}/measure", folder=tmp_path)
    found = re.search(r"<pre>(\[.*\])</pre>", shown)
    assert found, shown[-2000:]
    measured = json.loads(html.unescape(found[1]))
    assert len(measured) == len(WIDTHS) * len(list(SITE.rglob("index.html")))
    assert [one for one in measured if one[2] > one[1]] == []


def test_pictures_of_pages(address, tmp_path):
    target = SITE / "screenshots"
    target.mkdir(exist_ok=True)
    for name, width in WIDTHS.items():
        for page in SHOWN:
            file = target / f"{page.strip('/').replace('/', '-') or 'home'}-{name}.png"
            browse(f"--screenshot={file}", f"--window-size={width},900", f"{address}/{page}", folder=tmp_path)
            assert file.stat().st_size > 5_000
