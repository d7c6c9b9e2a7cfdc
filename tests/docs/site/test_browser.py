"""The built site in a real browser, at the width of a phone and of a desktop: nothing is wider than the window.

The browser is the distribution's Chromium, without a window and without a driver: a page of our own loads each page of
the site in a frame of the width in question, and sends the server how wide its content is and which words are on its
first screen. Pictures of five pages lie in SITE/screenshots afterwards: part of what was built, not of the repository.
"""

import functools
import http.server
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[3] / os.environ["SITE"] if os.environ.get("SITE") else None
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"phone": 390, "desktop": 1280}
HEIGHT = 844
SHOWN = ("", "which_optimizer/", "sketchy/", "api/optimizers/", "troubleshooting/")
MEASURE = """<!doctype html><body><iframe style="height:%dpx;border:0"></iframe><script>
const found = [], frame = document.querySelector("iframe");
(async () => {
  for (const width of %s) for (const page of %s) {
    frame.style.width = width + "px";
    await new Promise(loaded => { frame.onload = loaded; frame.src = page; });
    const shown = frame.contentDocument, words = [];
    for (const one of shown.querySelectorAll("article :is(h1, h2, p, li, th, td, dt, dd, pre, figcaption)")) {
      const place = one.getBoundingClientRect();
      const seen = place.bottom <= frame.clientHeight && place.right <= frame.clientWidth;
      if (place.height && seen) words.push(one.innerText);
    }
    found.push([page, width, shown.documentElement.scrollWidth, words.join(" ")]);
  }
  await fetch("/measured", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""

#: Page -> words that must be on its first screen, at both widths: the answer that most readers come for.
#: Not for the pages of api/, which are made of docstrings.
ANSWERS = {
    "/": "keep 0.03 to 1.3 bytes of state a parameter where AdamW keeps 8",
    "/accelerate/": "model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)",
    "/algorithms/": "This page defines what every optimizer computes",
    "/architecture/": "loss.backward() leaves a gradient in p.grad. The trainer calls optimizer.step()",
    "/benchmarks/": 'very little memory cs_adam, preset="lean" 0.209 5.640 0.92',
    "/changelog/": "take AdamW's learning rate",
    "/check/": "sketch-plugins check compares them with eager torch on your device",
    "/checkpoints/": "Save optimizer.state_dict() and load it with optimizer.load_state_dict",
    "/cli/": "run an unmodified program with our optimizers",
    "/communication/": "state = attach(ddp, density=0.01)",
    "/contributing/": "Run make quick before every commit",
    "/cs_adam/": "1.24 bytes of state a parameter in place of 8, at AdamW's learning rate",
    "/deepspeed/": '"type": "cs_adam"',
    "/distributed/": "Every optimizer of the registry works under DDP, FSDP2 and DeepSpeed's ZeRO",
    "/extending/": "a file in sketch_plugins/stores/ two lines in stores/kinds.py",
    "/extreme_classification/": "For a classifier with very many classes, use cs_rmsprop with compression=0.01",
    "/glossary/": "bucket The rows of a matrix that share one row of a sketch's table",
    "/in_backward/": "lets the optimizer take each parameter's step as soon as its gradient is complete",
    "/larger_batch/": "that AdamW needs for a batch of 16, cs_adam trained a small BERT with a batch of 30",
    "/lightning/": 'trainer = lightning.Trainer(strategy="cs_adam")',
    "/mem_sgd/": "sends the largest entries of its gradient, keeps the others in a memory",
    "/memory/": "cs_adam in place of AdamW saves 6.76 bytes a parameter of state",
    "/migrating/": "Replace torch.optim.AdamW by CSAdam and keep the learning rate",
    "/peers/": "The lowest loss: sketchy at 160, 500 and 5,000 steps, at a fifth of Muon's state",
    "/plain_torch/": "optimizer = CSAdam(model.parameters(), lr=1e-3, weight_decay=0.01)",
    "/plan/": "predicts the memory of a training step with each optimizer, and the largest batch that fits",
    "/quickstart/": 'pip install ".[transformers,cpu]"',
    "/recipes/": "sketch-plugins run trl sft",
    "/resharding/": "sketch-plugins reshard CHECKPOINT --world-size N",
    "/run/": "sketch-plugins run --optim cs_adam train.py",
    "/security/": "Report a vulnerability privately, not in a public issue",
    "/sketchy/": "a lower loss than AdamW in fewer steps, for 1 to 2 bytes of state a parameter",
    "/sm3/": "It takes AdamW's learning rate",
    "/transformers/": 'TrainingArguments("out", optim="cs_adam"',
    "/troubleshooting/": "a learning rate that does not fit the optimizer",
    "/versions/": "works with torch 2.6 or newer, on Python 3.10, 3.11, 3.12 and 3.13",
    "/weight_bits/": "weight_bits=24 1 byte 8 bits more",
    "/which_optimizer/": "Start with cs_adam at AdamW's learning rate",
}

pytestmark = [
    pytest.mark.skipif(SITE is None, reason="SITE is not set: `make docs` builds the site and sets it"),
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: no page is looked at in a browser"),
]


@pytest.fixture(scope="module")
def pages():
    found = [path.parent.relative_to(SITE).as_posix() for path in SITE.rglob("index.html")]
    return sorted("/" if one == "." else f"/{one}/" for one in found)


@pytest.fixture(scope="module")
def served(pages):
    """Where the site is served, with the page that measures; and the queue of what that page sends."""
    page = MEASURE % (HEIGHT, json.dumps(list(WIDTHS.values())), json.dumps(pages))
    measured = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/measure":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def do_POST(self):
            measured.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", measured
        server.shutdown()


def command(*arguments, folder):
    return [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", *arguments]


@pytest.fixture(scope="module")
def measured(served, pages, tmp_path_factory):
    """For each page and width: how wide the page is, and the words on its first screen."""
    address, sent = served
    log = tmp_path_factory.mktemp("browser") / "log"
    with log.open("w") as output:
        start = command("--remote-debugging-port=0", f"{address}/measure", folder=log.parent / "profile")
        browser = subprocess.Popen(start, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            found = sent.get(timeout=240)
        except queue.Empty:
            pytest.fail(f"The browser measured nothing within 240 s:\n{log.read_text()[-2000:]}")
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    assert len(found) == len(WIDTHS) * len(pages)
    return {(page, width): (wide, " ".join(words.split())) for page, width, wide, words in found}


def test_no_page_is_wider_than_the_window(measured):
    assert [(page, width, wide) for (page, width), (wide, _) in measured.items() if wide > width] == []


def test_every_page_has_an_answer(pages):
    assert set(ANSWERS) == {page for page in pages if not page.startswith("/api/")}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", ANSWERS)
def test_the_first_screen_has_the_answer(page, width, measured):
    words = measured[page, WIDTHS[width]][1]
    assert ANSWERS[page] in words, f"The first screen of {page} at {WIDTHS[width]} px has no {ANSWERS[page]!r}: {words}"


def test_pictures_of_pages(served, tmp_path):
    address, _ = served
    target = SITE / "screenshots"
    target.mkdir(exist_ok=True)
    for name, width in WIDTHS.items():
        for page in SHOWN:
            file = target / f"{page.strip('/').replace('/', '-') or 'home'}-{name}.png"
            arguments = (f"--screenshot={file}", f"--window-size={width},{HEIGHT}", f"{address}/{page}")
            subprocess.run(command(*arguments, folder=tmp_path), capture_output=True, timeout=120, check=True)
            assert file.stat().st_size > 5_000
