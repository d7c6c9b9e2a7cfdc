"""`sketch_plugins.patching`: names of a framework, which is a package on disk here, are found or missed by name."""

import importlib
import inspect
import sys

import pytest

from sketch_plugins import patching

INIT = "__version__ = '1.2'\n"
EARLY = """
class Early:
    pass

import builtins
seen = builtins.look_at_half_imported()

class Late:
    pass
"""
PARTS = """
class Class:
    def method(self):
        return 1

    @staticmethod
    def static():
        return 2

def function():
    return 3
"""


class MovedHere(patching.MovedSymbolError):
    """Each integration has such an error."""


@pytest.fixture
def framework(tmp_path, monkeypatch):
    """A package with another name in each test, because the modules stay imported."""
    name = f"framework_{tmp_path.name}".replace("-", "_").lower()
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text(INIT)
    (package / "parts.py").write_text(PARTS)
    (package / "early.py").write_text(EARLY)
    (package / "broken.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    touched = ((f"{name}.early", "Early"), (f"{name}.early", "Late"), (f"{name}.parts", "Class.method"))
    return patching.Framework(name, touched, "do its work", "That works.", MovedHere)


def test_messages_say_what_where_and_what_to_do(framework):
    name = framework.package
    assert framework.find(f"{name}.parts", "Class.method")(None) == 1
    rest = f"is missing in {name} 1.2: this version of sketch-plugins cannot do its work there. That works."
    for module, missing, symbol in (
        ("parts", "Class.gone", ".Class.gone"),
        ("gone", "Class", ""),
        ("gone.on", "X", ""),
    ):
        with pytest.raises(MovedHere) as error:
            framework.find(f"{name}.{module}", missing)
        assert str(error.value) == f"{name}.{module}{symbol} {rest}"
    with pytest.raises(patching.MovedSymbolError, match=rf"{name}\.parts\.Other is missing"):
        framework.check([(f"{name}.parts", "Class.method"), (f"{name}.parts", "Other")])


def test_what_is_not_installed_has_not_moved(framework):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        framework.find(f"{framework.package}.broken", "name")
    absent = patching.Framework("a_package_that_nobody_has", (), "do its work", "That works.")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        absent.find("a_package_that_nobody_has.module", "name")


def test_a_half_imported_module_is_waited_for(framework, monkeypatch):
    name = framework.package

    def look():
        found = [framework.find_if_there(module, symbol) for module, symbol in framework.touched]
        assert f"{name}.parts" not in sys.modules  # not imported from here
        return found

    monkeypatch.setattr("builtins.look_at_half_imported", look, raising=False)
    early = importlib.import_module(f"{name}.early")
    assert early.seen == [early.Early, None, None]
    late, method = (framework.find_if_there(module, symbol) for module, symbol in framework.touched[1:])
    assert late is early.Late and method(None) == 1
    with pytest.raises(MovedHere, match=r"early\.Gone is missing"):
        framework.find_if_there(f"{name}.early", "Gone")


def test_each_is_wrapped_once_and_stays_what_it_was(framework):
    parts = importlib.import_module(f"{framework.package}.parts")
    stock = parts.Class.method

    def more(method):
        return lambda *args: method(*args) + 10

    for _ in range(2):
        patching.wrap(parts.Class, "method", more)
        patching.wrap(parts.Class, "static", more)
        patching.wrap(parts, "function", more)
    made = parts.Class()
    assert (made.method(), made.static(), parts.Class.static(), parts.function()) == (11, 12, 12, 13)
    assert isinstance(inspect.getattr_static(parts.Class, "static"), staticmethod)
    assert inspect.unwrap(parts.Class.method) is stock and patching.is_ours(parts.function)


@pytest.mark.parametrize("name", ["transformers", "lightning", "accelerate", "deepspeed"])
def test_each_integration_has_an_error_of_its_own(name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    error = importlib.import_module(f"sketch_{name}._private").MovedSymbolError
    assert issubclass(error, patching.MovedSymbolError) and error.__module__ == f"sketch_{name}._private"
