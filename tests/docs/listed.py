"""Commands of pages that test_commands.py does not run: the reason of each, and what runs it or the like of it.

Commands of make and of pip are not in the list: a test checks the targets and the extras that they name.
"""

from typing import NamedTuple

#: The reasons, and what `by` has to name.
REASONS = {
    "GPU": "it needs a GPU; `by` is a test that runs the like of it without one",
    "make clients": "it needs another project's program; `by` is the test in tests/clients that runs it",
    "long": "it takes minutes; `by` is a target of make, or a test that runs it shortened",
    "another test": "`by` is the test that runs it",
}


class Listed(NamedTuple):
    reason: str
    by: str = ""


_TRL = Listed("make clients", "tests/clients/test_trl.py::test_the_command")
_LLAMA_FACTORY = "tests/clients/test_llamafactory.py"
_ACCELERATE = Listed("GPU", "tests/accelerate/test_example.py::test_trains_and_goes_on_from_its_last_checkpoint")
_DEEPSPEED = "tests/deepspeed/test_launchers.py::test_an_unmodified_script_finds_our_names_in_its_configuration"
_QUALITY = "tests/quality/test_quality_run.py"
_TRAINING = "tests/quality/test_bench_training.py::test_old_and_new_code_in_one_run"
_WORKFLOW = "tests/docs/test_versions.py::test_the_workflow_runs_on_pythons_that_the_package_says_it_supports"
_EXAMPLES = "tests/examples/test_examples.py"

LISTED = {
    "accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate_lm.py": _ACCELERATE,
    "accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate_lm.py --optim sm3": _ACCELERATE,
    "accelerate launch --config_file examples/accelerate/deepspeed_zero2.yaml examples/accelerate_lm.py "
    "--optim-args compression=0.05": _ACCELERATE,
    "deepspeed --num_gpus 2 --module sketch_plugins run train.py": Listed("GPU", _DEEPSPEED),
    "deepspeed --num_gpus 2 --module sketch_plugins run train.py --deepspeed_config ds.json": Listed("GPU", _DEEPSPEED),
    "sketch-plugins check": Listed("GPU", "tests/check/test_check.py::test_interpreted_kernels_agree"),
    "sketch-plugins check --device cpu": Listed("long", "tests/check/test_check.py::test_numba"),
    "python examples/larger_batch.py --device cuda --size large --budget 16GiB": Listed(
        "GPU", f"{_EXAMPLES}::test_larger_batch"
    ),
    "python examples/larger_batch.py --device cuda --size large --budget 16GiB --predict": Listed(
        "long", f"{_EXAMPLES}::test_larger_batch_predicted"
    ),
    "python examples/larger_batch.py": Listed("long", f"{_EXAMPLES}::test_larger_batch"),
    "python examples/larger_batch.py --task lm --effective 32": Listed("long", f"{_EXAMPLES}::test_larger_batch"),
    "python examples/extreme_classification.py": Listed(
        "long", "tests/examples/test_extreme_classification.py::test_a_shortened_run"
    ),
    "python benchmarks/quality_run.py lm --text FOLDER --steps 160,500,1500 --seeds 1,2,3 --lr 1e-3": Listed(
        "long", "make benchmarks-quick"
    ),
    "python benchmarks/quality_run.py lm --text FOLDER --steps 500,1500 --seeds 1,2,3 --lr 1e-3": Listed(
        "long", "make benchmarks-quick"
    ),
    "python benchmarks/quality_run.py fine_tune --model FOLDER --reviews FILE --steps 300 --seeds 1,2,3 --lr 5e-5": (
        Listed("long", f"{_QUALITY}::test_what_a_task_needs_is_said")
    ),
    "python benchmarks/quality_run.py lm --text FOLDER --optimizers peers --seeds 1,2,3 --sweep --jobs 2": Listed(
        "long", f"{_QUALITY}::test_a_sweep_goes_on_from_the_runs_on_file"
    ),
    "python benchmarks/quality_run.py lm --text FOLDER --optimizers adamw,cs_adam,sketchy --curve 16": Listed(
        "long", f"{_QUALITY}::test_runs_side_by_side_and_curves_have_the_same_values"
    ),
    "python benchmarks/quality_run.py lm --text FOLDER --optimizers muon --lr 4e-3 --curve 16": Listed(
        "long", f"{_QUALITY}::test_runs_side_by_side_and_curves_have_the_same_values"
    ),
    "python benchmarks/quality_run.py fine_tune --model FOLDER --reviews FILE --steps 300 --seeds 1,2,3 --lr 5e-5 "
    "--optimizers cs_adam,bf16/cs_adam,bf16/cs_adam:stochastic_rounding=true,bf16/cs_adam:weight_bits=24,"
    "bf16/cs_adam:weight_bits=32": Listed("long", f"{_QUALITY}::test_what_a_task_needs_is_said"),
    "python benchmarks/quality_run.py lm --text FOLDER --seeds 1,2,3 --optimizers cs_adam,bf16/cs_adam,"
    "bf16/cs_adam:stochastic_rounding=true,bf16/cs_adam:weight_bits=24,bf16/cs_adam:weight_bits=32": Listed(
        "long", f"{_QUALITY}::test_runs_are_written_once_and_are_the_same_again"
    ),
    "python benchmarks/quality_run.py lm --text FOLDER --steps 5000 --optimizers adamw,cs_adam,sketchy --lr 1e-3": (
        Listed("long", "make benchmarks-quick")
    ),
    "python benchmarks/quality_run.py lm --text FOLDER --steps 5000 --optimizers muon --lr 4e-3": Listed(
        "long", f"{_QUALITY}::test_runs_are_written_once_and_are_the_same_again"
    ),
    "python benchmarks/bench_step.py": Listed("long", "make gpu"),
    "git worktree add ../old COMMIT": Listed("long", _TRAINING),
    "python benchmarks/bench_training.py --old ../old --optimizers sketchy,cs_adam:preset=lean,cs_adam": Listed(
        "long", _TRAINING
    ),
    "python benchmarks/plan_check.py": Listed(
        "long", "tests/memory/test_plan.py::test_the_peak_is_what_the_allocator_counts"
    ),
    "python benchmarks/quality_pareto.py": Listed(
        "another test", "tests/quality/test_pareto.py::test_the_page_is_what_the_script_makes_of_the_committed_files"
    ),
    "sketch-plugins run trl sft --model_name_or_path MODEL --dataset_name DATA --output_dir out --optim cs_adam "
    "--optim_args compression=0.05 --learning_rate 2e-5": _TRL,
    "sketch-plugins run trl sft --optim cs_adam": _TRL,
    "sketch-plugins run torchrun --standalone --nproc_per_node 2 -m trl.scripts.sft --model_name_or_path MODEL "
    "--dataset_name DATA --output_dir out --optim cs_adam": Listed(
        "make clients", "tests/clients/test_trl.py::test_two_processes"
    ),
    "sketch-plugins run llamafactory-cli train train.yaml": Listed(
        "make clients", f"{_LLAMA_FACTORY}::test_the_command"
    ),
    "FORCE_TORCHRUN=1 NPROC_PER_NODE=2 sketch-plugins run llamafactory-cli train train.yaml": Listed(
        "make clients", f"{_LLAMA_FACTORY}::test_two_processes"
    ),
    "tune run full_finetune_single_device --config CONFIG optimizer._component_=sketch_plugins.CSAdam "
    "optimizer.compression=0.05": Listed("make clients", "tests/clients/test_torchtune.py::test_a_component"),
    "sketch-plugins run --optim cs_adam --optim-args compression=0.05 tune run full_finetune_single_device "
    "--config CONFIG": Listed("make clients", "tests/clients/test_torchtune.py::test_in_the_place_of_adamw"),
    "bash .ci/run": Listed(
        "another test",
        "tests/docs/test_versions.py::test_the_workflow_runs_on_pythons_that_the_package_says_it_supports",
    ),
}
