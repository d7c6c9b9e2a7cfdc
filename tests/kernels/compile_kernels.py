"""Compile every kernel as the launcher would for a GPU that need not exist, and print the results as JSON lines.

    python tests/kernels/compile_kernels.py sm_90 [name of a case ...]

It runs in a process of its own, because kernels in Triton's interpreter (the other tests) cannot be compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION.*")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sketch_plugins import SM3, CSAdagrad, CSAdam, CSLion, CSMomentum, Sketchy
from sketch_plugins.kernels.gpu import (
    block_topk,
    launch,
)  # imports all kernels before anything asks for the interpreter
from sketch_plugins.optim import fused

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX = (1024, 768)
# Name -> (optimizer, options, dtype, shape, row-sparse). The matrix is new unless stated otherwise.
CASES = {
    "adam": (CSAdam, {}, torch.float32, MATRIX, False),
    "adam_bf16": (CSAdam, {}, torch.bfloat16, MATRIX, False),
    "adam_stochastic": (
        CSAdam, {"stochastic_rounding": True, "first_moment_rounding": "stochastic"}, torch.bfloat16, MATRIX, False,
    ),
    "adam_24_bits": (CSAdam, {"weight_bits": 24}, torch.bfloat16, MATRIX, False),
    "lean_32_bits": (CSAdam, {"preset": "lean", "weight_bits": 32, "lagged_rms": True}, torch.bfloat16, MATRIX, False),
    "adam_24_bits_fp16": (CSAdam, {"preset": "exact", "weight_bits": 24}, torch.float16, MATRIX, False),
    "adam_32_bits_fp16": (CSAdam, {"weight_bits": 32}, torch.float16, MATRIX, True),
    "adagrad_24_bits": (CSAdagrad, {"weight_decay": 0.1, "weight_bits": 24, "depth": 2}, torch.bfloat16, MATRIX, False),
    "adam_unaligned": (CSAdam, {}, torch.float32, (1024, 767), False),
    "adam_many_members": (CSAdam, {"compression": 0.005}, torch.float32, MATRIX, False),
    "lean": (CSAdam, {"preset": "lean"}, torch.float32, MATRIX, False),
    "lean_lagged": (CSAdam, {"preset": "lean", "lagged_rms": True}, torch.float32, MATRIX, False),
    "lean_lagged_bf16": (CSAdam, {"preset": "lean", "lagged_rms": True}, torch.bfloat16, MATRIX, False),
    "adam_lagged": (CSAdam, {"update_clip": 1.0, "lagged_rms": True}, torch.float32, MATRIX, False),
    "sm3_lagged": (SM3, {"update_clip": 0.5, "lagged_rms": True}, torch.float32, MATRIX, False),
    "lean_lagged_experts": (
        CSAdam, {"preset": "lean", "lagged_rms": True}, torch.float32, (4, 256, 768), False,
    ),
    "sm3_experts": (SM3, {}, torch.float32, (4, 256, 768), False),
    "rmsprop_fp16": (CSAdam, {"first_moment": "none"}, torch.float16, MATRIX, False),
    "adam_dense_moment": (CSAdam, {"first_moment": "bf16"}, torch.float32, MATRIX, False),
    "exact": (CSAdam, {"preset": "exact"}, torch.float32, (768,), False),
    "adam_log8": (CSAdam, {"second_moment": "log8"}, torch.float32, MATRIX, False),
    "adam_cover": (CSAdam, {"second_moment": "cover"}, torch.float32, MATRIX, False),
    "adam_deep": (CSAdam, {"depth": 3, "hash": "affine", "first_moment": "none"}, torch.float32, MATRIX, False),
    "adam_rows": (CSAdam, {"second_moment": "row_count_min", "first_moment": "none"}, torch.float32, MATRIX, False),
    "paper_cs_mv": (CSAdam, {"preset": "paper_cs_mv"}, torch.float32, MATRIX, True),
    "adam_sparse": (CSAdam, {}, torch.float32, MATRIX, True),
    "adagrad": (CSAdagrad, {"weight_decay": 0.1}, torch.float32, MATRIX, False),
    "momentum": (CSMomentum, {"nesterov": True}, torch.float32, MATRIX, False),
    "lion": (CSLion, {}, torch.float32, MATRIX, False),
    "sm3_default": (SM3, {}, torch.float32, MATRIX, False),
    "sm3": (SM3, {"preset": "paper"}, torch.float32, MATRIX, False),
    "sm3_lean": (SM3, {"preset": "lean", "update_clip": 0.5}, torch.float32, MATRIX, False),
    "sm3_conv": (SM3, {"preset": "lean"}, torch.float32, (64, 32, 3, 3), False),
    "sm3_one": (SM3, {"preset": "paper", "variant": "I"}, torch.float32, MATRIX, False),
    "sm3_six_axes": (SM3, {"preset": "lean"}, torch.float32, (64, 8, 4, 2, 3, 3), False),
    "bf16_tables": (CSAdam, {"table_dtype": "bf16"}, torch.bfloat16, MATRIX, False),
    "bf16_tables_deep": (
        CSAdam, {"table_dtype": "bf16", "depth": 3, "first_moment": "count_sketch", "allow_dense_count_sketch": True},
        torch.float32, MATRIX, False,
    ),
    "bf16_tables_rows": (
        CSAdam, {"table_dtype": "bf16", "second_moment": "row_count_min", "first_moment": "none"},
        torch.float32, MATRIX, False,
    ),
    "bf16_tables_sparse": (CSAdam, {"preset": "paper_cs_mv", "table_dtype": "bf16"}, torch.bfloat16, MATRIX, True),
    "lean_sparse": (CSAdam, {"preset": "lean"}, torch.float32, MATRIX, True),
    "rows_sparse": (CSAdam, {"second_moment": "row_count_min", "update_clip": 1.0}, torch.bfloat16, MATRIX, True),
    "sm3_sparse": (SM3, {"update_clip": 0.5}, torch.float32, MATRIX, True),
    "sm3_one_sparse": (SM3, {"variant": "I", "preset": "lean"}, torch.float32, (1024, 48, 16), True),
    "sketchy": (Sketchy, {"precondition": "none", "momentum_of": "all"}, torch.float32, MATRIX, False),
    "sketchy_many_members": (
        Sketchy, {"precondition": "none", "momentum_of": "all", "compression": 0.005}, torch.float32, MATRIX, False,
    ),
    "adagrad_cover_sparse": (CSAdagrad, {"second_moment": "cover", "weight_decay": 0.1}, torch.float32, MATRIX, True),
}  # fmt: skip

# Error feedback in blocks: (block, dtype of the memory, with momentum).
BLOCKS = {
    "block_topk": (1024, torch.float32, False),
    "block_topk_bf16": (1024, torch.bfloat16, False),
    "block_topk_momentum": (1024, torch.float32, True),
    "block_topk_momentum_bf16": (256, torch.bfloat16, True),
    "block_topk_largest": (4096, torch.bfloat16, True),
}


class Recorder:
    """Replaces a kernel in the launcher, and records the arguments of a launch."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def record_message(case):
    """The launches of one message: whole blocks, and the rest."""
    block, dtype, momentum = BLOCKS[case]
    calls, kernel = [], block_topk.select
    m = torch.zeros(8200, dtype=dtype)
    try:
        block_topk.select = Recorder(kernel, calls)
        u = torch.zeros_like(m) if momentum else None
        block_topk.take(m, torch.zeros(8200), 1.0, block, (8192 // block, block // 64, 1), 1, 2, u, 0.9, True)
    finally:
        block_topk.select = kernel
    return calls


def record(case):
    """The launches of one step; with lagged_rms of the second step, which is like all later ones."""
    cls, options, dtype, shape, sparse = CASES[case]
    calls = []
    kernels = [(m, n) for m in (launch.step, launch.fold, launch.norms) for n in vars(m) if not n.startswith("_")]
    saved = {}
    for module, name in kernels:
        kernel = getattr(module, name)
        if isinstance(kernel, triton.JITFunction) and kernel.fn.__module__ == module.__name__:
            saved[module, name] = kernel
            setattr(module, name, Recorder(kernel, calls))
    # So that the launcher accepts CPU tensors; nothing runs.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = cls([p], fused=True, **options)
        if sparse:
            rows = torch.arange(0, shape[0], 7)
            p.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), torch.ones(len(rows), *shape[1:], dtype=dtype), shape)
        else:
            p.grad = torch.zeros(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            if options.get("lagged_rms"):
                calls.clear()
                optimizer.step()
    finally:
        del os.environ["TRITON_INTERPRET"]
        for (module, name), kernel in saved.items():
            setattr(module, name, kernel)
    return calls


def compile_call(kernel, args, kwargs, target):
    options = {"num_warps": kwargs.pop("num_warps", 4)}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if i < len(args):
            signature[name] = type_of(args[i])
            if isinstance(args[i], torch.Tensor):
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[name] = "constexpr", kwargs[name]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def type_of(value):
    if isinstance(value, torch.Tensor):
        return {
            torch.float32: "*fp32", torch.int64: "*i64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
            torch.int16: "*i16", torch.float64: "*fp64",
        }[value.dtype]  # fmt: skip
    return "fp32" if isinstance(value, float) else "i32"


def facts(compiled):
    """Registers of a thread, spilled bytes, and the widths of the loads."""
    asm = compiled.asm
    if "ptx" in asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(asm["cubin"])
            f.flush()
            text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        wide = len(re.findall(r"ld\.global\S*\.(?:v4\.(?:b32|f32)|v2\.(?:b64|f64)|v8)", asm["ptx"]))
        loads = len(re.findall(r"ld\.global", asm["ptx"]))
        return {
            "registers": int(found["REG"]),
            "spilt": int(found["STACK"]) + int(found["LOCAL"]),
            "wide": wide,
            "loads": loads,
        }
    text = asm["amdgcn"]

    def number(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),
        "spilt": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "wide": len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", text)),
        "loads": len(re.findall(r"(?:global|buffer|flat)_load", text)),
    }


def main():
    target = TARGETS[sys.argv[1]]
    for case in sys.argv[2:] or [*CASES, *BLOCKS]:
        for kernel, args, kwargs in record_message(case) if case in BLOCKS else record(case):
            compiled = compile_call(kernel, args, dict(kwargs), target)
            print(json.dumps({"case": case, "kernel": kernel.fn.__name__, **facts(compiled)}), flush=True)


if __name__ == "__main__":
    assert fused.backend(torch.device("cpu"), False) is None
    main()
