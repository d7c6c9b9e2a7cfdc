"""A rank of the example's runs: ``example_worker.py OUT TEXT CONFIG...``; as under ``accelerate launch``, but on a CPU.

``accelerate launch`` converts a configuration to an environment and starts a process for each GPU with it. Here
accelerate's own functions do the first part, and the test does the second.
"""

import os
import shutil
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import accelerate_lm  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env  # noqa: E402

SIZE = "--dim 64 --layers 1 --vocab 300 --seq-len 32 --batch-size 2 --steps 6 --save-every 3".split()


def environment_of(config: Path) -> dict[str, str]:
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(config), str(EXAMPLES / "accelerate_lm.py")])
    )
    args.main_process_port = 0
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {key: value for key, value in env.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def run(config: Path, out: Path, *options: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    set_by_us = environment_of(config)
    os.environ.update(set_by_us)
    state = PartialState(cpu=True)
    if config.stem == "deepspeed_zero2":
        import deepspeed

        # Gloo is enough; DeepSpeed's own way would be compiled first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Accelerate uses DeepSpeed only if no CPU is requested,.
    own = ["--cpu"] if config.stem != "deepspeed_zero2" else []
    if config.stem == "fsdp2":
        state.distributed_type = DistributedType.MULTI_GPU  # and FSDP only with several GPUs; both run on a CPU
    try:
        accelerate_lm.run(accelerate_lm.parse([*SIZE, "--quick", "--out", str(out), *own, *options]))
    finally:
        for key in set_by_us:
            del os.environ[key]


if __name__ == "__main__":
    for name in sys.argv[3:]:
        config, out = EXAMPLES / "accelerate" / f"{name}.yaml", Path(sys.argv[1]) / name
        run(config, out, "--text", sys.argv[2])
        dist.barrier()
        if os.environ["RANK"] == "0":  # the run was stopped after its first checkpoint
            os.replace(out / "results.json", out / "whole.json")
            shutil.rmtree(out / "checkpoints" / "step6")
        dist.barrier()
        run(config, out, "--text", sys.argv[2], "--resume")
        dist.barrier()
    dist.destroy_process_group()
