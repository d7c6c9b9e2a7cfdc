"""Two processes on CPUs. Each worker starts Lightning once, because this takes longer than the work itself."""

import importlib.util
from pathlib import Path

import pytest

from sketch_plugins.comm import TopK

from .conftest import strategy

HERE = Path(__file__).parent


def test_ddp_and_fsdp(launch_ranks, tmp_path):
    parts = ["ddp", "warm_start", "callbacks", "reclaim", "fsdp", "in_backward", "compressed"]
    for output in launch_ranks(HERE / "ddp_worker.py", tmp_path, *parts):
        assert [line for line in output.splitlines() if line.endswith(" ok")] == [f"{part} ok" for part in parts]
    # Said once, by the first rank.
    assert output.count("sketch_lightning: replaced") == 0


def test_deepspeed(launch_ranks, tmp_path):
    pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    for output in launch_ranks(HERE / "deepspeed_worker.py", tmp_path):
        assert [line for line in output.splitlines() if line.endswith(" ok")] == [f"stage {n} ok" for n in (1, 2, 3)]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra `deepspeed`")
def test_deepspeed_configuration(namespace):
    made = strategy("SketchDeepSpeedStrategy", namespace, stage=3, offload_optimizer=True)
    assert made.config["zero_optimization"]["stage"] == 3
    assert made.config["zero_force_ds_cpu_optimizer"] is False and made.config["zero_allow_untested_optimizer"] is True
    block = {"optimizer": {"type": "AdamW"}}
    with pytest.raises(ValueError, match='configuration has an "optimizer" block'):
        strategy("SketchDeepSpeedStrategy", namespace, config=block)
    with pytest.raises(ValueError, match="warm_start=True is not possible with DeepSpeed"):
        strategy("SketchDeepSpeedStrategy", namespace, warm_start=True)


def test_fsdp_converts_nothing(namespace):
    with pytest.raises(ValueError, match="warm_start=True is not possible with FSDP"):
        strategy("SketchFSDPStrategy", namespace, warm_start=True)


def test_wrong_compression(namespace):
    with pytest.raises(ValueError, match=r"comm='zip' is not one of None, .*'topk'"):
        strategy("SketchDDPStrategy", namespace, comm="zip")
    with pytest.raises(ValueError, match=r"comm_kwargs={'density': 0.1} has no effect without comm"):
        strategy("SketchDDPStrategy", namespace, comm_kwargs={"density": 0.1})
    with pytest.raises(ValueError, match="comm='topk' and ddp_comm_hook cannot be combined"):
        strategy("SketchDDPStrategy", namespace, comm="topk", ddp_comm_hook=print)
    for name in ("SketchDDPStrategy", "MemSGDStrategy"):
        for given, said in (
            ({"density": 2}, r"comm_kwargs={'density': 2}: density=2"),
            ({"denisty": 0.1}, "no such option: .*denisty"),
            ({"compressor": "randk"}, "compressor='randk', but comm='topk' is another"),
        ):
            with pytest.raises(ValueError, match=said):
                strategy(name, namespace, comm="topk", comm_kwargs=given)
        strategy(name, namespace, comm="topk", comm_kwargs={"compressor": TopK(), "density": 0.1})
    with pytest.raises(ValueError, match="comm=None"):
        strategy("MemSGDStrategy", namespace, comm=None)
    for name in ("SketchFSDPStrategy", "SketchDeepSpeedStrategy"):  # they reduce gradients themselves
        with pytest.raises(TypeError, match="'comm'"):
            strategy(name, namespace, comm="topk")
