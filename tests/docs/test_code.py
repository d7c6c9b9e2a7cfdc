"""The code of the pages: what has a file's name runs as it stands, the rest as far as one process without a GPU can.

docs/quickstart.md and docs/extending.md have tests of their own, which run them whole.
"""

import ast
import builtins
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pages import PAGES, ROOT, TOP, blocks, named

from sketch_plugins import cli

OWN = {ROOT / "docs" / "quickstart.md", ROOT / "docs" / "extending.md"}
#: A block that uses one of these names is not run here -> what runs the like of it.
ELSEWHERE = {
    "Trainer": "tests/transformers",
    "trainer": "tests/transformers, tests/lightning",
    "lightning": "tests/lightning",
    "accelerator": "tests/accelerate",
    "Accelerator": "tests/accelerate",
    "PartialState": "tests/accelerate",
    "attach": "tests/comm, with two processes",
    "deepspeed": "tests/deepspeed",
    "reshard": "tests/checkpoints",
}
FRAMEWORKS = {
    "sketch_transformers": "transformers",
    "sketch_lightning": "lightning",
    "sketch_deepspeed": "deepspeed",
    "sketch_accelerate": "accelerate",
    "transformers": "transformers",
}
PYTHON = [
    pytest.param(page, options, code, id=f"{named(page)}-{number}")
    for page in [*PAGES, *TOP]
    if page not in OWN
    for number, (_, options, code) in enumerate(blocks(page, "python"))
]
COMMANDS = [
    (named(page), line)
    for page in [*PAGES, *TOP]
    for _, _, code in blocks(page, "sh", "")
    for line in re.sub(r" *\\\n\s*", " ", code).splitlines()
]


def context():
    """The names that fragments use without defining them."""
    import torch

    from sketch_plugins import CSAdam, Sketchy, plan

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    batches = [torch.randn(4, 64) for _ in range(8)]
    return {
        "torch": torch,
        "model": model,
        "optimizer": CSAdam(model.parameters()),
        "Sketchy": Sketchy,
        "plan": plan,
        "batches": batches,
        "loss": lambda model, batch: model(batch.to(next(model.parameters()).dtype)).square().mean(),
    }


def used(code):
    """The names that a block reads without having defined them, and those that it defines."""
    tree = ast.parse(code)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    defined = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    defined |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - set(dir(builtins)), defined


def missing(code):
    """The frameworks that a block imports and that are not installed."""
    wanted = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    return sorted(
        framework
        for name, framework in FRAMEWORKS.items()
        if name in wanted and importlib.util.find_spec(framework) is None
    )


@pytest.mark.parametrize(("page", "options", "code"), PYTHON)
def test_a_block_of_python_runs(page, options, code, tmp_path, monkeypatch):
    read, defined = used(code)  # a block that is no Python at all fails here
    for framework in missing(code):
        pytest.skip(f"{framework} is not installed")
    monkeypatch.chdir(tmp_path)
    known = {} if options else context()
    not_run = sorted((read | defined) & set(ELSEWHERE))
    if not_run and not options:
        # What it imports of ours must be there.
        for line in ast.parse(code).body:
            if isinstance(line, ast.ImportFrom) and line.module.startswith("sketch_"):
                exec(compile(ast.Module([line], []), named(page), "exec"), {})
        pytest.skip(f"it uses {', '.join(not_run)}: {ELSEWHERE[not_run[0]]} run the like of it")
    undefined = read - defined - set(known) - {"TrainingArguments"}
    assert not undefined, f"{named(page)}: {sorted(undefined)} are neither defined nor in the context of this test"
    if "TrainingArguments" in read:
        import transformers

        import sketch_transformers  # noqa: F401

        known["TrainingArguments"] = transformers.TrainingArguments
    exec(compile(code, named(page), "exec"), {"__name__": "__main__", **known})


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page, line in COMMANDS if line.strip().startswith("sketch-plugins ")]
)
def test_a_command_has_options_that_exist(page, line, capsys):
    words = shlex.split(re.sub(r" > \S+", "", line.replace("...", "")), comments=True)[1:]
    words = [word for word in words if word not in ("[--output", "DIR]", "[--trust]")]
    try:
        cli.parser().parse_args(["4" if word in ("N", "M") else word for word in words])
    except SystemExit as ended:
        assert ended.code == 0, f"{page}: {line}\n{capsys.readouterr().err}"


def test_every_target_of_make_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, *TOP]:
        asked = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        asked = {one or other for one, other in asked}
        assert asked <= targets, f"{named(page)}: make {sorted(asked - targets)}"


def test_blocks_are_found():
    assert len(PYTHON) > 30 and sum(bool(one.values[1]) for one in PYTHON) >= 5
    assert sum(line.strip().startswith("sketch-plugins ") for _, line in COMMANDS) > 20
