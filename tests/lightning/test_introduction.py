"""The line of the first step, in Lightning's own log; names of parameters in the monitor's table."""

import importlib
import logging

import torch

from sketch_plugins import state_report

WORDS = "bytes of state a parameter"


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def test_a_replaced_optimizer_speaks_once(fit, namespace, log):
    _, made = fit(adamw, "cs_adam", namespace)
    (said,) = [line for line in log() if WORDS in line]
    report = state_report(made.optimizers[0])
    assert said.startswith(f"CSAdam: {report.bytes_per_param:.3g} {WORDS}") and said.endswith("learning rate 0.001")


def test_the_monitors_table_stands_for_it(fit, namespace, log):
    monitor = importlib.import_module(f"sketch_lightning.{namespace.replace('.', '_')}").OptimizerStateMonitor()
    fit(adamw, "cs_adam", namespace, callbacks=[monitor])
    assert not [line for line in log() if WORDS in line]
    (table,) = [line for line in log() if "beside AdamW" in line]
    assert "net.0.weight" in table and "0.0" not in table.split()


def test_a_log_without_info_is_not_spoken_to(fit, log):
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.setLevel(logging.WARNING)
    try:
        fit(adamw, "cs_adam")
        assert not [line for line in log() if WORDS in line]
    finally:
        rank_zero.setLevel(logging.NOTSET)
