import copy

import pytest
import torch

from sketch_plugins import CSAdagrad, CSAdam, CSMomentum, CSRMSprop, registry
from sketch_plugins.optim.options import Option

from .conftest import known, parameters, train


def matrix(dtype=torch.float32, rows=64, columns=70):
    return torch.nn.Parameter(torch.randn(rows, columns).to(dtype))


BAD = [
    ({"lr": -1.0}, ["lr=-1.0", ">= 0"]),
    ({"lr": "fast"}, ["lr='fast'"]),
    ({"lr": float("nan")}, ["lr=nan"]),
    ({"lr": 10**400}, ["lr=1000"]),
    ({"lr": torch.tensor(-1.0)}, ["lr=tensor(-1.)"]),
    ({"lr": torch.tensor([1.0, 2.0])}, ["one element"]),
    ({"lr": 1e39}, ["lr=1e+39", "float32"]),
    ({"lr": torch.tensor(1e300, dtype=torch.float64)}, ["lr=tensor(1.0000e+300", "float32"]),
    ({"weight_decay": 1e300}, ["weight_decay=1e+300", "float32"]),
    ({"eps": 1e39}, ["eps=1e+39", "float32"]),
    ({"eps": torch.tensor(1e39, dtype=torch.float64)}, ["eps=tensor", "float32"]),
    ({"weight_decay": torch.tensor(-1.0)}, ["weight_decay=tensor(-1.)", ">= 0"]),
    ({"weight_decay": torch.tensor([0.1])}, ["weight_decay=tensor([0.1000])"]),
    ({"weight_decay": torch.tensor(True)}, ["weight_decay=tensor(True)"]),
    ({"betas": (torch.tensor(0.9), torch.tensor(1.0))}, ["betas=(tensor(0.9000), tensor(1.))", "[0, 1)"]),
    ({"betas": (0.9, 1.0)}, ["betas=(0.9, 1.0)", "[0, 1)"]),
    ({"betas": 0.9}, ["betas=0.9"]),
    ({"eps": -1e-8}, ["eps=-1e-08"]),
    ({"weight_decay": -0.1}, ["weight_decay=-0.1"]),
    ({"compression": 0.0}, ["compression=0.0", "(0, 1]"]),
    ({"compression": 1.5}, ["compression=1.5"]),
    ({"width": -3}, ["width=-3"]),
    ({"width": 2.5}, ["width=2.5"]),
    ({"depth": 0}, ["depth=0", ">= 1"]),
    ({"hash": "md5"}, ["hash='md5'", "'strided', 'affine'"]),
    ({"seed": "zero"}, ["seed='zero'"]),
    ({"row_sparse": "maybe"}, ["row_sparse='maybe'", "'auto'"]),
    ({"row_sparse": 1}, ["row_sparse=1"]),
    ({"chunk_size": -1}, ["chunk_size=-1"]),
    ({"update_clip": -1.0}, ["update_clip=-1.0"]),
    ({"scale_parameter": "yes"}, ["scale_parameter='yes'"]),
    ({"min_compress_size": -1}, ["min_compress_size=-1"]),
    ({"width": 5, "compression": 0.1}, ["width=5", "compression=0.1", "use one of them"]),
    ({"preset": "leen"}, ["preset='leen'", "'default'"]),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda v: str(v)[:40])
def test_a_bad_value_is_named_with_what_is_allowed(name, options, words):
    if known(name, options) != options or (name in ("sm3", "cs_lion") and isinstance(options.get("betas"), tuple)):
        pytest.skip(f"{name} has no such option, or allows this value; test_sm3.py and test_lion.py have its own")
    cls = registry.get(name).cls
    with pytest.raises(ValueError) as error:
        cls([matrix()], **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    if options != {"preset": "leen"}:
        with pytest.raises(ValueError) as error:  # the same in a parameter group
            cls([{"params": [matrix()], **options}])
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CSAdam, {"first_moment": "int4"}),
        (CSAdam, {"second_moment": "cover!"}),
        (CSAdam, {"block_size": 0}),
        (CSAdam, {"first_moment_rounding": "up"}),
        (CSAdam, {"clean_every": -1}),
        (CSAdam, {"clean_factor": 2.0}),
        (CSAdam, {"bucket": "max"}),
        (CSMomentum, {"momentum": 1.0}),
        (CSMomentum, {"nesterov": 1}),
        (CSMomentum, {"momentum": 0.9, "betas": (0.8, 0.9)}),
        (CSAdagrad, {"lr_decay": -1.0}),
        (CSAdagrad, {"initial_accumulator_value": -1.0}),
    ],
    ids=str,
)
def test_bad_values_of_single_optimizers(cls, options):
    key, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{key}={value!r}".replace("(", r"\(")):
        cls([matrix()], **options)


def test_unknown_options_are_errors(name):
    cls = registry.get(name).cls
    with pytest.raises(TypeError, match="compresion"):
        cls([matrix()], compresion=0.1)
    for slip in ("compresion", "weight_decy", "preset_", "row_sparce"):
        with pytest.raises(ValueError, match=slip):
            cls([{"params": [matrix()], slip: 0.1}])
    # frameworks keep keys of their own
    group = {"params": [matrix()], "initial_lr": 0.1, "name": "decoder", "lr_scale": 0.5, "no_weight_decay": True}
    assert cls([group]).param_groups[0]["initial_lr"] == 0.1


def test_every_constructor_takes_what_frameworks_pass(name):
    registry.get(name).cls([matrix()], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)


def test_complex_integer_and_sparse_parameters_are_refused_by_name(name):
    cls = registry.get(name).cls
    good = matrix()
    with pytest.raises(ValueError, match=r"'spectrum' of shape \(3,\) is complex"):
        cls([("w", good), ("spectrum", torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])
    with pytest.raises(ValueError, match="parameter 1 of group 0"):
        cls([good, torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="int32"):
        cls([torch.nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)])
    optimizer = cls([good])
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_groups_override_presets_and_constructor():
    a, b, c, d = (matrix() for _ in range(4))
    optimizer = CSAdam(
        [
            {"params": [a]},
            {"params": [b], "compression": 0.5, "lr": 0.5},
            {"params": [c], "preset": "exact"},
            {"params": [d], "preset": "lean", "first_moment": "bf16"},
        ],
        lr=0.1,
        compression=0.1,
        first_moment="fp32",
        weight_decay=0.3,
    )
    groups = optimizer.param_groups
    assert [g["compression"] for g in groups] == [0.1, 0.5, 0.05, 0.05]
    assert [g["first_moment"] for g in groups] == ["fp32", "fp32", "fp32", "bf16"]
    assert [g["second_moment"] for g in groups] == ["count_min", "count_min", "dense", "count_min"]
    assert [g["update_clip"] for g in groups] == [0, 0, 0, 1.0]
    assert [g["lr"] for g in groups] == [0.1, 0.5, 0.1, 0.1] and {g["weight_decay"] for g in groups} == {0.3}
    optimizer = CSAdam([{"params": [matrix()], "compression": 0.5}], width=3)
    assert optimizer.param_groups[0]["width"] == 0
    optimizer.add_param_group({"params": [matrix()], "width": 7})
    for p in optimizer.param_groups[0]["params"] + optimizer.param_groups[1]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tables = [optimizer.state[p]["second_moment.table"].shape for g in optimizer.param_groups for p in g["params"]]
    assert tables == [(1, 32, 70), (1, 7, 70)]


def test_paper_presets_are_those_of_the_paper():
    optimizer = CSAdam([matrix(rows=300)], preset="paper_cs_mv")
    group = optimizer.param_groups[0]
    assert (group["first_moment"], group["second_moment"], group["depth"], group["bucket"]) == (
        "count_sketch", "count_min", 3, "sum",
    )  # fmt: skip
    assert (group["clean_every"], group["clean_factor"], group["hash"]) == (125, 0.2, "affine")
    p = group["params"][0]
    planned = optimizer.planned_state(p, group)
    assert {name: bytes / (4 * p.numel()) for name, (_, bytes) in planned.items()} == pytest.approx(
        {"first_moment": 0.2, "second_moment": 0.2}
    )
    assert CSAdam([matrix()], preset="paper_cs_v").param_groups[0]["first_moment"] == "fp32"
    assert CSAdam([matrix()], preset="paper_cs_v", depth=2).param_groups[0]["depth"] == 2
    assert CSRMSprop([matrix()], preset="paper_cs_v").param_groups[0]["depth"] == 3
    assert CSAdagrad([matrix()], preset="paper").param_groups[0]["clean_factor"] == 0.5
    assert CSMomentum([matrix()], preset="paper").param_groups[0]["first_moment"] == "count_sketch"


def test_every_preset_trains_on_an_embedding(name):
    """A bag-of-words regression; row-sparse, because the paper's presets are meant for that."""
    cls = registry.get(name).cls
    for preset in cls.PRESETS:
        torch.manual_seed(0)
        target, module = torch.randn(60, 8), torch.nn.Embedding(60, 8, sparse=True)
        # the gradient of a mean over 512 elements is small: what SGD calls a learning rate differs
        lr = 5.0 if name == "cs_momentum" else 0.05
        optimizer = cls(module.parameters(), lr=lr, preset=preset, min_compress_size=0)
        losses = []
        for _ in range(120):
            index = torch.randint(0, 60, (64,))
            loss = (module(index) - target[index]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # Slowest is paper_cs_mv, with 12 buckets for the 60 rows, nearly all of them touched in every step.
        assert sum(losses[-10:]) < 0.95 * sum(losses[:10]), preset


@pytest.mark.parametrize("cls", [CSAdam, CSMomentum])
def test_a_signed_sketch_of_a_dense_first_moment_is_refused_before_anything_changes(cls):
    dense, sparse = matrix(), torch.nn.Embedding(100, 64, sparse=True)
    optimizer = cls([sparse.weight, dense], first_moment="count_sketch")
    before = [p.detach().clone() for p in (sparse.weight, dense)]
    sparse(torch.tensor([1, 2])).sum().backward()
    dense.grad = torch.ones_like(dense)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*does not train.*allow_dense_count_sketch"):
        optimizer.step()
    assert torch.equal(sparse.weight, before[0]) and torch.equal(dense, before[1]) and not optimizer.state
    dense.grad = None
    optimizer.step()  # row-sparse gradients are what it is for
    assert not torch.equal(sparse.weight, before[0])
    insisting = cls([dense], first_moment="count_sketch", allow_dense_count_sketch=True)
    dense.grad = torch.ones_like(dense)
    insisting.step()
    assert not torch.equal(dense, before[1])
    tiny = torch.nn.Parameter(torch.zeros(3))
    vector = cls([tiny], first_moment="count_sketch")  # vectors are exact: nothing to refuse
    tiny.grad = torch.ones(3)
    vector.step()


def test_gradients_that_cannot_be_used_change_nothing(name):
    cls = registry.get(name).cls
    a, b = matrix(), matrix(rows=10, columns=10)
    optimizer = cls([a, b])
    before = a.detach().clone()
    a.grad = torch.ones_like(a)
    b.grad = torch.eye(10).to_sparse(2)
    with pytest.raises(ValueError, match="2 sparse dimensions"):
        optimizer.step()
    assert torch.equal(a, before) and not optimizer.state


def test_parsing_text():
    assert registry.parse_options("cs_adam", {"compression": "0.1", "depth": "3", "first_moment": "bf16"}) == {
        "compression": 0.1, "depth": 3, "first_moment": "bf16",
    }  # fmt: skip
    parse = registry.parse_options
    assert parse("cs_adam", {"row_sparse": "auto"}) == {"row_sparse": "auto"}
    assert parse("cs_adam", {"row_sparse": "True"}) == {"row_sparse": True}
    assert parse("cs_adam", {"betas": "0.8:0.9", "preset": "lean"}) == {"betas": (0.8, 0.9), "preset": "lean"}
    assert parse("cs_momentum", {"nesterov": "true"}) == {"nesterov": True}
    for key, value in (
        ("compression", "0"), ("compression", "much"), ("depth", "1.5"), ("row_sparse", "no"), ("nesterov", "1"),
        ("first_moment", "int4"), ("preset", "lena"), ("compresion", "0.1"), ("betas", "0.9"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            parse("cs_momentum" if key == "nesterov" else "cs_adam", {key: value})
        assert key in str(error.value)
    with pytest.raises(ValueError, match="use one of them"):
        parse("cs_adam", {"width": "3", "compression": "0.1"})
    with pytest.raises(ValueError, match="cs_adagrad"):
        registry.get("csadam")


def test_every_option_is_documented(name):
    entry = registry.get(name)
    for option in entry.options.values():
        assert isinstance(option, Option) and option.doc
        assert f"{option.name}:" in entry.cls.__doc__, option.name


def test_default_trajectory_is_reproducible(name):
    results = []
    for _ in range(2):
        params = parameters(shapes=[(70, 80), (9,)], dtype=torch.float32)
        optimizer = registry.get(name).cls(params)
        train(optimizer, params, 5)
        results.append([p.detach() for p in params] + [copy.deepcopy(optimizer.state_dict())])
    for a, b in zip(*[r[:-1] for r in results], strict=True):
        assert torch.equal(a, b)


def test_a_preset_of_a_group_leaves_what_no_preset_sets():
    a, b = matrix(), matrix()
    optimizer = CSAdam([{"params": [a], "preset": "exact"}, {"params": [b]}], maximize=True, seed=7, row_sparse="auto")
    for group in optimizer.param_groups:
        assert (group["maximize"], group["seed"], group["row_sparse"]) == (True, 7, "auto")
    optimizer = CSMomentum([{"params": [a], "preset": "exact"}], nesterov=True, decoupled_weight_decay=True)
    assert optimizer.param_groups[0]["nesterov"] and optimizer.param_groups[0]["decoupled_weight_decay"]
    optimizer = CSMomentum([{"params": [a], "betas": (0.5, 0.9)}, {"params": [b]}])
    assert [g["momentum"] for g in optimizer.param_groups] == [0.5, 0.9]


def test_numbers_of_numpy_become_plain_ones():
    np = pytest.importorskip("numpy", reason="numpy is optional for torch")
    group = CSAdam([matrix()], lr=np.float32(0.5), block_size=np.int64(64)).param_groups[0]
    assert type(group["lr"]) is float and type(group["block_size"]) is int


def test_tensors_and_arrays_of_one_number_are_the_number(name):
    np = pytest.importorskip("numpy", reason="numpy is optional for torch")
    values = {"betas": (0.5, 0.75), "eps": 2.0**-20, "weight_decay": 0.25, "lr": 2.0**-10}
    boxed = {
        "betas": [torch.tensor(0.5), torch.tensor(0.75)],
        "eps": torch.tensor(2.0**-20, dtype=torch.float64),
        "weight_decay": torch.tensor(0.25),
        "lr": np.array(2.0**-10),
    }
    options = known(name, values)
    if name == "cs_momentum":  # it has betas as an argument only
        del options["betas"]
    ends = []
    for when in ("plain", "built", "group", "later", "loaded"):
        p = matrix()
        with torch.no_grad():
            p.fill_(1.0)
        given = {key: boxed[key] for key in options}
        cls = registry.get(name).cls
        if when == "built":
            optimizer = cls([p], **given)
        elif when == "group":
            optimizer = cls([{"params": [p], **given}])
        else:
            optimizer = cls([p], **options)
        if when == "later":
            optimizer.param_groups[0].update(given)
        if when == "loaded":
            saved = optimizer.state_dict()
            saved["param_groups"][0].update(given)
            optimizer.load_state_dict(saved)
        for _ in range(3):
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        ends.append(p.detach())
        group = optimizer.param_groups[0]
        assert {key: group[key] for key in options} == options
        assert all(type(group[key]) is type(value) for key, value in options.items())
        copy.deepcopy(optimizer)
    assert all(torch.equal(end, ends[0]) for end in ends)


#: Allowed numbers whose products, or quotients, exceed float32.
PRODUCTS = [
    {"lr": 1e30, "weight_decay": 1e30},
    {"lr": 3e38, "scale_parameter": True, "reference_rms": 1e-30},
    {"eps": 3e38},
]


@pytest.mark.filterwarnings("ignore:parameter group 0", "ignore:the covariance of")
@pytest.mark.parametrize("options", PRODUCTS, ids=lambda v: next(reversed(v)))
def test_products_beyond_float32_leave_no_step_half_taken(name, options):
    """The weights become infinite or NaN, or do not move; every step is counted."""
    if known(name, options) != options:
        pytest.skip(f"{name} has no such option")
    for sparse in (False, True):
        p = matrix(rows=200, columns=100)  # more than `pending.UNDO`
        optimizer = registry.get(name).cls([p], fused=False, **options)
        for _ in range(3):
            p.grad = torch.zeros_like(p)
            p.grad[:3] = 0.5
            if sparse:
                p.grad = p.grad.to_sparse(1)
            optimizer.step()
        assert optimizer.state[p]["step"] == 3


def test_a_rate_beyond_float32_is_refused_before_anything_changes(name):
    for value in (1e39, torch.tensor(1e300, dtype=torch.float64)):
        p = matrix(rows=200, columns=100)
        optimizer = registry.get(name).cls([p], fused=False)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
        before = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.param_groups[0]["lr"] = value
        with pytest.raises(ValueError, match=r"lr=.* that float32 can hold"):
            optimizer.step()
        assert torch.equal(p, before[0]) and str(optimizer.state_dict()["state"]) == str(before[1])


def test_a_parameter_twice_in_a_group_is_refused(name):
    p = matrix()
    with pytest.raises(ValueError, match="more than once"):
        registry.get(name).cls([p, p])
    optimizer = registry.get(name).cls([matrix()])
    with pytest.raises(ValueError, match="more than once"):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("preset", ["exact", "lean", "bogus", None])
def test_a_preset_that_is_set_in_a_group_later_is_refused(name, preset):
    p = matrix()
    optimizer = registry.get(name).cls([p])
    optimizer.param_groups[0]["preset"] = preset
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=f"preset of group 0 was 'default' and is now {preset!r}"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["preset"] = "default"
    optimizer.step()


def test_a_key_of_the_user_s_with_the_name_of_the_mark_is_refused(name):
    p = matrix()
    cls = registry.get(name).cls
    for value in ("mine", 3, None, '{"optimizer": 3}'):
        with pytest.raises(ValueError, match="Use another name for your own key"):
            cls([{"params": [p], "sketch_plugins": value}])
    optimizer = cls([p])
    twin = cls(optimizer.param_groups)  # groups of an optimizer have its own mark
    assert twin.param_groups[0]["sketch_plugins"] == optimizer.param_groups[0]["sketch_plugins"]
    optimizer.param_groups[0]["sketch_plugins"] = "mine"
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="Use another name for your own key"):
        optimizer.step()
