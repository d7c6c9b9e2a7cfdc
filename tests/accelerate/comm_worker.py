"""One rank of the tests of compression in accelerate and Trainer: ``comm_worker.py CHECK[,CHECK...] FOLDER``."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Tokens(torch.utils.data.Dataset):
    def __init__(self):
        steps = torch.randint(1, 5, (64, 1), generator=torch.Generator().manual_seed(0))
        self.rows = (torch.arange(16) * steps) % 64

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def tiny_model():
    set_seed(0)
    size = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def same_everywhere(model):
    value = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(value) for _ in range(WORLD)]
    dist.all_gather(every, value)
    assert all(torch.equal(value, other) for other in every)
    return value


def check_accelerate(folder):
    """MemSGDKwargs in a loop with accumulation: the hook is called for every second batch, with the options given."""
    from accelerate import Accelerator

    from sketch_accelerate import MemSGDKwargs

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    handler = MemSGDKwargs(memsgd={"density": 0.05, "compressor": "topk"}, find_unused_parameters=True)
    accelerator.ddp_handler = handler
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert model.find_unused_parameters
    losses = []
    for _ in range(5):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert handler.state.iteration == 5 * len(loader) // 2
    assert losses[-1] < losses[0] and handler.state.last_wire_bytes < 0.2 * handler.state.last_dense_bytes
    same_everywhere(model)
    try:
        MemSGDKwargs(comm_hook="powerSGD").register_comm_hook(model)
    except ValueError as error:
        assert "comm_hook='powerSGD'" in str(error)
    else:
        raise AssertionError("has one hook")


def check_scaler(folder):
    """The state has accelerate's GradScaler: scaled and unscaled training have the same bits, memories are unscaled."""
    from accelerate import Accelerator

    from sketch_accelerate import MemSGDKwargs

    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler  # accelerate makes one for fp16, which it has on GPUs only
        accelerator.ddp_handler = handler = MemSGDKwargs(memsgd={"density": 0.05})
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, torch.utils.data.DataLoader(Tokens(), batch_size=8)
        )
        assert handler.state.scaler is scaler
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        ends.append((same_everywhere(model), handler.state.memory_norm()))
    assert scaler.get_scale() > 2.0**8
    assert torch.equal(ends[0][0], ends[1][0]) and abs(ends[0][1] - ends[1][1]) < 1e-6 * ends[0][1]
    given = MemSGDKwargs(memsgd={"scaler": (own := torch.amp.GradScaler("cpu"))})
    accelerator.ddp_handler = given
    accelerator.prepare(tiny_model())
    assert given.state.scaler is own
    accelerator.prepare(tiny_model())  # a second model has a state of its own
    assert len(given.states) == 2 and given.state is given.states[1] is not given.states[0]


def said(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    raise AssertionError("no ValueError")


def fsdp_is_heeded():
    """accelerate uses FSDP only with several GPUs, so it is told that it has them (worker.py)."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def check_fsdp(folder):
    """Real FSDP of both versions is refused by attach, by accelerate's handler and by Trainer's."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    import sketch_transformers
    from sketch_accelerate import MemSGDKwargs
    from sketch_plugins.comm import attach

    fsdp_is_heeded()
    mesh = init_device_mesh("cpu", (WORLD,))
    sharded = fully_shard(torch.nn.Linear(8, 8), mesh=mesh)
    assert "model is a FSDPLinear" in said(lambda: attach(sharded))
    one = FullyShardedDataParallel(torch.nn.Linear(8, 8), device_id=torch.device("cpu"))
    assert "model is a FullyShardedDataParallel" in said(lambda: attach(one))
    for version in (1, 2):
        fsdp_is_heeded()
        accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=version))
        accelerator.ddp_handler = MemSGDKwargs(memsgd={"density": 0.1})
        assert "memsgd is not possible under FSDP" in said(lambda a=accelerator: a.prepare(tiny_model()))
        assert accelerator.ddp_handler.state is None
    fsdp_is_heeded()
    trainer = make_trainer(
        folder / "fsdp", 2, accelerator_config={"use_configured_state": True}, fsdp="full_shard",
        fsdp_config={"version": 2},
    )  # fmt: skip
    sketch_transformers.enable_memsgd(trainer, density=0.1)
    assert "memsgd is not possible under FSDP" in said(trainer.train)
    assert trainer.is_fsdp_enabled


def check_deepspeed(folder):
    """A real engine, of stage 0 and of ZeRO: refused as well."""
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    import sketch_transformers
    from sketch_accelerate import MemSGDKwargs
    from sketch_plugins.comm import attach

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled first
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    model = torch.nn.Linear(8, 8)
    for stage in (0, 2):
        ds = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
        engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                                      config={**ds, "zero_allow_untested_optimizer": True})[0]  # fmt: skip
        assert "model is a DeepSpeedEngine" in said(lambda e=engine: attach(e))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` sets it
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds))
    accelerator.ddp_handler = MemSGDKwargs(memsgd={"density": 0.1})
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    assert "memsgd is not possible under DEEPSPEED" in said(lambda: accelerator.prepare(model, optimizer))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    ds = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
    trainer = make_trainer(folder / "deepspeed", 2, deepspeed=ds)
    sketch_transformers.enable_memsgd(trainer, density=0.1)
    assert "memsgd is not possible under DeepSpeed" in said(trainer.train)
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


def make_trainer(folder, steps, optim_args="min_compress_size=256", **kwargs):
    args = TrainingArguments(
        str(folder), optim="cs_adam", optim_args=optim_args, learning_rate=3e-3, per_device_train_batch_size=4,
        max_steps=steps, logging_steps=2, save_steps=6, report_to="none", use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant", **kwargs,
    )  # fmt: skip
    from sketch_transformers import SketchCallback

    return Trainer(tiny_model(), args, train_dataset=Tokens(), callbacks=[SketchCallback()])


def check_trainer(folder):
    """cs_adam behind top-k: figures in the log; a resumed run ends with the bits of one that was not interrupted."""
    import sketch_transformers
    from sketch_transformers.comm import communication

    whole = make_trainer(folder / "whole", 10)
    callback = sketch_transformers.enable_memsgd(whole, density=0.05, memory_dtype="bf16")
    whole.train()
    expected = same_everywhere(whole.model)
    logs = [log for log in whole.state.log_history if "loss" in log]
    assert {"comm/wire_over_dense", "comm/memory_norm", "comm/density"} <= logs[-1].keys()
    assert logs[-1]["comm/density"] == 0.05 and logs[-1]["comm/memory_norm"] > 0
    assert logs[-1]["comm/wire_over_dense"] < 0.2, logs[-1]
    dist.barrier()
    assert len(list((folder / "whole" / "checkpoint-6" / "memsgd").iterdir())) == WORLD
    try:
        sketch_transformers.enable_memsgd(whole)
    except ValueError as error:
        assert "one hook" in str(error)
    else:
        raise AssertionError("has one hook")
    resumed = make_trainer(folder / "resumed", 10, "min_compress_size=256,comm=block_topk,comm_density=0.05,"
                           "comm_memory_dtype=bf16")  # fmt: skip
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))
    assert torch.equal(expected, same_everywhere(resumed.model))
    other = communication(resumed.callback_handler.callbacks).state
    assert other.iteration == callback.state.iteration == 10
    assert other.memory_norm() == callback.state.memory_norm()
    resumed.args.max_steps = 4
    resumed.train()  # train() again from the beginning, with the existing memory
    assert communication(resumed.callback_handler.callbacks).state is other and other.iteration == 14
    same_everywhere(resumed.model)


def main():
    for check in sys.argv[1].split(","):
        try:
            globals()[f"check_{check}"](Path(sys.argv[2]))
        except BaseException:
            print(f"FAILED: check_{check} on rank {RANK}", flush=True)
            raise
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
