"""`sketch-plugins info`: its output agrees with the environment."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from sketch_plugins import cli, import_hooks, registry


def test_versions_optimizers_and_kernels(capsys):
    assert cli.main(["info", "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["rich"] == importlib.metadata.version("rich")
    assert found["packages"].keys() >= {"transformers", "lightning", "accelerate", "deepspeed", "bitsandbytes", "numba"}
    assert list(found["optimizers"]) == list(registry.names())
    assert (
        found["optimizers"]["cs_adam"]["bytes_per_param"]
        < 1.5
        < found["optimizers"]["cs_adam"]["adamw_bytes_per_param"]
    )
    assert found["kernels"]["eager"]["available"] is True
    assert found["kernels"]["triton"]["available"] is (torch.cuda.is_available() and bool(found["packages"]["triton"]))
    assert found["kernels"]["numba"]["available"] is bool(found["packages"]["numba"])
    if not torch.cuda.is_available() and found["packages"]["triton"]:
        assert "no CUDA device" in found["kernels"]["triton"]["note"]
    assert found["integrations"] == [f"{entry.name} -> {entry.value}" for entry in import_hooks.entries()]
    assert list(found["frameworks"]) == ["accelerate", "deepspeed", "lightning", "transformers"]
    for name, framework in found["frameworks"].items():
        namespaces = ("lightning", "pytorch-lightning") if name == "lightning" else (name,)
        if not any(found["packages"][namespace] for namespace in namespaces):
            note = f"not installed: pip install 'sketch-plugins[{name}]'"
            assert framework == {"names": [], "usage": "", "note": note}
        elif name == "accelerate":
            assert framework["names"] == [] and "optimizer object" in framework["note"]
        else:
            assert set(registry.names()) <= set(framework["names"]), framework
            assert "{name}" in framework["usage"] and framework["note"] == ""


def test_json_is_all_that_a_program_reads():
    """In a process of its own: frameworks write their logs to stdout when they are imported for the first time."""
    command = [sys.executable, "-m", "sketch_plugins", "info", "--json"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["optimizers"]


def test_the_tables(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    for words in ("torch", "numba", "eager", "B/param", "cs_adam", "TrainingArguments(optim="):
        assert words in said


@pytest.mark.parametrize("command", ["", "run", "reshard", "convert", "plan", "report", "info", "check"])
def test_help_does_not_import_torch(command):
    """It takes seconds, and users who ask how a command is called should not have to wait for it."""
    script = (
        "import sys\n"
        "from sketch_plugins import cli\n"
        "try:\n"
        "    cli.main(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 0, ended.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    arguments = [command, "--help"] if command else ["--help"]
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0 and "usage: sketch-plugins" in ran.stdout, ran.stderr


def test_what_is_not_installed_is_said():
    """A process in which neither numba nor transformers can be imported."""
    script = (
        "import sys, json\n"
        "for name in ('numba', 'transformers', 'lightning', 'deepspeed'):\n"
        "    sys.modules[name] = None\n"
        "from sketch_plugins import cli, info\n"
        "cli.main(['info'])\n"
        "print(json.dumps(info.information()))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    *tables, last = out.splitlines()
    assert "sketch-plugins[cpu]" in "\n".join(tables)  # what to install: an extra keeps its brackets
    found = json.loads(last)
    assert found["kernels"]["numba"]["available"] is False and "cannot be imported" in found["kernels"]["numba"]["note"]
    note = "not installed: pip install 'sketch-plugins[transformers]'"
    assert found["frameworks"]["transformers"] == {"names": [], "usage": "", "note": note}
    assert found["optimizers"].keys() == set(registry.names())
