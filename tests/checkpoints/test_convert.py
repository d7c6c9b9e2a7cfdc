"""``sketch-plugins convert``: checkpoints of Trainer, Lightning and torch are converted, and errors are reported."""

import os
import subprocess
import sys

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW

from sketch_plugins import CSAdam, cli, convert_state, registry
from sketch_plugins.checkpoints import convert as module
from sketch_plugins.checkpoints.convert import convert

SMALL = "min_compress_size=256"


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.Linear(40, 3)
    )


def groups(net):
    """Two groups, the second with a frozen parameter that never gets a gradient."""
    net[3].bias.requires_grad_(False)
    return [
        {"params": [net[0].weight, net[2].weight], "weight_decay": 0.1, "lr": 2e-2, "tag": "decayed"},
        {"params": [net[0].bias, net[2].bias, net[3].weight, net[3].bias], "weight_decay": 0.0},
    ]


def train(net, optimizer, steps, start=0):
    for number in range(start, start + steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def begun(make=AdamW, **options):
    net = model()
    theirs = make(groups(net), **{"lr": 1e-2, **options})
    train(net, theirs, 3)
    return net, theirs


# torch's optimizer and its options; the name of ours; optim_args; the arguments of the run that continues.
CASES = {
    "adamw": (AdamW, {"betas": (0.8, 0.95), "eps": 1e-6}, "cs_adam", SMALL, {}),
    "options": (AdamW, {}, "cs_adam", f"{SMALL},compression=0.25,depth=2,seed=3,preset=lean", {}),
    "adam": (Adam, {}, "cs_adagrad", SMALL, {}),
    "sgd": (SGD, {"momentum": 0.7, "nesterov": True}, "cs_momentum", SMALL, {}),
    "adagrad": (Adagrad, {"lr_decay": 0.1}, "cs_adagrad", SMALL, {}),
    "sm3": (AdamW, {"betas": (0.8, 0.95)}, "sm3", f"{SMALL},betas=0.8:0.95,eps=1e-8", {}),
    "sketchy": (AdamW, {}, "sketchy", f"{SMALL},scale_parameter=false", {}),
    "bfloat16": (AdamW, {}, "cs_adam", f"{SMALL},table_dtype=bf16", {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_convert_state_makes_in_memory_bit_for_bit(case, tmp_path):
    make, options, name, optim_args, more = CASES[case]
    net = model().to(more.get("dtype", torch.float32))
    if case == "bfloat16":
        theirs = make(net.parameters(), lr=1e-2)
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.5)
        theirs.step()
    else:
        theirs = make(groups(net), **{"lr": 1e-2, **options})
        train(net, theirs, 3)
    torch.save({"model": net.state_dict(), "optimizer": theirs.state_dict(), "epoch": 3}, tmp_path / "run.pt")
    done = convert(tmp_path / "run.pt", name, optim_args)
    assert done.output == tmp_path / f"run-{name}.pt"
    written = torch.load(done.output, weights_only=True)
    assert written["epoch"] == 3 and equal(written["model"], torch.load(tmp_path / "run.pt")["model"])

    # Our optimizer, as the run that continues builds it: the same groups and the same hyperparameters.
    hyper = {"lr": 1e-2, **options}
    if make is Adam:
        hyper["betas"] = (0.9, 0.999)
        hyper["eps"] = 1e-8
    if make is AdamW and name == "cs_adam":
        hyper.setdefault("eps", 1e-8)
    if make is AdamW and name == "sm3":
        hyper = {"lr": 1e-2}
    if make is AdamW and case in ("sketchy", "options", "bfloat16"):
        hyper |= {"betas": (0.9, 0.999), "eps": 1e-8}
    own = registry.parse_options(name, dict(part.split("=") for part in optim_args.split(",")))
    given = groups(net) if case != "bfloat16" else net.parameters()
    ours = registry.get(name).cls(given, **{**hyper, **own})
    keep = ["betas"] if "betas" in own else []
    expected = convert_state(theirs.state_dict(), ours, keep=keep)
    assert equal(written["optimizer"]["state"], expected["state"])
    assert sum(float(s["step"]) > 0 for s in expected["state"].values()) > 3
    ours.load_state_dict(written["optimizer"])
    for group, saved in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert (group["lr"], group["weight_decay"]) == (saved["lr"], saved["weight_decay"])
        assert group.get("tag") == saved.get("tag")

    # The run continues.
    if case != "bfloat16":
        other_net = model(1)
        other_groups = groups(other_net)
        other_net.load_state_dict(written["model"])
        other = registry.get(name).cls(other_groups, **{**hyper, **own})
        other.load_state_dict(expected)
        train(net, ours, 3, 3)
        train(other_net, other, 3, 3)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other_net.parameters(), strict=True))


def test_every_optimizer_of_the_registry(tmp_path):
    net, theirs = begun()
    torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
    for name in registry.names():
        more = {"sketchy": "scale_parameter=false", "cs_momentum": ""}.get(name, "")
        options = ",".join(filter(None, (SMALL, more)))
        done = convert(tmp_path / "optimizer.pt", name, options)
        ours = registry.get(name).cls(
            groups(net), **registry.parse_options(name, dict(p.split("=") for p in options.split(",")))
        )
        ours.load_state_dict(torch.load(done.output, weights_only=True))
        before, after = (sum(getattr(g, key) for g in done.optimizers[0]) for key in ("before", "after"))
        elements = sum(p.numel() for p in net.parameters() if p.requires_grad)
        assert before == 8 * elements == 8 * sum(g.elements for g in done.optimizers[0])
        assert 0 < after and (after < before or name == "sketchy")  # its preconditioners of tiny matrices are larger


def test_several_optimizers_and_one_that_is_ours(tmp_path):
    one, two, three = model(), model(1), model(2)
    first, second = AdamW(one.parameters(), lr=1e-2), SGD(two.parameters(), lr=1e-2, momentum=0.9)
    own = CSAdam(three.parameters(), lr=1e-2)
    for net, optimizer in ((one, first), (two, second), (three, own)):
        train(net, optimizer, 2)
    value = {"optimizer_states": [first.state_dict(), own.state_dict()], "other": ({"inner": second.state_dict()}, 7)}
    torch.save(value, tmp_path / "several.ckpt")
    with pytest.raises(ValueError, match="needs averages of squared gradients"):  # SGD has none
        convert(tmp_path / "several.ckpt", "cs_adam", SMALL)
    done = convert(tmp_path / "several.ckpt", "cs_momentum", SMALL)
    written = torch.load(done.output, weights_only=True)
    assert len(done.optimizers) == 2 and equal(written["optimizer_states"][1], own.state_dict())
    for net, saved, cls in (
        (one, written["optimizer_states"][0], "cs_momentum"),
        (two, written["other"][0]["inner"], "cs_momentum"),
    ):
        registry.get(cls).cls(net.parameters(), min_compress_size=256).load_state_dict(saved)
    assert written["other"][1] == 7


def test_the_command(tmp_path, capsys):
    net, theirs = begun()
    file = tmp_path / "run.pt"
    torch.save({"optimizer": theirs.state_dict()}, file)
    assert cli.main(["convert", str(file), "--optim", "cs_adam", "--optim-args", SMALL]) == 0
    out = capsys.readouterr().out
    elements = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert "group 0" in out and "group 1" in out and f"{elements:,}" in out and "run-cs_adam.pt" in out
    written = (tmp_path / "run-cs_adam.pt").read_bytes()

    # Nothing is overwritten without --force.
    assert cli.main(["convert", str(file), "--optim", "cs_adam", "--optim-args", "preset=exact"]) == 1
    error = capsys.readouterr().err
    assert "run-cs_adam.pt exists already" in error and "--force" in error
    assert (tmp_path / "run-cs_adam.pt").read_bytes() == written
    assert cli.main(["convert", str(file), "--optim", "cs_adam", "--optim-args", "preset=exact", "--force"]) == 0
    assert (tmp_path / "run-cs_adam.pt").read_bytes() != written
    (tmp_path / "folder").mkdir()
    assert cli.main(["convert", str(file), "--optim", "sm3", "--out", str(tmp_path / "folder")]) == 0
    assert cli.main(["convert", str(file), "--optim", "sm3", "--out", str(tmp_path / "new" / "x.pt")]) == 0
    assert (tmp_path / "folder" / "run.pt").is_file() and (tmp_path / "new" / "x.pt").is_file()
    assert cli.main(["convert", str(file), "--optim", "sm3", "--out", f"{tmp_path / 'later'}{os.sep}"]) == 0
    assert (tmp_path / "later" / "run.pt").is_file()
    converted = str(tmp_path / "new" / "x.pt")
    assert cli.main(["convert", converted, "--optim", "sm3", "--out", str(file), "--force"]) == 1
    assert "there is nothing to convert" in capsys.readouterr().err
    # No temporary files are left.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "later", "new", "run-cs_adam.pt", "run.pt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_checkpoint_itself_is_never_replaced(kind, tmp_path, capsys):
    """However it is named: by its path, another spelling of it, a link, or the folder that it is in."""
    _, source = folder(tmp_path)
    if kind == "file":
        source = source / "optimizer.pt"
    (tmp_path / "link").symlink_to(source)
    names = [str(source), os.path.join(source.parent, ".", source.name), str(tmp_path / "link")]
    ways = [(checkpoint, name) for checkpoint in (str(source), str(tmp_path / "link")) for name in names]
    if kind == "file":
        os.link(source, tmp_path / "hard.pt")
        ways += [(source, name) for name in (str(source.parent), f"{source.parent}{os.sep}", str(tmp_path / "hard.pt"))]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for checkpoint, name in ways:
        assert cli.main(["convert", str(checkpoint), "--optim", "sm3", "--out", name, "--force"]) == 1, name
        assert "is the checkpoint" in (error := capsys.readouterr().err) and "another --out" in error, name
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert (tmp_path / "link").is_symlink()


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "sketch_plugins", "convert", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for word in ("CHECKPOINT", "--optim", "--optim-args", "--out", "--force", "--trust", "Trainer", "Lightning"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (None, {}, "does not exist: give the directory or file of a checkpoint"),
        ("adamw", {"name": "cs_adm"}, "unknown optimizer 'cs_adm'. Did you mean 'cs_adam'. The optimizers are cs_adam"),
        ("adamw", {"optim_args": "compression"}, "'compression' is not of the form key=value"),
        ("adamw", {"optim_args": "compresion=0.1"}, "compression"),
        ("adamw", {"optim_args": "compression=2"}, r"a number in \(0, 1\]"),
        ("adamw", {"optim_args": "seed=1,seed=2"}, "'seed' is given twice"),
        ("adamw", {"optim_args": "lr=0.1"}, "the learning rate and its schedule come from the checkpoint"),
        (
            "adamw",
            {"optim_args": "lagged_rms=true"},
            "lagged_rms=True of cs_adam needs the parameters' values.*warm_start",
        ),
        ("adamw", {"name": "sketchy"}, "scale_parameter=True of sketchy needs the parameters' values.*warm_start"),
        ("betas", {"name": "sm3"}, r"betas=\(0.8, 0.95\)\) cannot be transferred to sm3.*--optim-args betas="),
        ("amsgrad", {}, r"amsgrad=True\) cannot be transferred"),
        ("adam", {}, r"Adam\(weight_decay=0.1\) adds the weight decay.*--optim-args weight_decay=0.1"),
        ("rmsprop", {}, "group 0 was not written by AdamW, Adam, SGD or Adagrad.*alpha"),
        ("nan", {}, "exp_avg of .* contains values that are not finite"),
        ("ours", {}, "already holds the state of a sketched optimizer"),
        ("weights", {}, "holds no optimizer state dict.*it holds weight"),
        ("no groups", {}, "optimizer state dict without parameter groups: there is nothing to convert"),
        ("nones", {}, "'state' has to be a dict, .* here they are NoneType and NoneType"),
        ("pipe", {}, "is neither a file nor a directory: give"),
        ("rubbish", {}, "cannot be read as a file of torch.save"),
        ("unsafe", {}, "If you trust the checkpoint, use --trust"),
        ("empty folder", {}, "holds no optimizer state.*checkpoint-5: give one of these"),
        ("sharded", {}, "sharded checkpoint of torch.distributed, which cannot be converted"),
        ("deepspeed", {}, "checkpoint of DeepSpeed, which cannot be converted"),
    ],
)
def test_what_cannot_be_converted(make, arguments, message, tmp_path):
    path, p = tmp_path / "there", torch.nn.Parameter(torch.ones(8, 8))
    p.grad = torch.full_like(p, float("nan") if make == "nan" else 0.5)
    kinds = {
        "adamw": lambda: AdamW([p]),
        "nan": lambda: AdamW([p]),
        "betas": lambda: AdamW([p], betas=(0.8, 0.95)),
        "amsgrad": lambda: AdamW([p], amsgrad=True),
        "adam": lambda: Adam([p], weight_decay=0.1),
        "rmsprop": lambda: torch.optim.RMSprop([p]),
        "ours": lambda: CSAdam([p]),
    }
    if make in kinds:
        optimizer = kinds[make]()
        optimizer.step()
        torch.save(optimizer.state_dict(), path)
    elif make == "weights":
        torch.save({"weight": torch.ones(2)}, path)
    elif make == "no groups":
        torch.save({"state": {}, "param_groups": []}, path)
    elif make == "nones":
        torch.save({"state": None, "param_groups": None}, path)
    elif make == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no named pipes on this platform")
        os.mkfifo(path)
    elif make == "rubbish":
        path.write_bytes(b"rubbish")
    elif make == "unsafe":
        torch.save({"optimizer": AdamW([p]).state_dict(), "other": pytest.Mark}, path)
    elif make is not None:
        inner = {"empty folder": "checkpoint-5", "sharded": "optimizer_0", "deepspeed": "global_step5"}[make]
        (path / inner).mkdir(parents=True)
        (path / inner / ".metadata").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        convert(path, **{"name": "cs_adam", **arguments})
    assert sorted(tmp_path.rglob("*")) == before


def folder(tmp_path):
    """A directory like Trainer's, as far as this command reads it."""
    net, theirs = begun()
    root = tmp_path / "checkpoint-3"
    (root / "inner").mkdir(parents=True)
    torch.save(theirs.state_dict(), root / "optimizer.pt")
    (root / "model.safetensors").write_bytes(b"weights")
    (root / "inner" / "optimizer.pt").write_bytes(b"another")
    return net, root


def test_a_folder_is_copied_whole(tmp_path):
    _, root = folder(tmp_path)
    done = convert(root, "cs_adam", SMALL)
    assert done.framework == "Trainer" and done.output == tmp_path / "checkpoint-3-cs_adam"
    names = ["inner", "inner/optimizer.pt", "model.safetensors", "optimizer.pt"]
    assert sorted(str(p.relative_to(done.output)) for p in done.output.rglob("*")) == names
    assert (done.output / "inner" / "optimizer.pt").read_bytes() == b"another"
    with pytest.raises(ValueError, match="exists already"):
        convert(root, "cs_adam", SMALL)
    (done.output / "model.safetensors").write_bytes(b"old")
    convert(root, "sm3", SMALL, done.output, force=True)
    assert (done.output / "model.safetensors").read_bytes() != b"old"  # it is replaced as a whole
    (done.output / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"contains thesis\.txt, which .* does not"):
        convert(root, "sm3", SMALL, done.output, force=True)
    assert (done.output / "thesis.txt").exists()
    with pytest.raises(ValueError, match="is inside the checkpoint"):
        convert(root, "cs_adam", SMALL, root / "below")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file and"):
        convert(root, "cs_adam", SMALL, tmp_path / "file", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-3-cs_adam", "file"]


def test_a_folder_of_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra `accelerate`")
    accelerator = accelerate.Accelerator(cpu=True)
    net = model()
    prepared, theirs = accelerator.prepare(net, AdamW(groups(net), lr=1e-2))
    train(prepared, theirs, 3)
    accelerator.save_state(tmp_path / "state", safe_serialization=False)
    done = convert(tmp_path / "state", "cs_adam", SMALL)
    assert done.framework == "accelerate"
    other = model(1)
    prepared, ours = accelerate.Accelerator(cpu=True).prepare(
        other, CSAdam(groups(other), lr=1.0, min_compress_size=256)
    )
    accelerator._models, accelerator._optimizers = [prepared], [ours]
    accelerator.load_state(done.output)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    expected = convert_state(theirs.state_dict(), CSAdam(groups(model()), min_compress_size=256))
    assert equal(ours.optimizer.state_dict()["state"], expected["state"])
    assert [group["lr"] for group in ours.param_groups] == [2e-2, 1e-2]


@pytest.mark.parametrize("place", ["new file", "file", "new folder", "folder"])
def test_a_failure_leaves_what_was_there(place, tmp_path, monkeypatch):
    """The disk becomes full while files are written."""
    _, root = folder(tmp_path)
    source, target = root, tmp_path / "target"
    if "file" in place:
        source = root / "optimizer.pt"
    if place == "file":
        target.write_bytes(b"before")
    if place == "folder":
        target.mkdir()
        (target / "kept").write_bytes(b"before")
    before = {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}

    def full(value, stream):
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(ValueError, match=r"cannot be written.*No space left on device"):
        convert(source, "cs_adam", SMALL, target, force=not place.startswith("new"))
    assert {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")} == before


def test_rights_of_a_file_that_is_replaced_stay(tmp_path):
    _, root = folder(tmp_path)
    (tmp_path / "out.pt").touch(0o640)
    convert(root / "optimizer.pt", "cs_adam", SMALL, tmp_path / "out.pt", force=True)
    assert (tmp_path / "out.pt").stat().st_mode & 0o777 == 0o640
