"""One rank: the line of the first step under FSDP2 and DeepSpeed's ZeRO. ``introduction_worker.py KIND ...``."""

import logging
import os
import sys

import torch
import torch.distributed as dist

from sketch_plugins import CSAdam, state_report
from sketch_plugins.sharding.names import name_parameters


def zero_engine(net, optimizer, stage):
    import deepspeed

    import sketch_deepspeed  # noqa: F401

    # Or DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    name_parameters(optimizer, net)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "sub_group_size": 6000},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=True)[0]


def train(kind):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(70, 300), torch.nn.Tanh(), torch.nn.Linear(300, 20))
    whole = sum(p.numel() for p in net.parameters())
    names = [name for name, _ in net.named_parameters()]
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        if not dist.is_initialized():
            dist.init_process_group("gloo")
        fully_shard(net)
    matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = CSAdam([{"params": matrices}, {"params": vectors}])
    engine = None if kind == "fsdp2" else zero_engine(net, optimizer, int(kind))
    for _ in range(3):
        loss = (engine or net)(torch.randn(2, 70)).square().mean()
        engine.backward(loss) if engine else loss.backward()
        (engine or optimizer).step()
        optimizer.zero_grad()
    report = state_report(optimizer, net)
    assert 0 < report.params <= whole and {p.name for p in report.parameters} <= set(names), report.parameters
    if engine:
        assert {p.name for p in state_report(optimizer).parameters} <= set(names)
        engine.destroy()
    print(f"RANK {os.environ['RANK']} PARAMS {report.params:,}", flush=True)


logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="LOG %(message)s")
logging.getLogger("sketch_plugins").setLevel(logging.INFO)
for kind in sys.argv[1:]:
    print(f"KIND {kind}", flush=True)
    train(kind)
    dist.barrier()
dist.destroy_process_group()
