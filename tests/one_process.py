"""Three steps in accelerate or DeepSpeed in one process, against the plain loop. Run by test_one_process.py."""

import json
import logging
import sys

import torch

from sketch_plugins import CSAdam

OPTIONS = {"lr": 1e-2, "min_compress_size": 64}


def model_of():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 33), torch.nn.Tanh(), torch.nn.Linear(33, 7))


def train(model, backward, step):
    for number in range(3):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(number))
        backward(model(x).square().mean())
        step()


def plain():
    model = model_of()
    optimizer = CSAdam(model.parameters(), **OPTIONS)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    train(model, lambda loss: loss.backward(), step)
    return model, optimizer


def under_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = model_of()
    model, optimizer = accelerator.prepare(model, CSAdam(model.parameters(), **OPTIONS))

    def step():
        optimizer.step()
        optimizer.zero_grad()

    train(model, accelerator.backward, step)
    return model, optimizer.optimizer


def under_deepspeed():
    import deepspeed

    import sketch_deepspeed  # noqa: F401

    # Or DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    model = model_of()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "cs_adam", "params": OPTIONS},
        "zero_optimization": {"stage": 1},
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    train(engine, engine.backward, engine.step)
    return engine.module, engine.optimizer.optimizer


def apart(one, other):
    """The largest difference of two weights."""
    return max(float((p - q).abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def main():
    logging.disable(logging.WARNING)
    model, _ = plain()
    framework = {"accelerate": under_accelerate, "deepspeed": under_deepspeed}[sys.argv[1]]
    other, optimizer = framework()
    found = {
        "optimizer": type(optimizer).__name__,
        "apart": apart(model, other),
        "moved": apart(model, model_of()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
