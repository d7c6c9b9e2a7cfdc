"""An option is declared once: the signature, the docstring, the defaults and the validation are made of that."""

import inspect
import typing
from typing import Annotated, TypedDict

import pytest
import torch
from typing_extensions import Unpack

from sketch_plugins import CSAdam, registry
from sketch_plugins.optim import family
from sketch_plugins.optim.declaring import declared, option, with_options
from sketch_plugins.optim.options import BY_POSITION, NoEffect


def keywords(cls):
    """The TypedDict of ``**options``, which editors and type checkers read."""
    hint = typing.get_type_hints(cls.__init__, include_extras=True)["options"]
    (unpacked,) = typing.get_args(hint)
    return unpacked


def test_every_option_is_in_the_signature_with_its_type(name):
    cls = registry.get(name).cls
    shown = inspect.signature(cls).parameters
    assert shown.keys() == {"params", "preset"} | cls.OPTIONS.keys() | cls.NO_EFFECT.keys()
    hints = typing.get_type_hints(keywords(cls))
    by_keyword = {name: one for name, one in shown.items() if name in hints}
    assert by_keyword.keys() == hints.keys() == shown.keys() - {"params", "preset"} - BY_POSITION.keys()
    for option_name, parameter in by_keyword.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.annotation == hints[option_name] is not None
        nothing = type(None) in typing.get_args(hints[option_name])
        one = {**cls.OPTIONS, **cls.NO_EFFECT}[option_name]
        assert parameter.default == (one.default if isinstance(one, NoEffect) or not nothing else None)


def test_every_default_is_the_declared_one_and_allowed(name):
    cls = registry.get(name).cls
    first, *_ = cls.PRESETS
    assert first == "default"
    for option_name, value in cls.PRESETS["default"].items():
        assert cls.OPTIONS[option_name].validate(value) == value
        if option_name not in BY_POSITION:
            assert cls.OPTIONS[option_name].default == value
    p = torch.nn.Parameter(torch.zeros(2))
    (group,) = cls([p]).param_groups
    assert {key: group[key] for key in cls.PRESETS["default"]} == cls.PRESETS["default"]


def test_the_docstring_says_each_of_them_with_its_default(name):
    cls = registry.get(name).cls
    text = inspect.getdoc(cls)  # whose lines begin at the same place in every Python
    assert "{options}" not in text and max(map(len, cls.__doc__.splitlines())) <= 120
    for option_name in keywords(cls).__annotations__:
        assert text.count(f"\n    {option_name}: ") == 1, option_name
    said = " ".join(text.split())
    assert ("Default 4096." in said) == (cls.PRESETS["default"]["min_compress_size"] == 4096)


def test_no_option_of_the_family_is_declared_twice():
    sets = [one for one in vars(family).values() if isinstance(one, type) and one.__module__ == family.__name__]
    single = [one for one in sets if not one.__name__.startswith("_") and one is not family.Decoupled]
    names = [option_name for one in single for option_name in one.__annotations__]
    assert len(names) - len(set(names)) == 0, sorted(names)
    assert set(declared(family._Family)) | BY_POSITION.keys() == family.FAMILY.keys()


def test_an_unknown_keyword_is_pythons_error_with_a_hint():
    with pytest.raises(TypeError, match=r"CSAdam has no option 'compresion'\. Did you mean 'compression'\?"):
        CSAdam([torch.nn.Parameter(torch.zeros(2))], compresion=0.1)


def test_a_subclass_has_a_signature_of_its_own():
    class Mine(CSAdam):
        def __init__(self, params, speed=1.0):
            super().__init__(params, lr=speed)

    assert list(inspect.signature(Mine).parameters) == ["params", "speed"]
    assert inspect.signature(type("Same", (CSAdam,), {})) == inspect.signature(CSAdam)


def test_a_configuration_reads_types_from_the_signature():
    """LightningCLI and others build a class from YAML in this way."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(CSAdam, "optimizer", skip={"params"})
    found = parser.parse_args(["--optimizer.compression=0.25", "--optimizer.batch_dims=1", "--optimizer.fused=false"])
    assert (found.optimizer.compression, found.optimizer.batch_dims, found.optimizer.fused) == (0.25, 1, False)


def test_what_is_declared_without_an_option_is_an_error():
    class Wrong(TypedDict, total=False):
        speed: float

    with pytest.raises(TypeError, match=r"Wrong.speed is declared without an option: write Annotated\["):
        declared(Wrong)


def test_changes_are_this_optimizers_alone():
    class Own(TypedDict, total=False):
        speed: Annotated[float | None, option(0.5, "how fast.", allowed="a number > 0", check=lambda v: v > 0)]

    class Keywords(Own, family.Torchs, total=False):
        pass

    @with_options(Keywords, speed={"default": 2.0})
    class One:
        """One.

        Args:
            lr: rate.
        {options}
        """

        PRESETS: typing.ClassVar = {"slow": {"speed": 0.1}}

        def __init__(self, params, lr=0.1, **options: Unpack[Own]):
            pass

    assert One.PRESETS == {"default": {"speed": 2.0}, "slow": {"speed": 0.1}}
    assert declared(Own)["speed"].default == 0.5 and One.OPTIONS["speed"].type is float
    assert One.OPTIONS.keys() == {"lr", "speed"} and all(isinstance(one, NoEffect) for one in One.NO_EFFECT.values())
    assert "\nspeed: how fast. Default 2." in "\n".join(map(str.strip, inspect.getdoc(One).splitlines()))


def test_a_docstring_has_a_place_for_the_options():
    class Keywords(family.Torchs, total=False):
        pass

    class Undescribed:
        """Without one."""

        PRESETS: typing.ClassVar = {}

        def __init__(self, params, **options: Unpack[Keywords]):
            pass

    with pytest.raises(TypeError, match=r"the docstring of Undescribed has no line \{options\} under Args"):
        with_options(Keywords)(Undescribed)


def test_an_optimizer_of_ones_own_on_top_of_another():
    class Keywords(family._Family, total=False):
        pass

    @with_options(Keywords, update_clip={"default": 1.0})
    class Mine(CSAdam):
        """Clipped.

        Args:
            {options}
        """

        def __init__(self, params, lr=1e-3, *, preset="default", **options: Unpack[Keywords]):
            super().__init__(params, lr, preset=preset, **options)

    (group,) = Mine([torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert group["update_clip"] == 1.0 and group["betas"] == (0.9, 0.999)
    assert "lean" in Mine.PRESETS and CSAdam.PRESETS["default"]["update_clip"] == 0.0
    assert list(inspect.signature(CSAdam).parameters)[:3] == ["params", "lr", "betas"]
    with pytest.raises(TypeError, match="Bare needs a constructor of its own"):
        with_options(Keywords)(type("Bare", (CSAdam,), {"__doc__": "{options}\n"}))


#: Words of stores and options, and the option whose choices have them, or which has that name.
WORDS = {"log8": "second_moment", "count_min": "second_moment", "clean_every": "clean_every"}


def test_entries_name_nothing_that_the_optimizer_lacks(name):
    cls = registry.get(name).cls
    for one in cls.OPTIONS.values():
        for word, needed in WORDS.items():
            if word in one.doc:
                found = cls.OPTIONS.get(needed)
                assert found is not None and (word == needed or word in found.choices), one
