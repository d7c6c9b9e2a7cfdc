"""`run --optim`: a sketched optimizer replaces the one that the program builds, or an error names it."""

import subprocess
import sys

import pytest
import torch

from sketch_plugins import counterpart, registry, spelling
from sketch_plugins.counterpart import REPLACED
from sketch_plugins.running.replacing import WORDS

# A plain loop for several optimizers, which are expressions on the command line.
LOOP = """
import sys
from torch.optim import AdamW, Optimizer
import torch

class Subclass(AdamW):
    pass

class Foreign(Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        sys.stdout.write("stepped\\n")

class Outer(Optimizer):  # a wrapper, as accelerate's and ZeroRedundancyOptimizer are
    def __init__(self, params, cls, early=False):
        params = list(params)
        self.inner = cls(params, lr=0.01) if early else None
        super().__init__(params, {})
        self.inner = self.inner or cls(self.param_groups, lr=0.01)

    def step(self, closure=None):
        self.inner.step()

class Idle(Optimizer):  # a placeholder, as Lightning's for modules without an optimizer
    def __init__(self):
        super().__init__([torch.zeros(1)], {})

    def step(self, closure=None):
        pass

def train(expression):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
    optimizer = eval(expression, {**globals(), "params": model.parameters()})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10) if "0.05" in expression else None
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 64) + step).square().mean().backward()
        optimizer.step()
        if schedule:
            schedule.step()
    inner = getattr(optimizer, "inner", optimizer)
    digest = sum(p.double().abs().sum() for p in model.parameters()).item()
    print("RESULT", type(inner).__name__, isinstance(inner, Optimizer), isinstance(inner, AdamW), repr(digest))


def main():
    for expression in sys.argv[2:]:
        try:
            train(expression)
        except ValueError as error:
            if sys.argv[1] == "raise":
                raise
            print("REFUSED", error)


main()
"""
OPTIONS = ("--optim-args", "compression=0.25,min_compress_size=256")
GIVEN = "compression=0.25, min_compress_size=256)"
#: Name in the registry, optimizer of the program, expected optimizer. The rate 0.05 gets a schedule.
SAME = (
    ("cs_adam", "AdamW(params, lr=0.01)", "CSAdam(params, lr=0.01, weight_decay=0.01, "),
    ("cs_adam", "torch.optim.Adam(params, 0.02, (0.8, 0.9))", "CSAdam(params, 0.02, (0.8, 0.9), weight_decay=0.0, "),
    ("cs_adam", "AdamW(params, lr=0.02, fused=True)", "CSAdam(params, lr=0.02, weight_decay=0.01, "),
    ("cs_adam", "AdamW(params, lr=0.05)", "CSAdam(params, lr=0.05, weight_decay=0.01, "),
    ("cs_momentum", "torch.optim.SGD(params, 0.1, 0.9)", "CSMomentum(params, lr=0.1, momentum=0.9, "),
    ("cs_adagrad", "torch.optim.Adagrad(params)", "CSAdagrad(params, lr=0.01, "),
)


def lines(done):
    return [line.split() for line in done.stdout.splitlines()]


def test_a_plain_loop_trains_as_if_it_had_built_the_counterpart(run, write):
    write("loop.py", LOOP)
    direct = [f"__import__('sketch_plugins').{call}{GIVEN}" for _, _, call in SAME]
    expected = lines(run("loop.py", "raise", *direct))
    assert len({digest for *_, digest in expected}) == len(SAME)  # no two of them train alike
    got = []
    for name in dict.fromkeys(name for name, *_ in SAME):
        built = [built for known, built, _ in SAME if known == name]
        done = run("--optim", name, *OPTIONS, "loop.py", "raise", *built)
        got += lines(done)
        (said,) = done.stderr.splitlines()  # once, whatever the number of optimizers
        old, new = built[0].partition("(")[0].removeprefix("torch.optim."), registry.get(name).cls.__name__
        assert said.startswith(f"INFO sketch-plugins run: replaced {old} by {new}(lr=") and "compression=0.25" in said
    assert got == expected
    assert [line[2:4] for line in got] == [["True", "False"]] * len(SAME)  # an Optimizer, and no AdamW


REFUSED = {
    "torch.optim.LBFGS(params)": "torch.optim.lbfgs.LBFGS has no sketched counterpart",
    "torch.optim.RMSprop(params)": "torch.optim.rmsprop.RMSprop has no sketched counterpart",
    "AdamW(params, amsgrad=True)": "AdamW(amsgrad=True) cannot be transferred to cs_adam",
    "torch.optim.SGD(params, 0.1, dampening=0.5)": "SGD(dampening=0.5) cannot be transferred to cs_adam",
    "Subclass(params)": "__main__.Subclass has no sketched counterpart",
    "Foreign(params)": "__main__.Foreign has no sketched counterpart",
}


def test_what_has_no_counterpart_is_refused_by_name(run, write):
    write("loop.py", LOOP)
    done = run("--optim", "cs_adam", "loop.py", "catch", *REFUSED)
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(REFUSED)  # no optimizer has taken a step
    for line, named in zip(said, REFUSED.values(), strict=True):
        assert line.startswith(f"REFUSED {named}")
    done = run("--optim", "cs_adam", "loop.py", "raise", "Foreign(params)")
    assert (done.returncode, done.stdout) == (1, "")
    assert REFUSED["Foreign(params)"] in done.stderr.splitlines()[-1]  # nothing is added at the end of the run


def test_wrappers_placeholders_and_ours_are_left_alone(run, write):
    write("loop.py", LOOP)
    wrappers = ("Outer(params, AdamW)", "Outer(params, AdamW, early=True)")
    # And a placeholder, and one of ours.
    others = ("Idle()", "__import__('sketch_plugins').CSAdam(params)")
    done = run("--optim", "sm3", "loop.py", "raise", *wrappers, *others)
    assert [line[1] for line in lines(done)] == ["SM3", "SM3", "Idle", "CSAdam"]
    assert done.stderr.count("sketch-plugins run:") == 1  # the line about the replacement


def test_a_placeholder_is_no_optimizer(run, write):
    write("loop.py", LOOP)
    done = run("loop.py", "raise", "Idle()")
    assert lines(done)[0][1] == "Idle" and done.stderr == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--optim", "cs_adma"), "unknown optimizer 'cs_adma'"),
        (
            ("--optim", "cs_adam", "--optim-args", "lr=0.1"),
            "--optim-args sets lr=0.1, but the learning rate is set by the",
        ),
        (("--optim", "cs_adam", "--optim-args", "eps"), "--optim-args 'eps': 'eps' is not of the form key=value"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_no_program_takes_it_for_a_missing_torch(options, message, run, write):
    write("train.py", "try:\n    import torch\nexcept Exception:\n    torch = None\nprint('went on')")
    done = run(*options, "train.py")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sketch-plugins run: --optim {options[1]}: ") and message in line


def test_every_other_optimizer_of_torch_is_refused_when_it_is_built(run, write):
    """Without a step: some of them name `torch.optim` itself as their module."""
    write(
        "build.py",
        """
        import inspect, torch
        for name, cls in inspect.getmembers(torch.optim, inspect.isclass):
            if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
                try:
                    made = cls([torch.nn.Parameter(torch.ones(4, 4))], lr=0.1)
                    print(name, "became", type(made).__name__)
                except ValueError as error:
                    assert "has no sketched counterpart" in str(error), error
                    print(name, "refused")
        """,
    )
    done = run("--optim", "cs_adam", "build.py")
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert {name for name, what in said.items() if what == "became CSAdam"} == {cls.__name__ for cls in REPLACED}
    assert {what for name, what in said.items() if "became" not in what} == {"refused"} and len(said) > 10
    assert all(what in ("refused", "became CSAdam") for what in said.values()), said


def parameter():
    return torch.nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("cls", "name", "key", "value"),
    [
        (torch.optim.AdamW, "cs_adam", "depth", 11),
        (torch.optim.AdamW, "cs_adam", "seed", "x"),  # not even a value that would be allowed
        (torch.optim.AdamW, "sketchy", "preset", "mine"),
        (torch.optim.AdamW, "sketchy", "compile", True),  # no option of sketchy, but a key that it has
        (torch.optim.SGD, "cs_adam", "betas", (0.5, 0.6)),  # AdamW's own, but SGD does not read it
        (torch.optim.Adam, "cs_momentum", "momentum", 0.5),
    ],
    ids=str,
)
def test_keys_of_the_program_s_groups_become_no_options(cls, name, key, value):
    """In the constructor and in a group that is added later; the program means something else by them."""
    said = (
        rf"parameter group 1 has the key '{key}' .*{cls.__name__}.*option of {name}.*program.*--optim-args {key}=\.\.\."
    )
    given = cls([{"params": parameter(), "lr_scale": 0.5}, {"params": parameter(), key: value}], lr=0.1)
    with pytest.raises(ValueError, match=said):
        counterpart.become(given, name, {}, WORDS)
    made = cls([{"params": parameter(), "lr_scale": 0.5}], lr=0.1)
    counterpart.become(made, name, {}, WORDS)
    with pytest.raises(ValueError, match=said):
        made.add_param_group({"params": parameter(), key: value})
    assert len(made.param_groups) == 1
    made.add_param_group({"params": parameter(), "lr": 0.3, "lr_scale": 0.25})  # others stay
    assert [(group["lr"], group["lr_scale"]) for group in made.param_groups] == [(0.1, 0.5), (0.3, 0.25)]


def test_an_optimizer_that_is_built_again_takes_what_it_is_given_then():
    made = torch.optim.SGD([parameter()], lr=0.1, momentum=0.7)
    counterpart.become(made, "cs_adam", {}, WORDS)
    made.__init__([{"params": parameter(), "depth": 2}], lr=0.5)
    assert [made.param_groups[0][key] for key in ("lr", "betas", "depth")] == [0.5, (0.9, 0.999), 2]


def test_a_key_that_only_another_optimizer_of_ours_reads_stays_the_program_s():
    made = torch.optim.AdamW([{"params": parameter(), "depth": 11}], lr=0.1)
    counterpart.become(made, "sm3", {"betas": (0.9, 0.999), "eps": 1e-30}, WORDS)
    assert made.param_groups[0]["depth"] == 11 and "depth" not in registry.get("sm3").options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--optim", "cs_adma"), "--optim cs_adma: unknown optimizer 'cs_adma'. Did you mean 'cs_adam'"),
        (("--optim", ""), "--optim : unknown optimizer ''"),
        (("--optim", "sm3", "--optim-args", "eps"), "--optim sm3: --optim-args 'eps': 'eps' is not of the form"),
    ],
    ids=str,
)
def test_a_mistake_is_found_before_a_program_that_never_imports_torch(options, message, run, write):
    write("program.py", "print('went on')")
    for program in (("program.py",), ("-m", "program"), ("python", "program.py")):
        done = run(*options, *program)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"sketch-plugins run: {message}")


def test_names_are_known_without_torch():
    assert tuple(spelling.CLASSES) == registry.names()
    command = "import sys; from sketch_plugins import spelling; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("cls", REPLACED)
@pytest.mark.parametrize("name", registry.names())
def test_becoming_is_what_building_is(cls, name):
    """The same object, with the groups, options and updates of the counterpart."""

    def trained(make):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        old = cls([{"params": model.weight}, {"params": model.bias, "lr": 0.3}], lr=0.1)
        new = make(old)
        for _ in range(2):
            model(torch.ones(2, 64)).square().mean().backward()
            new.step()
        return old, new, [p.detach().clone() for p in model.parameters()]

    def become(old):
        counterpart.become(old, name, {"preset": "default"})
        return old

    _, built, expected = trained(lambda old: counterpart.counterpart(old, name, {"preset": "default"}))
    same, became, weights = trained(become)
    assert became is same and type(became) is type(built) is registry.get(name).cls
    assert became.__dict__.keys() == built.__dict__.keys()
    for ours, theirs in zip(became.param_groups, built.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_the_classes_stay_what_they_are(run, write):
    """Programs use `inspect.signature` to find `fused`, and command lines use it for every argument."""
    write(
        "look.py",
        """
        import inspect, torch
        from torch.optim import *
        for cls in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Optimizer):
            print(cls, inspect.signature(cls), cls.__mro__, inspect.getsource(cls.__init__)[:60], cls.__init__.__doc__)
        print([name for name in dir(torch.optim)])
        """,
    )
    theirs = run("look.py", python=True)
    for options in ((), ("--optim", "cs_adam")):
        ours = run(*options, "look.py")
        assert "fused" in ours.stdout and ours.stdout == theirs.stdout


TRAINER = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
rows = torch.arange(16 * 32).reshape(32, 16) % 64
trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
trainer.train()
digest = sum(p.double().abs().sum() for p in model.parameters()).item()
optimizer = trainer.optimizer.optimizer
print("RESULT", type(optimizer).__name__, optimizer.param_groups[0]["weight_decay"], repr(digest))
"""


def test_trainer_that_is_told_nothing_trains_as_if_it_had_been_told(run, write, results):
    pytest.importorskip("transformers")
    write("train.py", TRAINER)
    training = (
        *("--output_dir", "out", "--max_steps", "3", "--use_cpu", "--report_to", "none", "--save_strategy", "no"),
        *("--weight_decay", "0.1"),
    )
    told = results(run("train.py", *training, "--optim", "cs_adam", "--optim_args", OPTIONS[1]))
    assert results(run("--optim", "cs_adam", *OPTIONS, "train.py", *training)) == told
    assert told[0][:2] == ["CSAdam", "0.1"]


def test_a_program_of_accelerate_that_builds_adamw(run, write, results):
    """accelerate's wrapper is an optimizer, too, and loads a given state."""
    pytest.importorskip("accelerate")
    write(
        "train.py",
        """
        import sys
        import torch
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        torch.manual_seed(accelerator.process_index)
        model = torch.nn.Linear(64, 8)
        optimizer = torch.optim.AdamW(params=model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
        data = torch.utils.data.DataLoader(torch.ones(8, 64), batch_size=2)
        model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
        for batch in data:
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        digest = sum(p.double().abs().sum() for p in model.parameters()).item()
        line = f"RESULT {accelerator.num_processes} {type(optimizer.optimizer).__name__} {digest!r}\\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        accelerator.end_training()  # gloo's threads may end a process that leaves its group to its exit
        """,
    )
    done = run("--optim", "cs_adam", "torchrun", "--standalone", "--nproc_per_node", "2", "train.py")
    first, second = results(done)
    assert first[:2] == ["2", "CSAdam"] and first == second
    assert done.stderr.count("replaced AdamW by CSAdam") == 1  # of the first of two processes


def test_zero_redundancy_optimizer_shards_ours(run, write, results):
    write(
        "train.py",
        """
        import gc
        import sys
        import torch
        from torch.distributed.optim import ZeroRedundancyOptimizer

        def train():
            torch.manual_seed(0)
            model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 8))
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
            for _ in range(2):
                model(torch.ones(2, 64)).square().mean().backward()
                optimizer.step()
            digest = sum(p.double().abs().sum() for p in model.parameters()).item()
            sys.stdout.write(f"RESULT {type(optimizer.optim).__name__} {digest!r}\\n")
            sys.stdout.flush()

        torch.distributed.init_process_group("gloo")
        train()
        # Whatever still has the group would end its threads when the interpreter ends, where torch sometimes aborts.
        gc.collect()
        torch.distributed.destroy_process_group()
        """,
    )
    first, second = results(run("--optim", "sm3", "torchrun", "--standalone", "--nproc_per_node", "2", "train.py"))
    assert first[0] == "SM3" and first == second


def test_an_optimizer_of_deepspeed_is_refused_with_what_to_write_in_its_configuration(run, write):
    """DeepSpeed's own kernels for {"type": "AdamW"} take minutes to compile, so only their class is used."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    write(
        "train.py",
        """
        import torch
        from deepspeed.ops.adam import FusedAdam

        class Uncompiled(FusedAdam):
            def __init__(self, params):
                torch.optim.Optimizer.__init__(self, params, {"lr": 0.1})

            def step(self):
                raise SystemExit("it was not refused")

        Uncompiled.__module__ = FusedAdam.__module__
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        Uncompiled([weight]).step()
        """,
    )
    out = run("--optim", "cs_adam", "train.py")
    assert out.returncode == 1 and "deepspeed.ops.adam.fused_adam.Uncompiled has no sketched counterpart" in out.stderr
    assert '{"type": "cs_adam"}' in out.stderr
