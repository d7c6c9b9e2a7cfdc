"""One rank: the line of the first step under FSDP2 and DeepSpeed's ZeRO. ``introduction_worker.py KIND``."""

import logging
import os
import sys

import torch
import torch.distributed as dist

from sketch_plugins import CSAdam, state_report
from sketch_plugins.sharding.names import name_parameters

logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="LOG %(message)s")
logging.getLogger("sketch_plugins").setLevel(logging.INFO)
kind = sys.argv[1]
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(70, 300), torch.nn.Tanh(), torch.nn.Linear(300, 20))
whole = sum(p.numel() for p in net.parameters())
names = [name for name, _ in net.named_parameters()]
if kind == "fsdp2":
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    fully_shard(net)
    optimizer = CSAdam([{"params": [p for p in net.parameters() if p.ndim > 1]},
                        {"params": [p for p in net.parameters() if p.ndim == 1]}])  # fmt: skip
    model, step = net, optimizer.step
else:
    import deepspeed

    import sketch_deepspeed  # noqa: F401

    optimizer = CSAdam([{"params": [p for p in net.parameters() if p.ndim > 1]},
                        {"params": [p for p in net.parameters() if p.ndim == 1]}])  # fmt: skip
    name_parameters(optimizer, net)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": int(kind), "sub_group_size": 6000},
        "steps_per_print": 10**9,
    }
    model, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=True)
    step = model.step
for _ in range(3):
    loss = model(torch.randn(2, 70)).square().mean()
    loss.backward() if kind == "fsdp2" else model.backward(loss)
    step()
    optimizer.zero_grad()
report = state_report(optimizer, net)
assert 0 < report.params <= whole and {p.name for p in report.parameters} <= set(names), report.parameters
if kind != "fsdp2":
    assert {p.name for p in state_report(optimizer).parameters} <= set(names)
print(f"RANK {os.environ['RANK']} PARAMS {report.params:,}", flush=True)
dist.barrier()
dist.destroy_process_group()
