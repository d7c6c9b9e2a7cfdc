"""Commands of pages that are run: what is in their folder, and what they have to print and to write."""

import re
from typing import NamedTuple

import scenes
from scenes import Scene


class Run(NamedTuple):
    """What is in a command's folder, what its output has to match, and the files that it has to write."""

    scene: Scene
    said: tuple[str, ...]
    writes: tuple[str, ...] = ()
    #: The page that shows its output, in a block without a language whose first line is the output's.
    shown: str = ""
    #: `make slow` runs it (test_long_commands.py), because it takes many seconds or starts several processes.
    long: bool = False


#: Trainer's line in the log after the first step, and the script's own.
INTRODUCED = r"CSAdam: [\d.]+ bytes of state a parameter .* saved against AdamW"
TRAINED = r"TRAINED CSAdam \{'compression': 0.05, .* to step 2\n"
REPLACED = r"INFO sketch-plugins run: replaced AdamW by CSAdam\(lr=0.001\)"
CONVERTED = r"^out/checkpoint-500 -> out/checkpoint-500-cs_adam"
STATE = "out/checkpoint-500-cs_adam/optimizer.pt"
RESHARDED = (r"CHECKPOINT-world2: 1 -> 2 processes", r"weights bit for bit")
TABLE = (r"with AdamW|adamw", r"cs_adam", r"sm3", r"largest batch")

RUNS = {
    "sketch-plugins --version": Run(scenes.EMPTY, (r"^sketch-plugins \d+\.\d+",)),
    "sketch-plugins COMMAND --help": Run(scenes.EMPTY, (r"[Uu]sage: sketch-plugins", r"--help")),
    "sketch-plugins info": Run(scenes.EMPTY, (r"kernels; devices", r"cs_adam", r"names in frameworks")),
    "mkdir -p ~/.local/share/bash-completion/completions ~/.zfunc": Run(scenes.EMPTY, (), ("home/.zfunc",)),
    "sketch-plugins completion bash > ~/.local/share/bash-completion/completions/sketch-plugins": Run(
        scenes.FOLDERS, (), ("home/.local/share/bash-completion/completions/sketch-plugins",)
    ),
    "sketch-plugins completion zsh > ~/.zfunc/_sketch-plugins": Run(
        scenes.FOLDERS, (), ("home/.zfunc/_sketch-plugins",)
    ),
    "sketch-plugins completion tcsh > ~/.sketch-plugins.tcsh": Run(
        scenes.EMPTY, (), ("home/.sketch-plugins.tcsh",)
    ),
    # -- plan
    "sketch-plugins plan --model gpt2 --gpu-memory 16GiB": Run(scenes.TRANSFORMERS, (r"^gpt2, 124,439,808", *TABLE)),
    "sketch-plugins plan --model bert-large-uncased --batch-size 8 --seq-len 512 --gpu-memory 16GiB --plot "
    "plan.png": Run(
        scenes.TRANSFORMERS, (r"^bert-large-uncased, 335,174,458", *TABLE), ("plan.png",), "docs/plan.md", long=True
    ),
    "sketch-plugins plan --model llama-3.2-1b --gpu-memory 16GiB --batch-size 4 --seq-len 1024 --advise "
    "least-change": Run(
        scenes.TRANSFORMERS, (r"the least change that fits", r"sketched state"), shown="docs/plan.md", long=True
    ),
    # -- run
    "sketch-plugins run train.py --optim cs_adam": Run(scenes.TRANSFORMERS, (INTRODUCED, TRAINED)),
    "sketch-plugins run train.py --optim cs_adam --optim_args compression=0.05": Run(
        scenes.TRANSFORMERS, (INTRODUCED, TRAINED)
    ),
    "sketch-plugins run -m package.train": Run(scenes.PACKAGE, (r"TRAINED AdamW", r"WARNING .* only AdamW")),
    "sketch-plugins run -m package.train --optim cs_adam": Run(scenes.PACKAGE, (INTRODUCED, TRAINED)),
    "sketch-plugins run --optim cs_adam train.py": Run(scenes.PLAIN, (REPLACED, r"^TRAINED CSAdam$")),
    "sketch-plugins run program.py": Run(scenes.PLAIN, (r"^TRAINED AdamW$", r"WARNING .* only AdamW")),
    "sketch-plugins run --optim cs_adam accelerate launch script.py": Run(
        scenes.NO_TRAINER, (REPLACED, r"TRAINED CSAdam with 1\n")
    ),
    # -- two processes
    "sketch-plugins run --optim cs_adam torchrun --nproc_per_node 2 script.py": Run(
        scenes.NO_TRAINER, (REPLACED, r"(?s)TRAINED CSAdam with 2\n.*TRAINED CSAdam with 2\n"), long=True
    ),
    "sketch-plugins run torchrun --nproc_per_node 2 train.py": Run(
        scenes.PLAIN, (r"(?s)TRAINED AdamW\n.*TRAINED AdamW\n", r"WARNING .* only AdamW"), long=True
    ),
    "torchrun --nproc_per_node 2 -m sketch_plugins run train.py": Run(
        scenes.PLAIN, (r"(?s)TRAINED AdamW\n.*TRAINED AdamW\n", r"WARNING .* only AdamW"), long=True
    ),
    "sketch-plugins run torchrun --nproc_per_node 2 train.py --optim cs_adam": Run(
        scenes.TRANSFORMERS, (INTRODUCED, rf"(?s){TRAINED}.*{TRAINED}"), long=True
    ),
    "torchrun --nproc_per_node 2 -m sketch_plugins run train.py --optim cs_adam": Run(
        scenes.TRANSFORMERS, (INTRODUCED, rf"(?s){TRAINED}.*{TRAINED}"), long=True
    ),
    "torchrun --nproc_per_node 2 examples/accelerate_lm.py --quick --cpu": Run(
        scenes.ACCELERATE_EXAMPLE, (r"MULTI_CPU, 2 process\(es\)",), ("accelerate_out/results.json",), long=True
    ),
    "sketch-plugins run train.py fit --trainer.strategy ddp_cs_adam --trainer.devices 2": Run(
        scenes.LIGHTNING_CLI, (r"replaced AdamW by CSAdam", r"(?s)TRAINED CSAdam 0.05\n.*TRAINED CSAdam 0.05\n"),
        long=True,
    ),
    # -- Lightning
    "python train.py fit --trainer.strategy ddp_cs_adam": Run(scenes.LIGHTNING_NAMES, (r"TRAINED CSAdam 0.05\n",)),
    "python train.py fit --optimizer sketch_plugins.CSAdam --optimizer.compression 0.05": Run(
        scenes.LIGHTNING_CLASS, (r"TRAINED CSAdam 0.05\n",)
    ),
    "sketch-plugins run train.py fit --trainer.strategy ddp_cs_adam": Run(
        scenes.LIGHTNING_CLI, (r"TRAINED CSAdam 0.05\n",)
    ),
    # -- checkpoints
    "sketch-plugins report CHECKPOINT": Run(scenes.saved("CSAdam"), (r"^CHECKPOINT: CSAdam", r"second_moment")),
    "sketch-plugins convert CHECKPOINT --optim cs_adam": Run(
        scenes.saved("torch.optim.AdamW"), (r"^CHECKPOINT -> CHECKPOINT-cs_adam",), ("CHECKPOINT-cs_adam",)
    ),
    "sketch-plugins convert adamw.ckpt --optim cs_adam": Run(
        scenes.ADAMW_CKPT, (r"^adamw.ckpt -> adamw-cs_adam.ckpt",), ("adamw-cs_adam.ckpt",)
    ),
    "sketch-plugins convert out/checkpoint-500 --optim cs_adam": Run(
        scenes.STOPPED, (CONVERTED,), (STATE,)
    ),
    "sketch-plugins convert out/checkpoint-500 --optim cs_adam --optim-args compression=0.1": Run(
        scenes.STOPPED, (CONVERTED,), (STATE,)
    ),
    "sketch-plugins run train.py --optim cs_adam --resume_from_checkpoint out/checkpoint-500-cs_adam": Run(
        scenes.CONVERTED, (INTRODUCED, TRAINED)
    ),
    "sketch-plugins reshard CHECKPOINT --world-size N": Run(scenes.SHARDS, RESHARDED, ("CHECKPOINT-world2/.metadata",)),
    "sketch-plugins reshard CHECKPOINT --world-size N --output DIRECTORY": Run(
        scenes.SHARDS, (r"DIRECTORY: 1 -> 2 processes",), ("DIRECTORY/.metadata",)
    ),
    "sketch-plugins reshard CHECKPOINT --world-size N [--output DIR] [--trust]": Run(
        scenes.SHARDS, (r"DIR: 1 -> 2 processes",), ("DIR/.metadata",)
    ),
    # -- examples
    "python examples/extreme_classification.py --quick": Run(
        scenes.DRAWING, (r"recall@10",), ("extreme_out/results.csv", "extreme_out/recall.png")
    ),
    "python examples/extreme_classification.py --help": Run(scenes.DRAWING, (r"--tune", r"--memory")),
}  # fmt: skip
#: Words that stand for something of the reader's: each is replaced by all of these, one after the other.
FILLED = {"N": ("2",), "COMMAND": ("run", "plan", "report", "convert", "reshard", "info", "check", "completion")}


def filled(text: str) -> list[str]:
    """The commands that a page's command stands for, with all of its options that are in brackets."""
    text = text.replace("[", "").replace("]", "")
    for word, values in FILLED.items():
        if re.search(rf"\b{word}\b", text):
            return [re.sub(rf"\b{word}\b", value, text) for value in values]
    return [text]
