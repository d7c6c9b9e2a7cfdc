"""One rank of the tests of accelerate's and Trainer's entrances: ``comm_worker.py CHECK[,CHECK...] FOLDER``."""

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
        raise AssertionError("two hooks")


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
        raise AssertionError("two hooks")
    resumed = make_trainer(folder / "resumed", 10, "min_compress_size=256,comm=block_topk,comm_density=0.05,"
                           "comm_memory_dtype=bf16")  # fmt: skip
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))
    assert torch.equal(expected, same_everywhere(resumed.model))
    other = communication(resumed.callback_handler.callbacks).state
    assert other.iteration == callback.state.iteration == 10
    assert other.memory_norm() == callback.state.memory_norm()


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
