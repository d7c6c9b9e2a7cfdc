"""The code of the pages: what has a file's name runs as it stands, the rest as far as one process without a GPU can.

docs/quickstart.md and docs/extending.md have tests of their own, which run them whole. The commands of the pages are in
test_commands.py.
"""

import ast
import builtins
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from pages import FENCE, PAGES, ROOT, TOP, blocks, named

from sketch_plugins import registry

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


def test_settings_of_other_formats_are_accepted():
    """YAML is Trainer's arguments; JSON is a configuration of DeepSpeed, whose optimizer takes our options."""
    found = [block for page in [*PAGES, *TOP] for block in blocks(page, "yaml", "json")]
    assert {language for language, _, _ in found} == {"yaml", "json"}
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    import sketch_transformers  # noqa: F401

    for language, _, code in found:
        if language == "yaml":
            transformers.TrainingArguments("out", use_cpu=True, report_to="none", **yaml.safe_load(code))
        else:
            block = json.loads(code)["optimizer"]
            registry.get(block["type"]).cls([torch.nn.Parameter(torch.ones(64, 64))], **block["params"])


def test_arguments_of_a_command_line_are_accepted():
    """Lines of arguments alone, as docs/transformers.md has them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import sketch_transformers  # noqa: F401

    found = [line for page in PAGES for line in re.findall(r"^    (--\w.*)$", FENCE.sub("", page.read_text()), re.M)]
    assert len(found) >= 5
    for line in found:
        words = ["--output_dir", "out", "--use_cpu", "--report_to", "none", *line.split()]
        (args,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses(words)
        assert args.optim in registry.names(), line


def test_blocks_are_found():
    assert len(PYTHON) > 30 and sum(bool(one.values[1]) for one in PYTHON) >= 5
