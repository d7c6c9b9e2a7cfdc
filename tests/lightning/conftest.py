"""A real Trainer on a small network, with generated data; for both of Lightning's namespaces."""

import importlib
import logging
import warnings

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra `lightning`")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's own, of its imports
    import lightning

import sketch_lightning  # noqa: F401
from sketch_plugins import registry

# Low enough for the matrices of the small network to be compressed.
SMALL = {"min_compress_size": 256}


def data(size=24, seed=0):
    # Three batches an epoch. Runs that are resumed are cut between epochs and limited by epochs, because Lightning
    # otherwise starts the epoch's data from the beginning, with any optimizer.
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 12, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.tanh(x @ torch.randn(12, 3, generator=generator)))


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.Linear(40, 3)
    )


def make_module(namespace, optimizers, seed=0, manual=False, batch_size=8):
    """A LightningModule; ``optimizers(module)`` is its configure_optimizers."""
    base = importlib.import_module(namespace).LightningModule

    class Module(base):
        def __init__(self):
            super().__init__()
            self.net, self.batch_size, self.rates = network(seed), batch_size, []
            self.automatic_optimization = not manual

        def loss(self, batch):
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            if not manual:
                self.log("loss", loss := self.loss(batch), prog_bar=True)
                return loss
            for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                scheduler.step()

        def on_train_batch_end(self, *_):
            self.rates.append([[g["lr"] for g in o.param_groups] for o in self.trainer.optimizers])

        def configure_optimizers(self):
            return optimizers(self)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(data(), batch_size=self.batch_size)

    return Module()


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def namespace(request):
    return request.param


@pytest.fixture
def trainer(tmp_path):
    """`trainer(namespace="lightning.pytorch", **options)`: quiet, on the CPU."""

    def make(namespace="lightning.pytorch", **options):
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
            "max_steps": 6,
        }
        return importlib.import_module(namespace).Trainer(**{**quiet, **options})

    return make


@pytest.fixture
def fit(trainer):
    """`fit(optimizers, strategy, ...)` trains a new module and returns it and its trainer."""

    def run(
        optimizers, strategy="auto", namespace="lightning.pytorch", manual=False, seed=0, ckpt_path=None, **options
    ):
        module = make_module(namespace, optimizers, seed, manual)
        made = trainer(namespace, strategy=strategy, **options)
        made.fit(module, ckpt_path=ckpt_path)
        return module, made

    return run


@pytest.fixture
def log(caplog):
    """`log()`: the messages in Lightning's log so far."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def ours(name, **options):
    """The optimizer ``name`` built by the module itself."""
    cls = registry.get(name).cls
    own = SMALL if "min_compress_size" in cls.OPTIONS else {}
    return lambda params, **kwargs: cls(params, **{**own, **options, **kwargs})


def small(name):
    return SMALL if "min_compress_size" in registry.get(name).cls.OPTIONS else {}


def strategy(kind, namespace="lightning.pytorch", **options):
    module = importlib.import_module(f"sketch_lightning.{namespace.replace('lightning.pytorch', 'lightning_pytorch')}")
    return getattr(module, kind)(**options)


def equal(one, other):
    """Whether two modules have the same parameters, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def same_state(one, other):
    """State dicts, compared bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other


__all__ = ["lightning"]
