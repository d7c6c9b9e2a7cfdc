"""`ReclaimBatchSize`: it finds the right size, and the search changes nothing else."""

import importlib
import random

import pytest
import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader

from sketch_lightning import reclaim

from .conftest import data, equal, make_module, network, ours, same_state, strategy


class Activations:
    """An exact meter: 1000 bytes for each sample of the largest batch."""

    def __init__(self):
        self.peak = 0

    def start(self):
        self.peak = 0

    def saw(self, batch):
        self.peak = max(self.peak, 1000 * len(batch[0]))

    def read(self):
        return self.peak


def make(namespace="lightning.pytorch", optimizers=None, size=200, manual=False, dropout=0.3):
    """A module with a batch size, dropout and batch norm, whose batches a meter sees."""
    pl = importlib.import_module(namespace)
    meter = Activations()

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(network(), torch.nn.BatchNorm1d(3), torch.nn.Dropout(dropout))
            self.batch_size, self.sizes, self.automatic_optimization = 4, [], not manual

        def training_step(self, batch, batch_idx):
            meter.saw(batch)
            self.sizes.append(len(batch[0]))
            loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True)
            return loss

        def on_train_epoch_start(self):
            self.sizes = []

        def configure_optimizers(self):
            if optimizers is not None:
                return optimizers(self)
            optimizer = AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def train_dataloader(self):
            return DataLoader(data(size), batch_size=self.batch_size, shuffle=True)

    return Module(), meter


def reclaiming(namespace="lightning.pytorch", **options):
    module = f"sketch_lightning.{namespace.replace('lightning.pytorch', 'lightning_pytorch')}"
    return importlib.import_module(module).ReclaimBatchSize(**options)


@pytest.mark.parametrize("by", ["sketch", "stock"])
def test_finds_and_leaves_nothing_else(by, trainer, namespace):
    """The run equals that of a module which had the size from the start, including shuffling and dropout."""
    own = {"sketch": lambda: "cs_adam", "stock": lambda: "auto"}[by]
    limits = {"max_epochs": 2, "max_steps": -1}
    torch.manual_seed(5)
    random.seed(5)
    module, meter = make(namespace)
    callback = reclaiming(namespace, budget=37_500, meter=meter)
    torch.manual_seed(6)
    made = trainer(namespace, strategy=own(), callbacks=[callback], **limits)
    made.fit(module)
    assert callback.batch_size == module.batch_size == 37 and module.sizes == [37] * 5 + [15]
    assert made.global_step == 12

    torch.manual_seed(5)
    other, _ = make(namespace)
    other.batch_size = 37
    torch.manual_seed(6)
    reference = trainer(namespace, strategy=own(), **limits)
    reference.fit(other)
    assert equal(module, other)
    assert same_state(list(module.state_dict().values()), list(other.state_dict().values()))  # batch norm's buffers
    assert same_state(made.optimizers[0].state_dict(), reference.optimizers[0].state_dict())
    assert same_state(
        made.lr_scheduler_configs[0].scheduler.state_dict(), reference.lr_scheduler_configs[0].scheduler.state_dict()
    )
    assert made.callback_metrics["loss_epoch"] == reference.callback_metrics["loss_epoch"]
    assert made.callbacks[0] is callback or callback in made.callbacks


class Look:
    """Checks, between search and training, that the state is the one with which a new trainer starts."""

    def __init__(self):
        self.seen = None

    def on_train_start(self, trainer, module):
        if self.seen is None:
            state = [o.state_dict() for o in trainer.optimizers]
            self.seen = [p.detach().clone() for p in module.state_dict().values()], state, torch.get_rng_state()


@pytest.mark.parametrize("finder", ["reclaim", "lightning"])
def test_no_residue_before_training(finder, trainer):
    from lightning.pytorch.callbacks import BatchSizeFinder, Callback

    look = type("Look", (Look, Callback), {})()
    torch.manual_seed(5)
    module, meter = make(dropout=0.0)
    before = [p.detach().clone() for p in module.state_dict().values()]
    if finder == "reclaim":
        callback = reclaiming(budget=10_000, meter=meter)
    else:
        callback = BatchSizeFinder(max_trials=2, steps_per_trial=2)
    made = trainer(strategy="cs_adam", callbacks=[callback, look], max_steps=1)
    made.fit(module)
    parameters, (state,), _ = look.seen
    assert same_state(parameters, before)
    assert state["state"] == {} and state["param_groups"][0]["lr"] == 1e-2
    assert made.global_step == 1 and made.optimizers[0].state_dict()["state"][0]["step"] == 1


def test_loaders_given_to_fit(trainer):
    def loader(size, **options):
        generator = torch.Generator().manual_seed(3)
        return DataLoader(data(100), batch_size=size, shuffle=True, generator=generator, drop_last=True, **options)

    module, meter = make()
    callback = reclaiming(budget=20_500, meter=meter, mode="power")
    trainer(strategy="cs_adam", callbacks=[callback], max_epochs=2, max_steps=-1).fit(module, loader(5))
    assert callback.batch_size == 20 and module.sizes == [20] * 5
    other, _ = make()
    torch.manual_seed(0)
    module, meter = make(dropout=0.0)
    other, _ = make(dropout=0.0)
    callback = reclaiming(budget=20_500, meter=meter, mode="power")
    trainer(strategy="cs_adam", callbacks=[callback], max_epochs=2, max_steps=-1).fit(module, [loader(5)][0])
    trainer(strategy="cs_adam", max_epochs=2, max_steps=-1).fit(other, loader(20))
    assert equal(module, other)


def test_a_datamodule(trainer):
    import lightning

    class Data(lightning.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.batch_size = 3

        def train_dataloader(self):
            return DataLoader(data(64), batch_size=self.batch_size)

    module, meter = make()
    del module.batch_size
    held, callback = Data(), reclaiming(budget=8_000, meter=meter)
    trainer(strategy="cs_adam", callbacks=[callback], max_epochs=1, max_steps=-1).fit(module, datamodule=held)
    assert held.batch_size == 8 and module.sizes == [8] * 8


def test_accumulation_is_lowered(trainer):
    module, meter = make(size=240)
    callback = reclaiming(budget=9_000, meter=meter, keep_effective=True)
    options = {"accumulate_grad_batches": 6, "max_epochs": 1, "max_steps": -1}
    made = trainer(strategy="cs_adam", callbacks=[callback], **options)
    made.fit(module)
    # 24 samples an update: 9 fit, 8 divide them.
    assert (module.batch_size, made.accumulate_grad_batches) == (8, 3) == callback_values(callback)
    assert made.global_step == 10 and module.sizes == [8] * 30


@pytest.mark.parametrize("given", [False, True])
def test_accumulation_is_lowered_from_another_start(given, trainer):
    """Samples of an update are those of the present batch size, not of the first that is tried."""
    module, meter = make(size=240)
    loaders = [DataLoader(data(240), batch_size=4)] if given else []
    callback = reclaiming(budget=9_000, meter=meter, keep_effective=True, init_val=2)
    options = {"accumulate_grad_batches": 6, "max_epochs": 1, "max_steps": -1}
    made = trainer(strategy="cs_adam", callbacks=[callback], **options)
    made.fit(module, *loaders)
    assert (8, 3) == callback_values(callback) and made.accumulate_grad_batches == 3
    assert made.global_step == 10 and module.sizes == [8] * 30


def callback_values(callback):
    return callback.batch_size, callback.accumulate_grad_batches


def test_out_of_memory_ends_a_trial(trainer):
    module, meter = make()
    step = type(module).training_step

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > 11:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return step(self, batch, batch_idx)

    type(module).training_step = training_step
    callback = reclaiming(budget=10**9, meter=meter)
    trainer(strategy="cs_adam", callbacks=[callback], max_steps=2).fit(module)
    assert callback.batch_size == 11


def test_other_errors_are_raised(trainer):
    module, meter = make()

    def training_step(self, batch, batch_idx):
        raise RuntimeError("of the module's own")

    type(module).training_step = training_step
    with pytest.raises(RuntimeError, match="of the module's own"):
        trainer(strategy="cs_adam", callbacks=[reclaiming(budget=1000, meter=meter)]).fit(module)


def test_resumed_without_a_search(trainer, tmp_path):
    module, meter = make()
    made = trainer(strategy="cs_adam", callbacks=[reclaiming(budget=9_000, meter=meter)], max_epochs=1, max_steps=-1)
    made.fit(module)
    made.save_checkpoint(tmp_path / "a.ckpt")
    module, meter = make()
    callback = reclaiming(budget=1, meter=meter)  # with this budget nothing would fit
    made = trainer(strategy="cs_adam", callbacks=[callback], max_epochs=2, max_steps=-1)
    made.fit(module, ckpt_path=tmp_path / "a.ckpt")
    assert module.batch_size == 9 and made.global_step == 2 * 23


def test_another_fit_is_another_search(trainer):
    callback = reclaiming(budget=9_000)
    for budget, expected in (9_000, 9), (7_000, 7):
        module, callback.meter = make()
        callback.budget = budget
        trainer(strategy="cs_adam", callbacks=[callback], max_steps=2).fit(module)
        assert callback.batch_size == module.batch_size == expected


@pytest.mark.parametrize("where", ["module", "list", "dataset"])
def test_generators_of_the_modules_own_loaders(where, trainer):
    def own():
        module, meter = make(dropout=0.0)
        generator = torch.Generator().manual_seed(3)
        held = data(100)
        if where == "dataset":  # seen on the loader alone
            held.generator = generator
        else:
            module.own = generator if where == "module" else [generator]
        module.train_dataloader = lambda: DataLoader(
            held, batch_size=module.batch_size, shuffle=True, generator=generator
        )
        return module, meter

    module, meter = own()
    callback = reclaiming(budget=9_000, meter=meter)
    trainer(strategy="cs_adam", callbacks=[callback]).fit(module)
    other, _ = own()
    other.batch_size = 9
    trainer(strategy="cs_adam").fit(other)
    assert module.batch_size == 9 and equal(module, other)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("why", ["error", "budget"])
def test_a_search_that_fails_leaves_nothing(why, given, trainer):
    module, meter = make()
    module.net = network()  # batch norm would refuse a batch of 1
    generator = torch.Generator().manual_seed(3)
    loaders = [DataLoader(data(100), batch_size=4, shuffle=True, generator=generator)] if given else []
    before = [p.detach().clone() for p in module.parameters()], generator.get_state()
    step = type(module).training_step

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > 8:
            raise ValueError("of the module's own")
        return step(self, batch, batch_idx)

    type(module).training_step = training_step
    budget, message = {"error": (10**9, "of the module's own"), "budget": (10, "is too small")}[why]
    made = trainer(strategy="cs_adam", callbacks=[reclaiming(budget=budget, meter=meter)])
    with pytest.raises(ValueError, match=message):
        made.fit(module, *loaders)
    assert module.batch_size == 4 and same_state([p.detach() for p in module.parameters()], before[0])
    assert torch.equal(generator.get_state(), before[1])
    assert not given or made.fit_loop._data_source.instance is loaders[0]


def test_a_schedule_of_the_old_length(trainer):
    def optimizers(module):
        optimizer = AdamW(module.parameters(), lr=1e-2)
        steps = int(module.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)]

    module, meter = make(optimizers=optimizers)
    made = trainer(callbacks=[reclaiming(budget=9_000, meter=meter)], max_epochs=2, max_steps=-1)
    with pytest.warns(UserWarning, match=r"had 50 batches .*estimated_stepping_batches.* and now has 23"):
        made.fit(module)


def test_no_more_than_the_data(trainer):
    module, meter = make(size=10)
    callback = reclaiming(budget=10**9, meter=meter)
    trainer(strategy="cs_adam", callbacks=[callback], max_steps=2).fit(module)
    assert callback.batch_size == 10


def test_resident_memory_of_a_process(trainer):
    """32 MiB a sample, as the meter of a CPU measures it together with the rest of the process."""
    import lightning

    class Large(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.batch_size = torch.nn.Linear(2, 2), 1

        def training_step(self, batch, batch_idx):
            x = self.net(batch[0])
            return torch.ones(len(x), 2**23).mul_(2.0).sum() * 0 + x.sum()

        def configure_optimizers(self):
            return AdamW(self.parameters())

        def train_dataloader(self):
            return DataLoader(
                torch.randn(64, 2), batch_size=self.batch_size, collate_fn=lambda rows: [torch.stack(rows)]
            )

    meter = reclaim.meter_for(torch.device("cpu"))
    meter.start()
    module, callback = Large(), reclaiming(budget=meter.read() + 5 * 2**25 + 2**24, max_val=8)
    trainer(strategy="cs_adam", callbacks=[callback], max_steps=1).fit(module)
    assert 4 <= callback.batch_size <= 6


@pytest.mark.parametrize(
    ("limit", "start", "most", "mode", "expected"),
    [
        (37, 4, 100, "binsearch", 37),
        (37, 4, 100, "power", 32),
        (37, 64, 100, "power", 32),
        (37, 64, 100, "binsearch", 37),
        (200, 4, 100, "binsearch", 100),
        (0, 4, 100, "binsearch", 0),
        (1, 1, 100, "binsearch", 1),
        (3, 50, 20, "power", 2),
        (1, 64, 64, "binsearch", 1),
    ],
)
def test_search(limit, start, most, mode, expected):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert reclaim.largest(fits, start, most, mode, 50) == expected
    assert len(set(tried)) == len(tried) and all(1 <= size <= most for size in tried)


def test_search_is_limited():
    tried = []
    assert reclaim.largest(lambda size: not tried.append(size), 2, 10**6, "binsearch", 3) == 8
    assert tried == [2, 4, 8]


@pytest.mark.parametrize(("effective", "largest", "expected"), [(24, 9, (8, 3)), (24, 24, (24, 1)), (7, 3, (1, 7))])
def test_split(effective, largest, expected):
    assert reclaim.split(effective, largest) == expected


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1000, 1000), ("2GiB", 2**31), ("1.5 MB", 1_500_000), (0.5, 500), ("0.25", 250), (1.0, 1000), ("800", 800)],
)
def test_budgets(budget, expected):
    assert reclaim.parse_budget(budget, 1000) == expected


@pytest.mark.parametrize("budget", [0, -1, 1.5, "much", "2 XB", True, float("nan"), ""])
def test_wrong_budgets(budget):
    with pytest.raises(ValueError, match=r"budget=.* is not allowed: budget must be a number of bytes"):
        reclaiming(budget=budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "slow"}, "mode='slow' is not one of 'binsearch', 'power'"),
        ({"steps_per_trial": 0}, "steps_per_trial=0 is not allowed"),
        ({"init_val": 2.5}, "init_val=2.5 is not allowed"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        reclaiming(budget=1000, **options)


def test_what_cannot_be_done(trainer):
    def fit(module, callback, *args, **options):
        trainer(strategy="cs_adam", callbacks=[callback], **options).fit(module, *args)

    module, meter = make()
    with pytest.raises(ValueError, match="budget=None means all memory of a CUDA device, but the device is cpu"):
        fit(module, reclaiming())
    module.net = network()  # batch norm would refuse a batch of 1
    with pytest.raises(ValueError, match=r"budget=10 \(10 B\) is too small: a batch of 1 needed"):
        fit(module, reclaiming(budget=10, meter=meter))
    with pytest.raises(ValueError, match="batch_arg_name='size'"):
        fit(module, reclaiming(budget=10, meter=meter, batch_arg_name="size"))
    with pytest.raises(ValueError, match=r"fit\(\) received a .*, but only DataLoaders"):
        fit(module, reclaiming(budget=10, meter=meter), [[torch.ones(2, 12)]])
    with pytest.raises(ValueError, match="batch_size=None makes no batches"):
        fit(module, reclaiming(budget=10, meter=meter), DataLoader(data(), batch_size=None))
    manual, meter = make(manual=True)
    with pytest.raises(ValueError, match="has no effect in manual optimization"):
        fit(manual, reclaiming(budget=10, meter=meter, keep_effective=True))


def test_a_fast_dev_run_searches_nothing(trainer):
    module, meter = make()
    callback = reclaiming(budget=10, meter=meter)
    trainer(strategy="cs_adam", callbacks=[callback], fast_dev_run=True).fit(module)
    assert callback.batch_size is None


def test_collections_of_loaders():
    loader = DataLoader(data(), batch_size=2, shuffle=True)
    new = reclaim.with_batch_size({"a": loader, "b": [loader, "other"]}, 5)
    assert new["a"].batch_size == new["b"][0].batch_size == 5 and new["b"][1] == "other"
    assert new["a"].sampler is loader.sampler and loader.batch_size == 2

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(7))

    assert [len(b) for b in reclaim.with_batch_size(DataLoader(Stream(), batch_size=2), 3)] == [3, 3, 1]


def test_module_of_ours(trainer):
    module, meter = make(optimizers=lambda m: ours("sm3", lr=1e-2)(m.parameters()))
    callback = reclaiming(budget=9_000, meter=meter)
    trainer(strategy=strategy("SketchStrategy"), callbacks=[callback], max_steps=2).fit(module)
    assert callback.batch_size == 9
    assert make_module("lightning.pytorch", None).batch_size == 8
