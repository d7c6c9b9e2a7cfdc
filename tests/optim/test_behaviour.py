"""What users of torch.optim rely on: dtypes, scalers, schedulers, closures, layouts, copies."""

import copy
import io
import os
import pickle
import shutil

import pytest
import torch

from sketch_plugins import SM3, CSAdam, CSMomentum, MemSGD, SAdagrad, Sketchy, registry

from .conftest import SHAPES, gradients, known, parameters, train

SMALL = {"min_compress_size": 0, "compression": 0.2}


def make(name, params, **options):
    return registry.get(name).cls(params, **{**known(name, SMALL), **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_parameters_follow_the_float32_run_up_to_one_rounding(name, dtype):
    low = parameters(dtype=dtype)
    high = [torch.nn.Parameter(p.detach().float()) for p in low]
    a, b = make(name, low, lr=0.05), make(name, high, lr=0.05)
    for p, q, g in zip(low, high, gradients(dtype=dtype), strict=True):
        p.grad, q.grad = g, g.float()
    a.step()
    b.step()
    for p, q in zip(low, high, strict=True):
        assert torch.equal(p, q.to(dtype))  # arithmetic is float32; the parameter is rounded once
    for state in a.state.values():
        for moment in ("first_moment", "second_moment"):
            for key, tensor in state.get(moment, {}).items():
                assert tensor.dtype == (torch.int8 if key == "codes" else torch.float32)


VARIANTS = {
    "cs_adam": [
        {},
        {"preset": "lean"},
        {"second_moment": "row_count_min"},
        {"second_moment": "row_count_min", "depth": 2},
        {"second_moment": "cover"},
        {"first_moment": "count_sketch", "allow_dense_count_sketch": True},
    ],
    "cs_adagrad": [{}, {"second_moment": "row_count_min"}, {"second_moment": "cover"}],
    "sm3": [{}, {"variant": "I"}, {"preset": "lean"}, {"preset": "exact"}],
}


FEW = [(7, 5), (26, 3), (5,), (), (2, 3, 2, 2), (1, 20), (20, 1), (0, 3)]


@pytest.mark.parametrize("chunk", [1, 70, 300, 700])
def test_the_chunk_size_does_not_matter(name, chunk):
    # (64, 33) with 13 buckets: slices of a cycle, whole cycles, several cycles to a tile and a ragged end
    for options in VARIANTS.get(name, [{}]):
        _check_chunks(name, chunk, options)


def _check_chunks(name, chunk, options):
    runs = []
    # With chunks of one number, the time grows with their number, so there are fewer of them, and two steps.
    shapes, steps = (FEW, 2) if chunk == 1 else (SHAPES, 4)
    for size in (chunk, 10**6):
        params = parameters(shapes)
        train(make(name, params, chunk_size=size, **options), params, steps)
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        # sums over the rows of a bucket are taken in another order
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_layouts_do_not_matter(name):
    torch.manual_seed(0)
    base = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    grads = [torch.randn_like(base) for _ in range(3)]
    layouts = [
        lambda t: t.clone(),
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.repeat_interleave(2, 3)[..., ::2],
    ]
    results = []
    for layout in layouts:
        p = torch.nn.Parameter(layout(base))
        optimizer = make(name, [p], lr=0.1, chunk_size=20)
        for i, g in enumerate(grads):
            p.grad = layouts[i](g)
            optimizer.step()
        results.append(p.detach())
    assert all(torch.equal(r, results[0]) for r in results[1:])
    square = torch.randn(5, 7, dtype=torch.float64)
    p, q = torch.nn.Parameter(square.clone()), torch.nn.Parameter(square.t().contiguous().t())
    for x in (p, q):
        x.grad = square.clone()
        make(name, [x], lr=0.1).step()
    assert torch.equal(p, q)


def test_lr_as_a_tensor_and_schedulers(name):
    runs = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        params = parameters()
        optimizer = make(name, params, lr=lr, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            train(optimizer, params, 1, first=step)
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05 / 16)
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_closure_runs_with_gradients_and_its_loss_is_returned(name):
    p = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = make(name, [p])

    def closure():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_maximize_ascends(name):
    p, q = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    p.grad, q.grad = torch.randn(8, 8), None
    q.grad = -p.grad
    make(name, [p], maximize=True).step()
    make(name, [q]).step()
    assert torch.equal(p, q)


def test_zero_gradients_or_a_zero_learning_rate_do_no_harm(name):
    """Distributed checkpoints and DeepSpeed run such steps on their own."""
    for options in ({"lr": 0.0}, {"weight_decay": 0.0}, {"weight_decay": 0.0, "eps": 0.0}):
        params = parameters()
        before = [p.detach().clone() for p in params]
        optimizer = make(name, params, **options)
        for p in params:
            p.grad = torch.zeros_like(p) if "lr" not in options else torch.randn_like(p)
        optimizer.step()
        for p, q in zip(params, before, strict=True):
            assert torch.equal(p, q)
        train(optimizer, params, 2)
        assert all(p.isfinite().all() for p in params)


def test_parameters_without_gradient_are_left_alone(name):
    params = parameters()
    optimizer = make(name, params)
    params[0].grad = torch.ones_like(params[0])
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert not torch.equal(params[0], before[0]) and list(optimizer.state) == [params[0]]
    assert all(torch.equal(p, q) for p, q in zip(params[1:], before[1:], strict=True))


def test_grad_scaler_unscales_and_skips(name):
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(16, 16)) for _ in range(2))
    plain, scaled = make(name, [p]), make(name, [q])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(16, 16)
    for bad in (False, True, False):
        for parameter, optimizer, scale in ((p, plain, False), (q, scaled, True)):
            optimizer.zero_grad()
            loss = (parameter * x * (float("inf") if bad else 1)).sum()
            if not scale:
                loss.backward()
                if not bad:
                    optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert torch.equal(p, q)
        assert int(scaled.state[q]["step"]) == int(plain.state[p]["step"])


def test_unscaling_and_found_inf_are_left_to_the_scaler(name):
    """Optimizers that announce `_step_supports_amp_scaling` get scaled gradients and have to skip steps themselves."""
    p = torch.nn.Parameter(torch.ones(16, 16))
    optimizer = make(name, [p])
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    seen, plain = [], optimizer.step
    optimizer.step = lambda *args, **kwargs: (seen.append((args, kwargs, p.grad.clone())), plain())
    (scaler.scale(p.sum())).backward()
    scaler.step(optimizer)
    scaler.update()
    ((_, kwargs, grad),) = seen
    assert not kwargs and (grad == 1).all()  # neither grad_scaler nor found_inf; and unscaled
    before = p.detach().clone()
    optimizer.zero_grad()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert len(seen) == 1 and torch.equal(p, before) and scaler.get_scale() == 128.0
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_float16_parameters_and_the_scaler(name):
    """torch does not unscale float16 gradients: its error comes before any change. Unscaled by hand they train."""
    p, q = (torch.nn.Parameter(torch.ones(16, 16, dtype=torch.float16)) for _ in range(2))
    scaled, plain = make(name, [p], lr=0.01), make(name, [q], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(p.float().square().sum()).backward()
    before = p.detach().clone()
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.step(scaled)
    assert torch.equal(p, before) and not scaled.state
    p.grad.div_(256.0)
    scaled.step()
    q.float().square().sum().backward()
    plain.step()
    assert torch.equal(p, q) and (p != before).all()


@pytest.mark.filterwarnings("error:Dynamo detected a call to a:UserWarning")  # it would trace the step's own code
@pytest.mark.parametrize("fused", [None, False])
def test_a_step_inside_a_compiled_function_has_the_bits_of_one_outside(name, fused):
    """torch.compile does not trace the step: there is a graph break before it, and nothing of it is compiled."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        p, embedding = (torch.nn.Parameter(t) for t in parameters([(260, 130), (40, 16)], torch.float32))
        options = known(name, {"fused": fused, "update_clip": 0.5, "weight_decay": 0.1})
        optimizer = make(name, [p, embedding], **options)
        calls = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))

        def train_step(x, index, p=p, embedding=embedding, optimizer=optimizer):
            loss = (x @ p).square().mean() + torch.nn.functional.embedding(index, embedding).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach() * 2

        # The backend runs the pieces uncompiled: the test is about tracing, not about a compiler's result.
        run = torch.compile(train_step, backend="eager") if compiled else train_step
        g = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(4):
            losses.append(run(torch.randn(8, 260, generator=g), torch.randint(0, 40, (6,), generator=g)))
        assert len(calls) == 4 and int(optimizer.state[p]["step"]) == 4
        runs.append([*losses, p.detach(), embedding.detach()])
        if compiled:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert all(map(torch.equal, *runs))


def test_add_param_group_while_training(name):
    params = parameters()
    optimizer = make(name, params[:2])
    train(optimizer, params[:2], 2)
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    train(optimizer, params, 2, first=2)
    assert len(optimizer.state) == len([p for p in params if p.numel()])
    assert int(optimizer.state[params[2]]["step"]) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "weights_only"])
def test_copies_continue_bit_for_bit(name, how):
    params = parameters(dtype=torch.float32)
    optimizer = make(name, params)
    train(optimizer, params, 3)
    if how == "deepcopy":
        other, copies = copy.deepcopy((optimizer, params))
    elif how == "pickle":
        other, copies = pickle.loads(pickle.dumps((optimizer, params)))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = make(name, copies, lr=123.0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
    train(optimizer, params, 3, first=3)
    train(other, copies, 3, first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_hooks_fire_once(name):
    p = torch.nn.Parameter(torch.ones(8, 8))
    optimizer, calls = make(name, [p]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert calls == ["pre", "post"] and optimizer.step.__func__


def test_hidden_matrices_of_extreme_shapes(name):
    for shape in [(1, 1), (1, 31), (33, 1), (2, 1025), (1025, 2), (31, 33)]:
        for options in ({}, {"depth": 3, "hash": "affine"}):
            p = torch.nn.Parameter(torch.randn(shape))
            optimizer = registry.get(name).cls([p], min_compress_size=0, **known(name, options))
            train(optimizer, [p], 3)
            assert p.isfinite().all()


# -- row-sparse ------------------------------------------------------------------------------------------------------


def test_untouched_rows_stay_bit_identical_and_repeated_indices_are_one_row(name):
    torch.manual_seed(0)
    module = torch.nn.Embedding(100, 40, sparse=True)
    optimizer = make(name, module.parameters(), weight_decay=0.1)
    for _ in range(3):
        before = module.weight.detach().clone()
        optimizer.zero_grad()
        index = torch.randint(0, 100, (20,))
        module(torch.cat([index, index])).square().sum().backward()
        optimizer.step()
        changed = (module.weight != before).any(1).nonzero().squeeze(1)
        assert changed.tolist() == index.unique().tolist()


def test_an_empty_sparse_gradient_is_only_a_step(name):
    p = torch.nn.Parameter(torch.randn(10, 40))
    optimizer = make(name, [p])
    p.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 40), (10, 40))
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and int(optimizer.state[p]["step"]) == 1


def test_auto_is_lazy_only_while_most_rows_are_zero():
    def step(p, optimizer, rows):
        p.grad = torch.zeros_like(p)
        p.grad[:rows] = 1.0
        optimizer.step()

    results = {}
    for row_sparse in (False, "auto", True):
        p = torch.nn.Parameter(torch.zeros(10, 40))
        optimizer = CSAdam([p], row_sparse=row_sparse, compression=1.0, min_compress_size=0, weight_decay=0.0)
        step(p, optimizer, 10)
        after_all = p.detach().clone()
        step(p, optimizer, 6)
        six = p.detach().clone()
        step(p, optimizer, 5)
        results[row_sparse] = [bool((a[-1] != b[-1]).any()) for a, b in ((six, after_all), (p.detach(), six))]
    # does the last row, without a gradient, move on its momentum?
    assert results == {False: [True, True], "auto": [True, False], True: [False, False]}


def test_sparse_gradients_of_exact_tensors_vectors_and_3d_parameters(name):
    torch.manual_seed(0)
    for shape in [(6, 3), (9,), (8, 3, 2)]:
        for options in ({}, {"min_compress_size": 10**6}):
            values = torch.randn(2, *shape[1:])
            sparse, dense = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
            sparse.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), values, shape)
            dense.grad = sparse.grad.to_dense()
            free = {"compression": 1.0, "update_clip": 0.0, "scale_parameter": False}
            exact = {**known(name, free), "weight_decay": 0.0, **options}
            make(name, [sparse], row_sparse=False, **exact).step()
            make(name, [dense], row_sparse=True, **exact).step()
            torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-7)
            assert (sparse != 0).reshape(shape[0], -1).any(1).nonzero().squeeze(1).tolist() == [1, 4]


def test_training_diverges_only_where_it_was_said_to():
    """A linear regression: the default converges like AdamW at AdamW's own rate."""
    from torch.optim import AdamW

    losses = {}
    for label, build in (
        ("adamw", lambda p: AdamW(p, lr=0.02)),
        ("default", lambda p: CSAdam(p, lr=0.02, min_compress_size=0)),
    ):
        torch.manual_seed(0)
        model, target = torch.nn.Linear(64, 80), torch.randn(80, 64)
        optimizer = build(model.parameters())
        for _ in range(300):
            x = torch.randn(32, 64)
            loss = (model(x) - x @ target.t()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[label] = loss.item()
    assert losses["default"] < 1.05 * losses["adamw"]


@pytest.mark.skipif(
    not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++")),
    reason="torch.compile needs a C++ compiler",
)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CSAdam, {}),
        (CSAdam, {"preset": "lean"}),
        (CSMomentum, {"nesterov": True, "first_moment": "bf16"}),
        (SM3, {"first_moment": "fp32"}),
    ],
    ids=str,
)
def test_compiled_steps_equal_eager_ones_and_do_not_compile_again(cls, options):
    shapes = [(70, 256), (33, 100), (9,)]
    runs, counts = [], []
    for compile in (False, True):
        params = parameters(shapes, torch.float32)
        optimizer = cls(params, lr=0.05, weight_decay=0.1, min_compress_size=0, compile=compile, **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        for step in range(5):
            train(optimizer, params, 1, first=step)
            scheduler.step()
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        runs.append(params)
    assert counts[5] > 0 and counts[5] == counts[-1]  # a new learning rate or step number compiles nothing
    for p, q in zip(*runs, strict=True):
        # another order of operations; int8 codes may round the other way, 1/254 of a block's maximum
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-3 if cls is CSAdam and not options else 1e-5)


def test_compile_without_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile=True.*no-such-compiler"):
        CSAdam(parameters([(8, 8)]), compile=True)


def test_schedulers_that_cycle_the_momentum(name):
    p = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = make(name, [p])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, base_momentum=0.5, max_momentum=0.9)
    p.grad = torch.ones_like(p)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    group = optimizer.param_groups[0]
    cycled = group["momentum"] if name == "cs_momentum" else group["betas"][0]
    assert cycled < 0.85
    if name == "cs_momentum":  # and what the step reads
        assert "betas" not in group and optimizer._rule(group, 1, False).first.decay == cycled


def test_row_count_min_survives_rows_of_vanishing_gradients(name):
    option = registry.get(name).options.get("second_moment")
    if option is None or "row_count_min" not in option.choices:
        pytest.skip(f"{name} does not keep a second moment in row_count_min")
    p = torch.nn.Parameter(torch.randn(200, 64))
    optimizer = make(name, [p], second_moment="row_count_min")
    for tiny in (1e-15, 1e-19, 1e-20, 1e-22, 1e-30):
        p.grad = torch.randn(200, 64)
        p.grad[5] = tiny
        optimizer.step()
        assert p.isfinite().all()


def test_an_option_of_the_state_changed_in_a_group_is_an_error_and_nothing_happens(name):
    a, b = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2))
    options = {"first_moment": "count_sketch", "allow_dense_count_sketch": True} if name == "cs_momentum" else {}
    optimizer = make(name, [{"params": [a]}, {"params": [b]}], **options)
    train(optimizer, [a, b], 1)
    before = a.detach().clone()
    change = {"sm3": {"second_moment": "dense"}, "cs_lion": {"first_moment": "fp32"}}.get(name, {"compression": 0.5})
    (key, value), was = next(iter(change.items())), optimizer.param_groups[1][next(iter(change))]
    message = f"{key} of group 1 was {was!r} and is now {value!r}.*made with the old value"
    for changed in (optimizer, copy.deepcopy(optimizer)):  # a copy knows the options that its state was written with
        changed.param_groups[1].update(change)
        for group in changed.param_groups:
            group["params"][0].grad = torch.randn(64, 64)
        with pytest.raises(ValueError, match=message):
            changed.step()
        assert int(changed.state[changed.param_groups[0]["params"][0]]["step"]) == 1
    assert torch.equal(a, before)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("lr", float("nan"), "lr=nan is not allowed: lr must be a finite number >= 0"),
        ("lr", -1.0, r"lr=-1\.0 is not allowed"),
        ("eps", None, "eps=None is not allowed"),
        ("weight_decay", "much", "weight_decay='much' is not allowed"),
        ("seed", 5, "seed of group 0 was 0 and is now 5"),
        ("row_sparse", "sometimes", "row_sparse='sometimes' is not one of"),
        ("chunk_size", -1, "chunk_size=-1 is not allowed"),
    ],
)
def test_a_group_changed_between_steps_is_checked_before_the_step(name, option, value, words):
    p = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = make(name, [p])
    train(optimizer, [p], 2)
    before, was = p.detach().clone(), optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert torch.equal(p, before) and int(optimizer.state[p]["step"]) == 2
    optimizer.param_groups[0][option] = was
    optimizer.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay"])
def test_none_for_an_option_without_another_default_is_an_error(name, option):
    if name == "sm3" and option == "lr":
        pytest.skip("presets of sm3 have learning rates of their own")
    with pytest.raises(ValueError, match=f"{option}=None is not allowed: {option} must be"):
        registry.get(name).cls([torch.nn.Parameter(torch.zeros(4, 4))], **{option: None})


def test_cleaning_does_not_wait_for_touched_rows():
    p = torch.nn.Parameter(torch.randn(10, 40))
    optimizer = CSAdam([p], clean_every=2, clean_factor=0.5, **SMALL)
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 40), (10, 40))
    optimizer.step()
    before = optimizer.state[p]["second_moment.table"].clone()
    p.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 40), (10, 40))
    optimizer.step()
    assert torch.equal(optimizer.state[p]["second_moment.table"], 0.5 * before)


def every(**options):
    """Every optimizer with these options, and Sketchy with more of its paths."""
    yield from ((name, registry.get(name).cls, options) for name in registry.names())
    for more in ({"preset": "paper"}, {"nonfinite": "skip"}, {"nonfinite": "deferred"}, {"statistics": "sample"}):
        yield f"sketchy {more}", Sketchy, {**options, "rank": 4, **more}
    yield "sadagrad", SAdagrad, {}
    yield "mem_sgd", MemSGD, {}


@pytest.mark.parametrize(("label", "cls", "options"), list(every(min_compress_size=0)))
def test_steps_on_the_meta_device(label, cls, options):
    params = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in [(24, 40), (7,)]]
    optimizer = cls(params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(state["step"] == 3 for state in optimizer.state.values())
    assert len(optimizer.state_dict()["state"]) == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("label", "cls", "options"), list(every(min_compress_size=0)))
def test_float8_parameters_are_the_float32_step_rounded(label, cls, options, dtype):
    torch.manual_seed(0)
    small = [torch.nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False) for shape in [(24, 40), (7,)]]
    wide = [torch.nn.Parameter(p.float()) for p in small]
    optimizers = [cls(params, lr=0.05, **options) for params in (small, wide)]
    for p, q in zip(small, wide, strict=True):
        p.grad = torch.randn(p.shape).to(dtype)
        q.grad = p.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(small, wide, strict=True):
        torch.testing.assert_close(p.float(), q.detach().to(dtype).float(), rtol=0, atol=0)
