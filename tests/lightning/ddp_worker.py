"""Run by `test_distributed` in two processes: everything that needs ranks, in one start of Lightning."""

import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import lightning  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torch.optim import AdamW  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from sketch_lightning.lightning_pytorch import (  # noqa: E402
    MemSGDStrategy,
    OptimizerInBackward,
    OptimizerStateMonitor,
    ReclaimBatchSize,
    SketchCleaning,
    SketchDDPStrategy,
    SketchFSDPStrategy,
)
from sketch_plugins import CSAdam, convert_state, registry  # noqa: E402
from sketch_plugins.sharding.dtensors import is_dtensor  # noqa: E402
from sketch_plugins.sharding.state_names import nested  # noqa: E402

SMALL = {"min_compress_size": 256}
FOLDER = Path(sys.argv[1])


class Module(lightning.LightningModule):
    def __init__(self, ours=None, seed=0, width=40):
        super().__init__()
        torch.manual_seed(seed)
        layers = torch.nn.Linear(12, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Linear(width, 3)
        self.net, self.ours, self.batch_size, self.largest, self.rates = torch.nn.Sequential(*layers), ours, 4, 0, []

    def training_step(self, batch, batch_idx):
        self.largest = max(self.largest, len(batch[0]))
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test", self.net(batch[0]).square().mean(), sync_dist=True)

    def test_dataloader(self):
        return self.train_dataloader()

    def on_train_batch_end(self, *_):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self):
        made = (self.ours or AdamW)(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, 10)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(48, 12, generator=generator)
        return DataLoader(TensorDataset(x, x[:, :3].tanh()), batch_size=self.batch_size, shuffle=True)


def train(module, strategy, epochs=2, ckpt_path=None, folder=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    callbacks = options.pop("callbacks", [])
    if folder is not None:
        callbacks = [*callbacks, ModelCheckpoint(FOLDER / folder, save_last=True, save_top_k=0)]
    torch.manual_seed(11)
    made = lightning.Trainer(
        devices=2,
        strategy=strategy,
        max_epochs=epochs,
        enable_checkpointing=folder is not None,
        default_root_dir=FOLDER,
        callbacks=callbacks,
        **quiet,
        **options,
    )
    made.fit(module, ckpt_path=ckpt_path)
    return made


def own(params, **options):
    return CSAdam(params, **options, **SMALL)


def small(name):
    return SMALL if "min_compress_size" in registry.get(name).cls.OPTIONS else {}


def by(name):
    return lambda params, **options: registry.get(name).cls(params, **options, **small(name))


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def equal(one, other):
    return all(torch.equal(whole(p), whole(q)) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def same_everywhere(module):
    for p in module.parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p)


def refused(message, function):
    try:
        function()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no error: {message}")


def ddp():
    one, other = Module(), Module(own)
    made = train(one, SketchDDPStrategy(optimizer_kwargs=SMALL), folder="whole")
    train(other, "ddp")
    assert type(made.optimizers[0]) is CSAdam and made.world_size == 2
    assert equal(one, other) and one.rates == other.rates
    same_everywhere(one)
    whole_run = one
    plain = Module()
    train(plain, "ddp")
    assert plain.rates == one.rates

    for name in ("sm3", "sketchy"):
        one, other = Module(), Module(by(name))
        made = train(one, SketchDDPStrategy(name, optimizer_kwargs=small(name)))
        train(other, "ddp")
        assert type(made.optimizers[0]) is registry.get(name).cls and equal(one, other)
        same_everywhere(one)

    by_name, reference = Module(), Module(CSAdam)
    assert type(train(by_name, "ddp_cs_adam").strategy) is SketchDDPStrategy
    train(reference, "ddp")
    assert equal(by_name, reference)

    accumulated, reference = Module(), Module(own)
    options = {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "gradient_clip_val": 0.1}
    train(accumulated, SketchDDPStrategy(optimizer_kwargs=SMALL), **options)
    train(reference, "ddp", **options)
    assert equal(accumulated, reference)

    train(Module(), SketchDDPStrategy(optimizer_kwargs=SMALL), epochs=1, folder="parts")
    resumed = Module(seed=7)
    train(resumed, SketchDDPStrategy(optimizer_kwargs=SMALL), ckpt_path="last", folder="parts")
    assert equal(resumed, whole_run) and len(resumed.rates) == 6


def warm_start():
    theirs = Module()
    made = train(theirs, "ddp", epochs=1, folder="adamw")
    path = FOLDER / "adamw" / "last.ckpt"
    refused("warm_start=True", lambda: train(Module(), "ddp_cs_adam", ckpt_path=path))
    warm = Module(seed=7)
    started = train(warm, SketchDDPStrategy(optimizer_kwargs=SMALL, warm_start=True), epochs=1, ckpt_path=path)
    expected = own(warm.parameters())
    expected.load_state_dict(convert_state(made.optimizers[0].state_dict(), expected))
    tables = [nested(started.optimizers[0].state[p])["second_moment"] for p in warm.parameters()]
    wanted = [nested(expected.state[p])["second_moment"] for p in warm.parameters()]
    assert equal(warm, theirs)
    for table, other in zip(tables, wanted, strict=True):
        assert all(torch.equal(table[key], other[key]) for key in other)


def callbacks():
    cleaned, reference = Module(), Module(lambda ps, **o: own(ps, clean_every=2, clean_factor=0.3, **o))
    monitor = OptimizerStateMonitor(sampled=True)
    train(
        cleaned,
        SketchDDPStrategy(optimizer_kwargs=SMALL),
        callbacks=[SketchCleaning(every_n_steps=2, factor=0.3), monitor],
        log_every_n_steps=1,
    )
    train(reference, "ddp")
    assert equal(cleaned, reference)
    assert bool(monitor.state_dict()["samples"]) == (dist.get_rank() == 0)


class Meter:
    """Rank 0 has room for 9 samples, rank 1 for 7."""

    def __init__(self, module):
        self.module = module

    def start(self):
        self.module.largest = 0

    def read(self):
        return self.module.largest * (100 if dist.get_rank() == 0 else 130)


def reclaim():
    module, reference = Module(), Module()
    callback = ReclaimBatchSize(budget=950, meter=Meter(module))
    train(module, SketchDDPStrategy(optimizer_kwargs=SMALL), callbacks=[callback])
    assert callback.batch_size == module.batch_size == 7, callback.batch_size
    reference.batch_size = 7
    train(reference, SketchDDPStrategy(optimizer_kwargs=SMALL))
    assert equal(module, reference)
    same_everywhere(module)

    module = Module()
    step = Module.training_step

    def fails(self, batch, batch_idx):
        # Only one rank runs out of memory, and the other must not wait for it.
        if dist.get_rank() == 1 and len(batch[0]) > 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return step(self, batch, batch_idx)

    module.training_step = fails.__get__(module)
    callback = ReclaimBatchSize(budget=10**9, meter=Meter(module))
    train(module, SketchDDPStrategy(optimizer_kwargs=SMALL), callbacks=[callback])
    assert callback.batch_size == 6
    same_everywhere(module)


class Sharding(Module):
    """A module that shards itself, as Lightning's ModelParallelStrategy demands."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fsdp():
    from lightning.pytorch.strategies import ModelParallelStrategy

    one, other = Module(), Sharding(own)
    made = train(one, SketchFSDPStrategy(optimizer_kwargs=SMALL))
    train(other, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    assert all(is_dtensor(p) for p in one.parameters()) and type(made.optimizers[0]) is CSAdam
    assert equal(one, other) and one.rates == other.rates
    assert "configure_model" not in vars(one)
    for name in ("sm3", "sketchy"):
        its, other = Module(), Sharding(by(name))
        made = train(its, SketchFSDPStrategy(name, optimizer_kwargs=small(name)))
        train(other, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
        assert type(made.optimizers[0]) is registry.get(name).cls and equal(its, other)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = OptimizerStateMonitor(sampled=True)
        made = train(Module(), SketchFSDPStrategy(optimizer_kwargs=SMALL), callbacks=[monitor], log_every_n_steps=1)
    said = [
        w
        for w in caught
        if "second_moment_relative_error does not include parameters that are sharded" in str(w.message)
    ]
    assert len(said) == (dist.get_rank() == 0)
    assert "optimizer/second_moment_relative_error" not in made.callback_metrics

    train(Module(), SketchFSDPStrategy(optimizer_kwargs=SMALL), epochs=1, folder="sharded")
    resumed = Module(seed=7)
    train(resumed, SketchFSDPStrategy(optimizer_kwargs=SMALL), ckpt_path=FOLDER / "sharded" / "last.ckpt")
    assert equal(resumed, one) and len(resumed.rates) == 6

    theirs = Sharding()
    train(theirs, ModelParallelStrategy(2, 1), epochs=1, folder="foreign")
    path = FOLDER / "foreign" / "last.ckpt"
    refused("a sharded run cannot convert it", lambda: train(Module(), "fsdp_cs_adam", ckpt_path=path))
    tested = Module(seed=7)  # it loads only the weights
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    lightning.Trainer(devices=2, strategy="fsdp_cs_adam", **quiet).test(tested, verbose=False, ckpt_path=path)
    assert equal(tested, theirs)

    one_file = {"save_distributed_checkpoint": False}
    train(Sharding(), ModelParallelStrategy(2, 1, **one_file), epochs=1, folder="foreign-file")
    path = FOLDER / "foreign-file" / "last.ckpt"
    assert path.is_file()
    refused("a sharded run cannot convert it", lambda: train(Module(), "fsdp_cs_adam", ckpt_path=path))
    train(Module(), SketchFSDPStrategy(optimizer_kwargs=SMALL, **one_file), epochs=1, folder="file")
    resumed = Module(seed=7)
    train(resumed, SketchFSDPStrategy(optimizer_kwargs=SMALL), ckpt_path=FOLDER / "file" / "last.ckpt")
    assert equal(resumed, one)

    bare = Module()
    bare.scale = torch.nn.Parameter(torch.ones(()))
    refused("parameter 'scale' belongs to the LightningModule itself", lambda: train(bare, "fsdp_cs_adam"))
    tied = Module()
    tied.head = torch.nn.Linear(40, 40)
    tied.head.weight = tied.net[2].weight
    refused("head.weight also belongs to net", lambda: train(tied, "fsdp_cs_adam"))

    # AdamW's state of DTensors is put into the stores of shards.
    theirs = Sharding()
    made = train(theirs, ModelParallelStrategy(2, 1), epochs=1)
    ours = CSAdam(theirs.parameters(), lr=1e-2, weight_decay=0.1, preset="exact")
    ours.load_state_dict(convert_state(made.optimizers[0].state_dict(), ours))
    for p in theirs.parameters():
        kept, dense = ours.state[p], made.optimizers[0].state[p]
        assert torch.equal(kept["second_moment.dense"].flatten(), dense["exp_avg_sq"].to_local().flatten())
        assert torch.equal(kept["first_moment.dense"].flatten(), dense["exp_avg"].to_local().flatten())


def in_backward():
    """FSDP2 computes the weights of the ordinary run; DDP is refused."""
    fsdp = {"accumulate_grad_batches": 2}
    for name in ("cs_adam", "sketchy"):
        one, other, taken = Module(), Module(), []
        own = {"optimizer": name, "optimizer_kwargs": small(name)}
        train(one, SketchFSDPStrategy(**own), folder=f"after-{name}", **fsdp)
        # In each cycle's second batch, before the step has ended.
        other.on_after_backward = lambda of=other, to=taken: to.append(sum(p.grad is None for p in of.parameters()))
        train(other, SketchFSDPStrategy(**own), folder=f"in-{name}", callbacks=[OptimizerInBackward()], **fsdp)
        assert equal(one, other) and one.rates == other.rates
        assert taken == [0, 6] * 6
        train(Module(), SketchFSDPStrategy(**own), epochs=1, folder=f"parts-{name}", **fsdp)
        resumed, path = Module(seed=7), FOLDER / f"parts-{name}" / "last.ckpt"
        train(resumed, SketchFSDPStrategy(**own), ckpt_path=path, callbacks=[OptimizerInBackward()], **fsdp)
        assert equal(resumed, one)
    for strategy in ("ddp", "ddp_cs_adam"):
        message = "before DistributedDataParallel's all-reduce"
        refused(message, lambda way=strategy: train(Module(own), way, callbacks=[OptimizerInBackward()]))


def compressed():
    """The hook is registered on a CPU, too, and replicas stay equal."""
    module = Module()
    options = {"comm": "topk", "comm_kwargs": {"density": 0.1, "min_size": 16}}
    monitor = OptimizerStateMonitor()
    made = train(module, SketchDDPStrategy(optimizer_kwargs=SMALL, **options), callbacks=[monitor], log_every_n_steps=1)
    same_everywhere(module)
    state = made.strategy.comm_state
    logged = {k.removeprefix("comm/"): float(v) for k, v in made.callback_metrics.items() if k.startswith("comm/")}
    assert logged == (state.figures() if dist.get_rank() == 0 else {}) and state.memory_norm() > 0
    assert state.iteration == 12 and state.wire_bytes < state.dense_bytes
    # By name; the module's own optimizer is not replaced. Then the run is resumed, with error memories.
    whole = Module()
    made = train(whole, MemSGDStrategy(**options), folder="memsgd-whole")
    assert type(made.optimizers[0]) is AdamW
    by_name = train(Module(), "ddp_memsgd", epochs=1)
    assert type(by_name.strategy) is MemSGDStrategy and type(by_name.optimizers[0]) is AdamW
    train(Module(), MemSGDStrategy(**options), epochs=1, folder="memsgd-parts")
    resumed = Module(seed=5)
    again = train(resumed, MemSGDStrategy(**options), ckpt_path="last", folder="memsgd-parts")
    same_everywhere(resumed)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    memories = [made.strategy.comm_state.state_dict()["memory"], again.strategy.comm_state.state_dict()["memory"]]
    assert memories[0].keys() == memories[1].keys() and memories[0]
    assert all(torch.equal(memories[0][n][k], memories[1][n][k]) for n in memories[0] for k in memories[0][n])


if __name__ == "__main__":
    for name in sys.argv[2:]:
        globals()[name]()
        print(name, "ok", flush=True)
