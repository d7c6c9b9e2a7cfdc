"""The ladder of ``plan --advise``: its bytes are the plan's, its choice grants the wish, and its lines work."""

import ast
import dataclasses
import importlib.util
import json
import os
import warnings

import pytest
import torch

from sketch_plugins import advise, cli, plan, registry
from sketch_plugins.memory.advise import HOST_BYTES, WISHES
from sketch_plugins.memory.advise_lines import BUCKET, Settings, lines, notes, refused
from sketch_plugins.memory.advise_table import FRAMEWORKS, format_count
from sketch_plugins.memory.plan_cuda import WORKSPACE

pytest.importorskip("transformers", reason="models by name need transformers")

from transformers import GPT2Config, GPT2LMHeadModel

LADDER = [
    "AdamW, as it is", "sketched state", "lean state", "bf16 with 24-bit weights", "steps in backward",
    "gradient checkpointing", "offload to host memory",
]  # fmt: skip


def tiny(**changes):
    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "n_positions": 64}
    return GPT2Config(
        **{**size, **changes}, architectures=["GPT2LMHeadModel"], bos_token_id=0, eos_token_id=0, pad_token_id=0
    )


COMMON = {"seq_len": 32, "batch_size": 2, "reserve": 0}


@pytest.fixture(scope="module")
def ladder():
    return advise(tiny(), gpu_memory="100MB", wish="largest-batch", **COMMON)


def test_each_rung_s_bytes_are_the_plan_s(ladder):
    assert [rung.name for rung in ladder.rungs] == LADDER
    lean = "preset=lean"
    wanted = plan(
        tiny(),
        gpu_memory="100MB",
        optimizers=["adamw", "cs_adam", f"cs_adam:{lean}", f"cs_adam:{lean},weight_bits=24",
                    f"cs_adam_layerwise:{lean},weight_bits=24"],
        **COMMON,
    ).rows  # fmt: skip
    checkpointed = plan(
        tiny(), gpu_memory="100MB", optimizers=f"cs_adam_layerwise:{lean},weight_bits=24", gradient_checkpointing=True,
        **COMMON,
    ).rows  # fmt: skip
    for rung, row in zip(ladder.rungs, [*wanted, *checkpointed], strict=False):
        assert dataclasses.replace(rung.plan, optimizer=row.optimizer) == row
        assert rung.fits == (row.peak <= 100e6) and rung.host == 0
    # The state takes no memory on the device; the rest is as in the rung before.
    before, last = ladder.rungs[-2:]
    assert last.plan.state == 0 and last.plan.peak == before.plan.peak - before.plan.state
    assert last.plan.largest_batch >= before.plan.largest_batch
    assert last.host == HOST_BYTES * ladder.params + ladder.rungs[2].plan.state
    # 24-bit weights: half the bytes, and a byte a parameter in the state.
    lean_state, bits = ladder.rungs[2:4]
    assert 2 * bits.plan.parameters == pytest.approx(lean_state.plan.parameters, rel=0.03)  # blocks of 512 bytes
    assert bits.plan.state - lean_state.plan.state == pytest.approx(ladder.params, rel=0.15)  # blocks, too


def test_the_largest_batch(ladder):
    most = [rung.plan.largest_batch for rung in ladder.rungs]
    assert most[ladder.chosen] == max(most) and ladder.chosen == most.index(max(most))
    assert f"the largest batch is {max(most)}, in rung {ladder.chosen}" in ladder.verdict
    assert f"({most[0]} with AdamW)" in ladder.verdict
    # The lines of each rung turn on its own setting.
    for rung in ladder.rungs:
        assert f"per_device_train_batch_size={rung.plan.largest_batch}," in rung.lines["trainer"]
        assert f"batch_size={rung.plan.largest_batch})" in rung.lines["lightning"]


@pytest.mark.parametrize("rung", [0, 3, 6])
def test_the_least_change_stops_at_the_first_rung_that_fits(rung, ladder):
    peaks = [one.plan.peak for one in ladder.rungs]
    first = next(place for place, peak in enumerate(peaks) if peak <= peaks[rung])
    found = advise(tiny(), gpu_memory=peaks[rung], wish="least-change", **COMMON)
    assert found.chosen == first and [one.name for one in found.rungs] == LADDER[: first + 1]
    assert not any(one.fits for one in found.rungs[:-1]) and found.rungs[-1].fits
    assert found.verdict.startswith(f"stopped at rung {first}, {LADDER[first]}: the first one in which batch 2 fits")
    assert "per_device_train_batch_size=2," in str(found)


def test_nothing_fits(ladder):
    least = min(rung.plan.peak for rung in ladder.rungs)
    found = advise(tiny(), gpu_memory=least, **{**COMMON, "batch_size": 64})
    assert found.chosen is None and [rung.name for rung in found.rungs] == LADDER and "---" not in str(found)
    assert "batch 64 fits in no rung: the least peak is" in found.verdict
    assert found.verdict.endswith(f"A batch of {max(rung.plan.largest_batch for rung in found.rungs)} fits")
    for wish, said in (("least-change", "Not even one sample fits"), ("largest-batch", "not even one sample fits in")):
        found = advise(tiny(), gpu_memory=WORKSPACE + 4 * 10**5, wish=wish, **COMMON)
        assert found.chosen is None and said in found.verdict


def test_the_largest_model():
    """The number of parameters grows with the memory, except for cuBLAS's workspace, which all models have alike."""
    kind = {**COMMON, "wish": "largest-model"}
    found = advise(tiny(), gpu_memory="1GB", **kind)
    assert [rung.name for rung in found.rungs] == LADDER
    for rung in found.rungs:
        each = (rung.plan.peak - WORKSPACE) / found.params
        assert rung.largest_model == int((1e9 - WORKSPACE) / each) and rung.plan.largest_batch is None
    most = [rung.largest_model for rung in found.rungs]
    assert found.chosen == most.index(max(most)) and "grow in proportion" in found.notes[-1]
    # A model larger than the budget has an answer, too.
    small = advise(tiny(), gpu_memory=WORKSPACE + 10**6, **kind)
    assert all(rung.largest_model < small.params and not rung.fits for rung in small.rungs)
    # The assumption: more layers of the same kind. The embedding is counted as if it grew with them.
    deeper = tiny(n_layer=12)
    (row,) = plan(deeper, optimizers="adamw", seq_len=32, batch_size=2).rows
    said = advise(tiny(), gpu_memory=row.peak, **kind).rungs[0].largest_model
    (params,) = {plan(deeper, optimizers="adamw", seq_len=32, batch_size=2).params}
    assert 0.5 * params < said < 1.05 * params


def test_rungs_that_there_are_not():
    found = advise(tiny(), gpu_memory="1GB", wish="largest-model", precision="bf16", device="cpu", **COMMON)
    assert [rung.name for rung in found.rungs] == [name for name in LADDER[:-1] if "24-bit" not in name]
    assert any("bfloat16 already" in note for note in found.notes) and any(
        "host memory itself" in n for n in found.notes
    )
    assert not any("weight_bits" in text for rung in found.rungs for text in rung.lines.values())
    found = advise(tiny(), gpu_memory="1GB", wish="largest-model", gradient_checkpointing=True, **COMMON)
    assert [rung.name for rung in found.rungs] == [name for name in LADDER if "checkpointing" not in name]
    assert all("gradient_checkpointing=True" in rung.lines["trainer"] for rung in found.rungs)
    found = advise(
        lambda: torch.nn.Linear(1000, 1000),
        sample=lambda batch: torch.zeros(batch, 1000),
        loss=lambda model, batch: model(batch).square().mean(),
        gpu_memory="1GB", wish="largest-model", reserve=0, precision="fp32",
    )  # fmt: skip
    assert [rung.name for rung in found.rungs] == [name for name in LADDER if "checkpointing" not in name]
    assert any("turn it on in the module itself" in note for note in found.notes)


def test_a_model_that_cannot_compute_its_activations_again(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CANNOT))
    found = advise(file, gpu_memory="1GB", wish="largest-model", **COMMON)
    assert [rung.name for rung in found.rungs] == [name for name in LADDER if "checkpointing" not in name]
    assert any("does not support gradient checkpointing" in note for note in found.notes)
    assert not any("gradient_checkpointing" in text for rung in found.rungs for text in rung.lines.values())


CANNOT = {"model_type": "xlnet", "n_layer": 1, "d_model": 32, "n_head": 2, "d_inner": 32, "vocab_size": 99}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wish": ["largest-batch"]}, r"wish=\['largest-batch'\] is not one of largest-batch, largest-model"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing='yes' is not allowed: it must be True or False"),
        ({"wish": "everything"}, "wish='everything' is not one of largest-batch, largest-model, least-change"),
        ({"gpu_memory": None}, "advice needs a budget"),
        ({"gpu_memory": "lots"}, "gpu_memory='lots' is not allowed"),
        ({"precision": "int8"}, "precision='int8' is not one of fp32"),
        ({"device": "tpu"}, "device='tpu' is not one of cuda, cpu"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"gpu_memory": "1MB", "reserve": "2MB"}, "is not larger than the 2.0 MB of reserve"),
        (
            {"gpu_memory": "1KB"},
            r"the parameters alone take .* in bfloat16, the lowest .* a smaller model\. DeepSpeed's ZeRO-3, which the "
            r"ladder does not have, .*offload_param",
        ),
        ({"gpu_memory": "1KB", "device": "cpu"}, "alone take .*: use a larger budget or a smaller model$"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("wish", WISHES)
def test_what_makes_no_sense(wish, arguments, message):
    if wish == "largest-model" and "alone" in message:
        # No error: each rung says how large a model may be.
        found = advise(tiny(), **{"wish": wish, **COMMON, **arguments})
        assert all(rung.largest_model < found.params and not rung.fits for rung in found.rungs)
        return
    with pytest.raises(ValueError, match=message):
        advise(tiny(), **{"gpu_memory": "1GB", "wish": wish, **COMMON, **arguments})


def test_counts():
    assert [format_count(n) for n in (999, 1500, 2.34e6, 7e9, 1.2e12)] == ["999", "1.5 K", "2.3 M", "7.0 B", "1200.0 B"]


# -- the lines ---------------------------------------------------------------------------------------------------------


def settings():
    for precision in ("fp32", "bf16", "bf16-mixed", "fp16-mixed"):
        base = Settings("adamw", precision, batch=4, accumulation=2)
        ours = dataclasses.replace(base, optimizer="cs_adam")
        lean = dataclasses.replace(ours, lean=True)
        bits = dataclasses.replace(lean, precision="bf16", weight_bits=24 if precision != "bf16" else None)
        back = dataclasses.replace(bits, in_backward=True)
        again = dataclasses.replace(back, checkpointing=True)
        away = dataclasses.replace(again, precision="bf16", weight_bits=None, offloaded=True)
        yield from (
            (f"{precision}-{number}", one) for number, one in enumerate((base, ours, lean, bits, back, again, away))
        )


SETTINGS = dict(settings())


@pytest.fixture
def clean():
    """Remove the state that TrainingArguments and Accelerator leave in the process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(tiny(n_embd=32, vocab_size=100, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = torch.arange(16) + index
        return {"input_ids": row, "labels": row}


def on_a_cpu(code):
    """Trainer's arguments refuse bf16 without a GPU, unless they are told to use the CPU."""
    assert '    "out",\n' in code
    return code.replace('"out",', '"out", use_cpu=True,')


def run(code):
    scope = {"model": model(), "dataset": Tokens()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and Lightning, of this machine's kind
        exec(compile(code, "lines", "exec"), scope)
    return scope


@pytest.mark.parametrize("case", SETTINGS)
def test_the_lines_for_trainer_are_arguments(case, clean, tmp_path, monkeypatch):
    own = SETTINGS[case]
    if own.offloaded:
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = run(on_a_cpu(lines(own)["trainer"]))["args"]
    assert args.per_device_train_batch_size == 4 and args.gradient_accumulation_steps == 2
    name = "adamw_torch_fused" if own.optimizer == "adamw" else "cs_adam"
    in_backward = own.in_backward and not own.offloaded
    assert args.optim == (f"{name}_layerwise" if in_backward else name)
    assert args.bf16 == (own.precision == "bf16-mixed" or own.offloaded) and args.fp16 == (
        own.precision == "fp16-mixed"
    )
    assert args.gradient_checkpointing == own.checkpointing
    assert (args.max_grad_norm == 0) == in_backward
    assert bool(args.deepspeed) == own.offloaded
    if own.offloaded:  # Trainer puts its own max_grad_norm there
        assert args.deepspeed["gradient_clipping"] == "auto"
    if own.optimizer != "adamw":
        from sketch_transformers.arguments import optimizer_cls_and_kwargs

        _, kwargs = optimizer_cls_and_kwargs(args)
        assert {name: value for name, value in kwargs.items() if name in ("preset", "weight_bits")} == own.options


@pytest.mark.parametrize("case", SETTINGS)
def test_the_lines_for_lightning_make_a_trainer(case, tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="needs the extra `lightning`")
    own = SETTINGS[case]
    if own.offloaded:
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    monkeypatch.chdir(tmp_path)
    found = run(lines(own)["lightning"])
    trainer, data = found["trainer"], found["data"]
    assert data.batch_size == 4 and trainer.accumulate_grad_batches == 2
    wanted = {"fp32": "32-true", "bf16": "bf16-true", "bf16-mixed": "bf16-mixed", "fp16-mixed": "bf16-mixed"}
    assert trainer.precision == ("bf16-true" if own.offloaded else wanted[own.precision])  # no fp16 on a CPU
    strategy = trainer.strategy
    if own.optimizer == "adamw":
        assert not hasattr(strategy, "_sketch_name")
    else:
        assert strategy._sketch_name == "cs_adam"
        assert {key: strategy._sketch_options.get(key) for key in own.options} == own.options
    assert any(getattr(m, "gradient_checkpointing", False) for m in found["model"].modules()) == own.checkpointing
    has = any(type(one).__name__ == "OptimizerInBackward" for one in trainer.callbacks)
    assert has == (own.in_backward and not own.offloaded)
    if own.offloaded:
        zero = strategy.config["zero_optimization"]
        assert zero["stage"] == 2 and zero["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize("case", SETTINGS)
def test_the_lines_for_accelerate(case, clean, monkeypatch):
    pytest.importorskip("accelerate", reason="needs the extra `accelerate`")
    own, code = SETTINGS[case], lines(SETTINGS[case])["accelerate"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if own.offloaded:  # an engine takes a minute to compile, so only its plugin is made
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
        from accelerate import DeepSpeedPlugin

        scope = {"DeepSpeedPlugin": DeepSpeedPlugin}
        nodes = list(ast.walk(ast.parse(code)))
        (config,) = [n for n in nodes if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "config"]
        (call,) = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "DeepSpeedPlugin"]
        exec(ast.unparse(config), scope)
        made = eval(ast.unparse(call), scope).deepspeed_config
        assert made["zero_optimization"] == {
            "stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": BUCKET,
        }  # fmt: skip
        # accelerate fills these in from the data and from its own argument.
        assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == "auto"
        assert "gradient_accumulation_steps=2" in code
        return
    if own.precision == "fp16-mixed":
        assert 'mixed_precision="fp16"' in code  # which accelerate refuses without a GPU
        code = code.replace('"fp16"', '"no"')
    found = run(code)
    inner = found["optimizer"].optimizer
    assert type(inner).__name__ == ("AdamW" if own.optimizer == "adamw" else "CSAdam")
    assert found["accelerator"].gradient_accumulation_steps == 2
    weights = {p.dtype for p in found["model"].parameters()}
    assert weights == {torch.bfloat16 if own.precision == "bf16" else torch.float32}
    assert inner.param_groups[0].get("weight_bits") == own.weight_bits
    assert (getattr(inner, "_in_backward", None) is not None) == own.in_backward
    before = [p.clone() for p in found["model"].parameters()]
    for batch in found["data"]:
        with found["accelerator"].accumulate(found["model"]):
            found["accelerator"].backward(found["model"](**batch).loss)
            found["optimizer"].step()
            found["optimizer"].zero_grad()
    assert sum(not torch.equal(a, b) for a, b in zip(before, found["model"].parameters(), strict=True)) > 5


@pytest.mark.parametrize("case", SETTINGS)
def test_the_configuration_for_deepspeed(case):
    own = SETTINGS[case]
    made, why = lines(own), refused(own)
    assert ("deepspeed" in made) == (not why)
    if why:
        assert own.weight_bits or own.in_backward
        assert ("weight_bits" in why["deepspeed"]) == bool(own.weight_bits)
        return
    config = json.loads(made["deepspeed"])
    block = config["optimizer"]
    if own.optimizer == "adamw":
        assert block["type"] == "AdamW"
    else:
        assert block["type"] in registry.names()
        registry.get(block["type"]).cls([torch.nn.Parameter(torch.zeros(2))], **block["params"])
    if importlib.util.find_spec("deepspeed") is None:
        return
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig(config)
    assert read.train_micro_batch_size_per_gpu == 4 and read.gradient_accumulation_steps == 2
    assert read.optimizer_name in (block["type"], block["type"].lower())
    assert read.zero_optimization_stage == (2 if own.offloaded else 0)


def test_what_deepspeed_keeps_beyond_the_plan(ladder):
    """Without ZeRO: 2 bytes of weights, 2 of gradients, 4 of each copy, and the state of float32 weights."""
    for own in SETTINGS.values():
        found = notes(own, 10**9)
        assert (set(found) == {"deepspeed"}) == (
            own.precision != "fp32" and not own.in_backward and not own.weight_bits
        )
        if found:
            weights, adamw = (2 if own.precision == "bf16" else 4), 8 if own.optimizer == "adamw" else 0
            more = 2 + 2 + 4 + 4 + adamw - (2 * weights + adamw * weights // 4)
            assert (
                f"about {more} bytes a parameter ({more}.0 GB) more in the step than the table counts"
                in (found["deepspeed"])
            )
    bf16 = plan(tiny(), optimizers="adamw", precision="bf16", seq_len=32, batch_size=2)
    assert bf16.rows[0].state == pytest.approx(4 * bf16.params, rel=0.05)
    # It is printed beside the lines.
    note = notes(Settings("adamw", "bf16-mixed"), ladder.params)
    assert ladder.rungs[0].notes == ladder.to_dict()["rungs"][0]["notes"] == note and ladder.rungs[3].notes == {}
    header = "--- DeepSpeed (import sketch_deepspeed before deepspeed.initialize)"
    assert f"{header}\n({note['deepspeed']})\n{{" in dataclasses.replace(ladder, chosen=0).text


def test_a_run_by_the_lines(ladder, clean, tmp_path, monkeypatch):
    """Trainer with everything but offloading: it trains, and the weights have their additional bits."""
    from transformers import Trainer

    from sketch_plugins import full_precision_state_dict

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code = on_a_cpu(ladder.rungs[LADDER.index("gradient checkpointing")].lines["trainer"])
    found = run(code.replace('"out",', '"out", max_steps=2,'))
    trainer = Trainer(found["model"], found["args"], train_dataset=Tokens())
    before = {name: p.float() for name, p in found["model"].named_parameters()}
    trainer.train()
    weights = full_precision_state_dict(trainer.model, trainer.optimizer)
    moved = [not torch.equal(old, weights[name]) for name, old in before.items()]
    assert all(moved) and {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    tiny().save_pretrained(tmp_path)
    return ["plan", "--model", str(tmp_path / "config.json"), "--batch-size", "2", "--seq-len", "32"]


def test_the_command(small, capsys):
    argv = [*small, "--gpu-memory", "100MB", "--reserve", "0", "--advise"]
    assert cli.main([*argv, "least-change"]) == 0
    said = capsys.readouterr().out
    assert "stopped at rung 0, AdamW, as it is" in said and "largest batch" in said and "--- DeepSpeed" in said
    assert "steps in backward" not in said
    assert cli.main([*argv, "largest-model"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in LADDER) and "largest model" in said and "the largest model has about" in said
    assert cli.main([*argv, "largest-batch", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rung["name"] for rung in found["rungs"]] == LADDER and found["wish"] == "largest-batch"
    assert set(found["rungs"][0]["lines"]) == set(FRAMEWORKS) and "deepspeed" in found["rungs"][4]["refused"]
    assert found["rungs"][0]["plan"]["largest_batch"] > 2 and found["rungs"][6]["host"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optimizer", "sm3"], "--optimizer and --advise cannot be combined"),
        (["--plot", "chart.png"], "--plot and --advise cannot be combined"),
        (["--zero-stage", "2", "--world-size", "2"], "--zero-stage and --advise cannot be combined"),
        (["--world-size", "2"], "--world-size and --advise cannot be combined"),
        (["--seq-len", "9999"], "larger than the 64 positions"),
    ],
)
def test_the_command_says_what_is_wrong(more, message, small, capsys):
    assert cli.main([*small, "--gpu-memory", "1GiB", "--advise", "least-change", *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("sketch-plugins plan: ") and "Traceback" not in err


def test_the_command_needs_a_budget_and_a_wish_that_there_is(small, capsys):
    assert cli.main([*small, "--advise", "largest-batch"]) == 2
    assert "--advise largest-batch needs a budget: add --gpu-memory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*small, "--gpu-memory", "1GiB", "--advise", "more"])
    assert "largest-batch" in capsys.readouterr().err
