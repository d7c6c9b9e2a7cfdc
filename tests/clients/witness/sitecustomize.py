"""Records every step that an optimizer takes, in each process of a client.

The tests put this folder on PYTHONPATH. The records come from torch's own hook on all optimizers, not from this
package: a line of JSON after each step, with the class that took it and the bytes that it keeps.
"""

import json
import os

from sketch_plugins.import_hooks import when_imported


def _watch():
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils._pytree import tree_leaves

    def local(tensor):
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    def after_step(optimizer, args, kwargs):
        kept = {id(t): t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, torch.Tensor)}
        trained = [local(p.detach()) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        line = {
            "process": os.getpid(),
            "rank": int(os.environ.get("RANK", 0)),
            "world": int(os.environ.get("WORLD_SIZE", 1)),
            "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
            "compression": optimizer.param_groups[0].get("compression"),
            "weights": sum(p.numel() for p in trained),
            "bytes": sum(local(t).nbytes for t in kept.values()),
            "digest": repr(sum(p.double().abs().sum().item() for p in trained)),
        }
        descriptor = os.open(os.environ["CLIENT_WITNESS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, (json.dumps(line) + "\n").encode())
        os.close(descriptor)

    register_optimizer_step_post_hook(after_step)


if "CLIENT_WITNESS" in os.environ:
    when_imported("torch.optim", _watch)
