"""`sketch-plugins report`: checkpoints that real frameworks have written."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sketch_plugins import SM3, CSAdam, Sketchy, cli, state_report
from sketch_plugins.checkpoints.reading import contents


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.Tanh(), torch.nn.Linear(300, 20))


def stepped(optimizer, steps=2):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def said(capsys, *arguments):
    capsys.readouterr()  # discard the output of frameworks
    assert cli.main(["report", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["report", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sketch-plugins report: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "build",
    [
        lambda p: CSAdam(p),
        lambda p: CSAdam(p, preset="lean"),
        lambda p: SM3(p, min_compress_size=0),
        lambda p: Sketchy(p, rank=4, min_compress_size=0),
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.SGD(p, momentum=0.9),
    ],
    ids=["cs_adam", "lean", "sm3", "sketchy", "adamw", "sgd"],
)
def test_bytes_and_names_are_those_of_the_optimizer(build, tmp_path):
    net = model()
    optimizer = stepped(build(net.named_parameters()))
    torch.save({"model": net.state_dict(), "training": [{"optimizer": optimizer.state_dict()}]}, tmp_path / "run.pt")
    (found,) = contents(tmp_path / "run.pt")
    expected = state_report(optimizer)
    assert found.nbytes == expected.state_bytes and found.params == expected.params
    assert found.adamw_bytes == expected.adamw_bytes
    assert {e.name: e.nbytes for e in found.entries} == {p.name: p.state_bytes for p in expected.parameters}
    assert [e.name for e in found.entries] == [name for name, _ in net.named_parameters()]
    assert {e.step for e in found.entries} <= {2, None}
    assert found.groups[0]["lr"] == optimizer.param_groups[0]["lr"] and "params" not in found.groups[0]


def test_names_are_guessed_only_where_sizes_agree(tmp_path):
    net = model()
    optimizer = stepped(torch.optim.AdamW(net.parameters()))
    torch.save({"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.pt")
    assert [e.name for e in contents(tmp_path / "a.pt")[0].entries] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    other = dict(reversed(net.state_dict().items()))
    torch.save({"state_dict": other, "optimizer": optimizer.state_dict()}, tmp_path / "b.pt")
    assert [e.name for e in contents(tmp_path / "b.pt")[0].entries] == ["0.0", "0.1", "0.2", "0.3"]


def test_the_trainer_s_checkpoint(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    import sketch_transformers  # noqa: F401

    special = {"bos_token_id": 0, "eos_token_id": 0}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, **special))
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 4
    for name in ("cs_adam", "adamw_torch"):
        options = {"optim_args": "preset=lean,min_compress_size=0"} if name == "cs_adam" else {}
        args = TrainingArguments(
            str(tmp_path / name), optim=name, max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
            **options,
        )  # fmt: skip
        trainer = Trainer(net, args, train_dataset=rows)
        trainer.train()
        (found,) = contents(tmp_path / name / "checkpoint-2")
        assert found.nbytes == state_report(trainer.optimizer).state_bytes
        # cs_adam's lean state does not determine the sizes of weights; the weights' file has them.
        assert found.params == sum(p.numel() for p in net.parameters())
    text = said(capsys, tmp_path / "cs_adam" / "checkpoint-2", "--rows", "2")
    assert "CSAdam" in text and "second_moment.table" in text and "14 more" in text and "of AdamW's" in text
    assert "preset=lean" in text and "2 steps" in text
    assert "exp_avg_sq" in said(capsys, tmp_path / "adamw_torch" / "checkpoint-2", "--rows", "0")
    assert "it contains checkpoint-2: give one of these" in refused(capsys, tmp_path / "cs_adam")


def test_lightning_s_checkpoint(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model()

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return CSAdam(self.parameters(), min_compress_size=0)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=2, enable_checkpointing=False, **quiet)
    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 40)), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = json.loads(said(capsys, tmp_path / "last.ckpt", "--json"))["optimizers"][0]
    assert found["optimizer"] == "CSAdam" and found["state_bytes"] == state_report(trainer.optimizers[0]).state_bytes
    assert [p["name"] for p in found["parameters"]] == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert "last.ckpt: give one of these" in refused(capsys, tmp_path)


def test_a_distributed_checkpoint(tmp_path, capsys):
    dcp = pytest.importorskip("torch.distributed.checkpoint", reason="this torch has no distributed")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net = model()
    optimizer = CSAdam(net.parameters(), min_compress_size=0)
    stepped(optimizer)
    state = get_optimizer_state_dict(net, optimizer)
    for place in (tmp_path / "plain", tmp_path / "accelerate" / "optimizer_0"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"optim": copy.deepcopy(state)}, checkpoint_id=place, no_dist=True)
    for given in ("plain", "accelerate"):
        (found,) = contents(tmp_path / given)
        assert found.nbytes == state_report(optimizer).state_bytes
        assert {e.name for e in found.entries} == {name for name, _ in net.named_parameters()}
    (tmp_path / "plain" / ".metadata").write_bytes(b"torn")
    assert "cannot be read" in refused(capsys, tmp_path / "plain")


ENGINE = """
import os, sys, torch, deepspeed
import sketch_deepspeed
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
# Or DeepSpeed would compile a C++ extension for all-reduces of inference.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", verbose=False)
torch.manual_seed(0)
for stage in (0, 1, 3):
    net = torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.Linear(300, 20))
    config = {
        "train_batch_size": 1, "steps_per_print": 10**9, "zero_optimization": {"stage": stage},
        "optimizer": {"type": "cs_adam", "params": {"lr": 1e-3, "min_compress_size": 0}},
    }
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    engine.backward(engine(torch.randn(2, 40)).square().mean())
    engine.step()
    engine.save_checkpoint(f"{sys.argv[1]}/{stage}")
"""


def test_deepspeed_s_checkpoints(tmp_path, capsys, free_port):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    command = [sys.executable, "-c", ENGINE, str(tmp_path), str(free_port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {stage: contents(tmp_path / str(stage))[0] for stage in (0, 1, 3)}
    alone = state_report(stepped(CSAdam(model().parameters(), min_compress_size=0), 1))
    for stage, one in found.items():
        assert one.optimizer == "CSAdam" and one.nbytes == alone.state_bytes and one.params == alone.params, stage
    assert [e.name for e in found[1].entries] == [f"{i}.{kind} (rank 0)" for i in (0, 1) for kind in ("weight", "bias")]
    assert "first_moment.codes" in said(capsys, tmp_path / "3")
    next((tmp_path / "1").glob("*/*optim_states.pt")).write_bytes(b"")
    assert "it is empty" in refused(capsys, tmp_path / "1")


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# -- what cannot be reported -------------------------------------------------------------------------------------------


class Odd:
    """An object of a user's own class."""


def test_files_that_are_absent_damaged_or_without_optimizer(tmp_path, capsys):
    file = tmp_path / "run.pt"
    assert "does not exist" in refused(capsys, file)
    assert "holds no optimizer checkpoint" in refused(capsys, tmp_path)
    torch.save({"optimizer": stepped(CSAdam(model().parameters())).state_dict()}, file)
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"PK\x03\x04", b"not a checkpoint", whole[:100] + b"\0" * 100):
        file.write_bytes(torn)
        assert "cannot be read" in refused(capsys, file)
        file.rename(tmp_path / "optimizer.pt")
        assert "optimizer.pt cannot be read" in refused(capsys, tmp_path)
        (tmp_path / "optimizer.pt").rename(file)
    torch.save({"weights": torch.zeros(3), "epoch": 2}, file)
    assert "holds no optimizer state dict" in refused(capsys, file) and "it holds weights, epoch" in refused(
        capsys, file
    )
    torch.save(torch.zeros(3), file)
    assert "it holds Tensor" in refused(capsys, file)
    assert "--rows -1 is not allowed" in refused(capsys, file, "--rows", "-1")


def test_what_is_no_state_is_said_as_it_is(tmp_path, capsys):
    """Each message fits its file, and the status is not 0: nothing can be shown."""
    file, net = tmp_path / "run.pt", model()
    for optimizer in (CSAdam(net.parameters()), torch.optim.AdamW(net.parameters())):
        torch.save({"optimizer": optimizer.state_dict()}, file)
        assert "state dict without state: it was saved before the first step" in refused(capsys, file)
    torch.save({"state": {}, "param_groups": []}, file)
    assert "state dict without state" in refused(capsys, file, "--json")
    torch.save({"state": None, "param_groups": None}, file)
    message = refused(capsys, file)
    assert "'state' has to be a dict" in message and "here they are NoneType and NoneType" in message
    file.write_text("hello")
    assert refused(capsys, file).endswith("It is damaged, or has another format\n")
    if Path("/dev/null").exists():
        assert "/dev/null is neither a file nor a directory" in refused(capsys, "/dev/null")


def test_nothing_is_unpickled_unasked(tmp_path, capsys):
    torch.save({"optimizer": stepped(CSAdam(model().parameters())).state_dict(), "odd": Odd()}, tmp_path / "run.pt")
    message = refused(capsys, tmp_path / "run.pt")
    assert "Odd" in message and "--trust" in message
    assert "CSAdam" in said(capsys, tmp_path / "run.pt", "--trust")


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", [".metadata", "__0.metadata"])
def test_metadata_runs_no_code(name, tmp_path, capsys):
    """torch itself unpickles any object in these files of a distributed checkpoint."""
    mark, place = tmp_path / "ran", tmp_path / "saved"
    place.mkdir()
    (place / ".metadata").write_bytes(b"")
    (place / name).write_bytes(pickle.dumps(Runs(mark)))
    message = refused(capsys, place)
    assert not mark.exists() and ("--trust" in message or (name != ".metadata" and "cannot be read" in message))
    for module, attribute in (("torch.distributed.checkpoint.metadata", "os.system"), ("torch", "load")):
        (place / ".metadata").write_bytes(b"\x80\x04" + f"\x8c{chr(len(module))}{module}".encode("latin1")
            + f"\x8c{chr(len(attribute))}{attribute}\x93.".encode("latin1"))  # fmt: skip
        assert f"{module}.{attribute}" in refused(capsys, place)


def test_what_looks_like_an_optimizer_and_is_none(tmp_path, capsys):
    file = tmp_path / "[old]" / "run[b].pt"
    file.parent.mkdir()
    for groups in ([3], [{}], [{"lr": 1.0}]):
        torch.save({"state": {}, "param_groups": groups}, file)
        assert "holds no optimizer state dict" in refused(capsys, file)
    # Names, values and paths with brackets are shown unchanged; unusual steps and factors cause no error.
    state = {"step": float("nan"), "row_var": torch.tensor(1.0), "col_var": torch.tensor(1.0)}
    torch.save(
        {"state": {0: state}, "param_groups": [{"params": [0], "param_names": ["[red]x[/x]"], "o": "[/b]"}]}, file
    )
    shown = said(capsys, file)
    assert "[red]x[/x]" in shown and "o=[/b]" in shown and str(file) in shown


def test_older_files(tmp_path, capsys):
    state = stepped(torch.optim.AdamW(model().parameters())).state_dict()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "Adam or AdamW" in said(capsys, tmp_path / "old.pt")
