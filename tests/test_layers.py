"""Imports between modules: no circles, and only downwards through the layers that docs/architecture.md lists."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The heading of the list, which ends with its fenced block.
HEADING = "## Layers"
#: Integrations that the core looks up by name, where it has a checkpoint or a model of the framework before it.
LOOKED_UP = {
    ("sketch_plugins.checkpoints.reading", "sketch_deepspeed.contents"),
    ("sketch_plugins.memory.plan_model", "sketch_transformers.planning"),
}


def modules(root):
    """Name -> file, of the core and of every integration below ``root``."""
    found = {}
    for source in (root, root / "integrations"):
        for package in source.glob("sketch_*"):
            for file in package.rglob("*.py"):
                parts = file.relative_to(source).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(root):
    """Module -> the modules of ours that it imports: at its top, in a function, for type checkers, or by a literal.

    A package that has to be executed before one of its modules does not count, for it is no wish of the importer's.
    """
    known = modules(root)
    graph = {}
    for name, file in known.items():
        wanted = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} is a relative import"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    wanted.add(full if full in known else node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                wanted |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        graph[name] = {other for other in wanted if other in known and other != name}
    return graph


def circle(graph):
    """One circle of ``graph``, as a text; None if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return None


def layers():
    """The modules and packages that docs/architecture.md lists, the lowest layer first."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(rf"^{HEADING}$.*?^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert block is not None, f"docs/architecture.md has no fenced block under {HEADING!r}"
    return [line.split() for line in block[1].splitlines()]


def tree():
    """The modules that docs/architecture.md lists under "Files": names in one line are separated by commas."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"^## Files$.*?^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found, folders = set(), []
    for line in block[1].splitlines():
        indent, names = re.match(r"( *)([^\s,]+(?:, [^\s,]+)*)", line).groups()
        if len(indent) > 8:  # the rest of the line above, or a caption
            continue
        folders = folders[: len(indent) // 2]
        for name in names.split(", "):
            found.add(".".join([*folders, *name.rstrip("/").split("/")]).removeprefix("integrations."))
        if names.endswith("/"):
            folders.append(names[:-1])
    return found - {"integrations"}


def entry_of(module, entries):
    """The entry that ``module`` belongs to: itself, or the nearest package around it; None without one."""
    name = module.removeprefix("sketch_plugins.")
    while name not in entries:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def upwards(graph, listed):
    """Imports of a higher layer, and of a neighbour in the same one."""
    height = {entry: at for at, layer in enumerate(listed) for entry in layer}
    found = []
    for module, others in graph.items():
        for other in others:
            mine, theirs = entry_of(module, height), entry_of(other, height)
            if mine != theirs and height[theirs] >= height[mine]:
                found.append(f"{module} imports {other}")
    return sorted(found)


@pytest.fixture(scope="module")
def graph():
    return imports(ROOT)


def test_no_circles(graph):
    assert len(graph) > 100
    assert circle(graph) is None


def test_every_module_has_a_layer_and_every_entry_a_module(graph):
    entries = [entry for layer in layers() for entry in layer]
    assert len(set(entries)) == len(entries)
    used = {module: entry_of(module, entries) for module in graph}
    assert [module for module, entry in used.items() if entry is None] == []
    assert set(entries) - set(used.values()) == set()


def test_the_list_of_files_has_every_module(graph):
    initial = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("sketch_plugins/**/__init__.py")}
    assert tree() - initial == {name for name in graph if name not in initial}


def test_imports_go_down(graph):
    by_import = {name: {other for other in others if (name, other) not in LOOKED_UP} for name, others in graph.items()}
    assert upwards(by_import, layers()) == []


def test_the_core_imports_no_integration_and_integrations_no_other(graph):
    across = {
        (module, other)
        for module, others in graph.items()
        for other in others
        if other.partition(".")[0] not in ("sketch_plugins", module.partition(".")[0])
    }
    assert {pair for pair in across if pair[0].startswith("sketch_plugins")} == LOOKED_UP
    packages = {tuple(name.partition(".")[0] for name in pair) for pair in across - LOOKED_UP}
    assert packages == {("sketch_accelerate", "sketch_deepspeed")}


@pytest.mark.parametrize(
    "text",
    [
        "from sketch_plugins.upper import name",
        "from sketch_plugins import upper",
        "import sketch_plugins.upper",
        "def function():\n    from sketch_plugins.upper import name",
        "if TYPE_CHECKING:\n    from sketch_plugins.upper import Name",
        "def function():\n    importlib.import_module('sketch_plugins.upper')",
    ],
)
def test_a_planted_circle_is_found(text, tmp_path):
    """And the import that goes up through the layers."""
    package = tmp_path / "sketch_plugins"
    package.mkdir()
    (package / "lower.py").write_text(text)
    (package / "upper.py").write_text("from sketch_plugins.lower import other\n")
    found = imports(tmp_path)
    assert "sketch_plugins.lower" in circle(found)
    assert upwards(found, [["lower"], ["upper"]]) == ["sketch_plugins.lower imports sketch_plugins.upper"]
    assert upwards(found, [["lower", "upper"]]) == [
        "sketch_plugins.lower imports sketch_plugins.upper",
        "sketch_plugins.upper imports sketch_plugins.lower",
    ]
