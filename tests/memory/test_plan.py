"""The plan against the count of torch's allocator; and arguments that are refused."""

import contextlib
import importlib.util
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import sketch_plugins
from sketch_plugins import cli, registry, state_report
from sketch_plugins.check.cases import DENSE
from sketch_plugins.memory.meter import AllocatorMeter
from sketch_plugins.memory.plan import plan
from sketch_plugins.memory.plan_checks import PRECISIONS
from sketch_plugins.memory.plan_cuda import WORKSPACE, CudaLike
from sketch_plugins.memory.plan_optimizers import choices, sharded_cost, takes_eager_steps
from sketch_plugins.memory.plan_trace import Recorder, Subject
from sketch_plugins.optim import resolved

pytest.importorskip("transformers", reason="models by name need transformers")

import transformers
from transformers import AutoModelForMaskedLM, BertConfig, GPT2Config, LlamaConfig, T5Config

from sketch_transformers.planning import BUILT_IN, TASKS, HuggingFaceModel

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def bert():
    return BertConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=256, vocab_size=1000,
        architectures=["BertForMaskedLM"],
    )  # fmt: skip


def gpt2():
    return GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=1000, n_positions=64, architectures=["GPT2LMHeadModel"], **SPECIAL
    )


class Convolutions(torch.nn.Module):
    """A model without transformers: images, batch norm, a frozen layer, a buffer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 32, 3, padding=1).requires_grad_(False)
        self.second = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(64)
        self.last = torch.nn.Linear(64 * 16, 500)
        self.register_buffer("scale", torch.ones(1000))

    def forward(self, images):
        hidden = F.dropout(F.relu(self.norm(self.second(self.first(images)))), 0.1, self.training)
        return self.last(F.avg_pool2d(hidden, 4).flatten(1))


def images(batch):
    return torch.zeros(batch, 3, 16, 16), torch.zeros(batch, dtype=torch.int64)


def image_loss(model, batch):
    pixels, labels = batch
    return F.cross_entropy(model(pixels.to(next(model.parameters()).dtype)), labels)


def measured(build, sample, loss, optimizer, precision, batch, accumulation=1):
    """Peak of three ordinary steps; everything is allocated while the meter records."""
    (choice,) = choices(optimizer, precision)
    dtype, autocast = PRECISIONS[precision]
    meter = AllocatorMeter()
    meter.start()
    model = build().train().to(dtype)
    one = choice.build([p for p in model.parameters() if p.requires_grad], cuda=False)
    if choice.in_backward:
        from sketch_plugins.memory.in_backward import InBackward

        InBackward(one)
    given = sample(batch)
    for _ in range(3):
        for _ in range(accumulation):
            with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                value = loss(model, given)
            if accumulation > 1:
                value = value / accumulation
            value.backward()
            del value
        one.step()
        one.zero_grad()
    return meter.read() - meter.live


PAIRS = [
    # model, optimizer, precision, gradient checkpointing, batch, accumulation
    (bert, "adamw", "fp32", False, 4, 1),
    (bert, "adamw_foreach", "fp32", False, 1, 1),  # its step takes as much as the parameters
    (bert, "cs_adam", "bf16", False, 4, 1),
    (bert, "sm3", "fp32", True, 4, 1),
    (bert, "adafactor", "bf16-mixed", False, 4, 1),
    (bert, "sketchy", "fp32", False, 1, 1),  # its step takes the most
    (gpt2, "cs_adam:preset=lean", "fp32", False, 4, 1),
    (gpt2, "adamw", "bf16", True, 4, 1),
    (gpt2, "cs_adam:fused=false", "bf16-mixed", False, 1, 1),
    (gpt2, "cs_momentum", "bf16-mixed", False, 2, 3),
    (Convolutions, "cs_adam", "fp32", None, 8, 1),
    (Convolutions, "adamw", "bf16", None, 2, 1),
    (Convolutions, "adafactor", "fp32", None, 2, 2),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].__name__}-{'-'.join(map(str, pair[1:]))}")
def test_the_peak_is_what_the_allocator_counts(pair):
    kind, optimizer, precision, checkpointing, batch, accumulation = pair
    common = {"batch_size": batch, "precision": precision, "optimizers": optimizer, "device": "cpu"}
    if kind is Convolutions:
        parts = Convolutions, images, image_loss
        found = plan(Convolutions, sample=images, loss=image_loss, accumulation=accumulation, **common)
    else:
        model = HuggingFaceModel(kind(), None, 32, checkpointing)
        parts = model.build, model.sample, model.loss
        found = plan(
            kind(), seq_len=32, gradient_checkpointing=checkpointing, accumulation=accumulation, **common
        )  # fmt: skip
    (row,) = found.rows
    # The promise is 5 %. The error is next to nothing, except for checkpointing (1 % here: it keeps the generator's
    # state, 5 KB each), Sketchy's decompositions (0.6 %: workspaces of the kernels), and convolutions in bfloat16 on
    # processors without AVX-512 (1.4 %: oneDNN has none there, and torch's own takes more).
    loose = checkpointing or (kind is Convolutions and precision == "bf16")
    assert row.peak == pytest.approx(
        measured(*parts, optimizer, precision, batch, accumulation), rel=0.02 if loose else 0.01
    )
    assert sum(row.at_peak.values()) == row.peak <= row.parameters + row.gradients + row.state + row.activations


@pytest.mark.parametrize("name, precision", [("cs_adam_layerwise", "fp32"), ("sm3_layerwise", "fp32")])
def test_the_peak_of_steps_in_backward(name, precision):
    pytest.importorskip("sketch_plugins.memory.in_backward", reason="there is no InBackward yet")
    model = HuggingFaceModel(gpt2(), None, 16)
    (row,) = plan(gpt2(), seq_len=16, batch_size=1, precision=precision, optimizers=name, device="cpu").rows
    # Without Numba the steps are eager. The plan adds their largest tiles to the maximum of everything else, which
    # comes at another time here (4.5 % too much; the promise is 5 %).
    rel = 0.02 if importlib.util.find_spec("numba") else 0.05
    assert row.peak == pytest.approx(measured(model.build, model.sample, model.loss, name, precision, 1), rel=rel)


def test_gradients_in_backward_are_those_of_the_largest_parameter():
    ordinary, layerwise = plan(
        gpt2(), seq_len=32, batch_size=2, optimizers=["cs_adam", "cs_adam_layerwise"], precision="fp32", device="cpu"
    ).rows
    with torch.device("meta"):
        sizes = [p.numel() * 4 for p in HuggingFaceModel(gpt2(), None, 32).build().parameters()]
    assert ordinary.gradients == sum(sizes)
    # The largest parameter is tied to the first layer and the last, so its gradient exists when the last layer is done.
    assert max(sizes) <= layerwise.gradients <= 2 * max(sizes) < ordinary.gradients
    assert layerwise.state == ordinary.state and layerwise.when == "forward and backward"


def test_torch_s_own_tracker_counts_the_same():
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker", reason="this torch has no tracker")
    model = HuggingFaceModel(bert(), None, 32)
    with FakeTensorMode():
        module = model.build().train()
        batch = model.sample(4)
        memory = tracker.MemTracker()
        memory.track_external(module, *batch.values())
        with memory:
            loss = model.loss(module, batch)
            loss.backward()
    theirs = memory.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    ours = Subject(model.build).trace(lambda: model.sample(4), model.loss).peak().total
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_largest_batch_fits_and_the_next_does_not():
    arguments = {"seq_len": 32, "precision": "fp32", "optimizers": ["adamw", "cs_adam:preset=lean"]}
    found = plan(bert(), batch_size=3, gpu_memory="100MB", device="cpu", **arguments)
    batches = [row.largest_batch for row in found.rows]
    assert 1 < batches[0] < batches[1]
    for row in found.rows:
        for batch, fits in ((row.largest_batch, True), (row.largest_batch + 1, False)):
            again = plan(
                bert(), batch_size=batch, device="cpu", **{**arguments, "optimizers": [row.optimizer.replace(" ", ":")]}
            )
            assert (again.rows[0].peak <= 100e6) is fits
    least = found["adamw"].parameters + 1
    assert [row.largest_batch for row in plan(bert(), gpu_memory=least, device="cpu", **arguments).rows] == [0, 0]


def test_a_module_is_not_touched_and_needs_no_memory():
    module = Convolutions()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = plan(module, sample=images, loss=image_loss, precision="fp32", optimizers="sm3", device="cpu", batch_size=4)
    assert found.seq_len is None and found.model == "Convolutions"
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters()) and type(module.last.weight) is torch.nn.Parameter
    # 1.1 billion parameters; nothing of that size is allocated.
    huge = plan("tinyllama-1.1b", batch_size=1, seq_len=16, precision="bf16", optimizers="cs_adam:preset=lean")
    assert huge.params == 1_100_048_384 and huge.rows[0].parameters == pytest.approx(2 * huge.params, rel=1e-4)


PUBLISHED = {
    "bert-base-uncased": 109_514_298,
    "bert-large-uncased": 335_174_458,
    "distilbert-base-uncased": 66_985_530,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "opt-125m": 125_239_296,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
}


def test_built_in_models_are_the_published_ones():
    assert PUBLISHED.keys() <= BUILT_IN.keys()
    for name, params in PUBLISHED.items():
        with torch.device("meta"):
            model = HuggingFaceModel(name, None, 128).build()
        assert sum(p.numel() for p in model.parameters()) == params, name
    assert HuggingFaceModel("google-bert/bert-base-cased").config.vocab_size == 28996


def test_plan_is_a_public_name():
    assert sketch_plugins.plan is plan and sketch_plugins.Plan.__name__ == "Plan"
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        _ = sketch_plugins.plans


def test_every_optimizer_of_the_registry_is_in_all():
    found = plan(bert(), seq_len=16, batch_size=2, device="cpu")
    names = [row.optimizer for row in found.rows]
    assert names[:2] == ["adamw", "adafactor"] and names[2 : 2 + len(registry.names())] == list(registry.names())
    assert {"cs_adam preset=lean", "cs_adam_layerwise", "cs_adam_layerwise, bf16 weights"} <= set(names)
    params = [torch.nn.Parameter(p) for p in HuggingFaceModel(bert()).build().parameters()]
    for name in registry.names():
        assert found[name].state == state_report(registry.get(name).cls(params)).state_bytes
    assert found["adamw"].state == pytest.approx(8 * found.params, rel=1e-3)  # and step counters
    assert found["cs_adam_layerwise, bf16 weights"].parameters == 2 * found.params == found["sm3"].parameters / 2
    with pytest.raises(KeyError, match="cs_adam_layerwise"):
        found["adam"]


# -- CUDA's way, by fake tensors ---------------------------------------------------------------------------------------


def test_attention_on_cuda_keeps_no_matrix_of_scores():
    """A CPU's kernels keep it if there is dropout."""
    config = bert()
    config.max_position_embeddings = 2048
    peaks = {}
    for device in ("cpu", "cuda"):
        for length in (1024, 2048):
            arguments = {"batch_size": 1, "precision": "bf16", "optimizers": "cs_adam", "device": device}
            (row,) = plan(config, seq_len=length, **arguments).rows
            peaks[device, length] = row.activations - (WORKSPACE if device == "cuda" else 0)
    scores = 4 * 2048 * 2048 * 2  # of four heads, in bfloat16
    assert peaks["cpu", 2048] > 3.5 * peaks["cpu", 1024] and peaks["cpu", 2048] > 2 * scores
    assert peaks["cuda", 2048] == pytest.approx(2 * peaks["cuda", 1024], rel=0.05)
    assert peaks["cuda", 2048] < 2 * scores


def test_what_cuda_does_otherwise():
    with FakeTensorMode():
        x = torch.empty(4, 100, requires_grad=True)
        q = torch.empty(2, 4, 64, 40, requires_grad=True)
        mask = torch.empty(2, 1, 64, 64, dtype=torch.bool)
        with CudaLike():
            dropped = F.dropout(x, 0.1)
            assert "NativeDropout" in type(dropped.grad_fn).__name__
            assert F.dropout(x, 0.1, training=False).data_ptr is not None
            assert "Efficient" in F.scaled_dot_product_attention(q, q, q).grad_fn.name()
            assert "Efficient" in F.scaled_dot_product_attention(q, q, q, mask, dropout_p=0.1).grad_fn.name()
            half = q.bfloat16()
            assert "Efficient" in F.scaled_dot_product_attention(half, half, half, mask).grad_fn.name()
            assert F.scaled_dot_product_attention(half, half, half, is_causal=True).shape == q.shape
            few = half[:, :2]
            assert F.scaled_dot_product_attention(half, few, few, mask, enable_gqa=True).shape == q.shape
            odd = half[..., :39]
            assert F.scaled_dot_product_attention(odd, odd, odd).shape == odd.shape
            with torch.autocast("cpu", torch.bfloat16):
                assert F.linear(x, torch.empty(10, 100)).dtype == torch.bfloat16
                assert F.layer_norm(half, (40,)).dtype == torch.float32
                assert torch.pow(half, 3).dtype == torch.float32
                assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
            assert F.layer_norm(half, (40,)).dtype == torch.bfloat16


def test_sizes_on_cuda_are_whole_blocks():
    recorder = Recorder(512)
    with FakeTensorMode(), recorder:
        kept = [torch.empty(1), torch.empty(129)]
    assert sorted(recorder.live().values()) == [512, 1024] and len(kept) == 2


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
            vocab_size=500, architectures=["LlamaForCausalLM"],
        ),
        T5Config(num_layers=2, d_model=64, d_kv=16, d_ff=128, num_heads=4, vocab_size=500),
    ],
    ids=["llama", "t5"],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["bf16", "fp16-mixed"])
def test_models_and_precisions_on_cuda(config, precision):
    one, lean = plan(
        config, seq_len=32, batch_size=2, precision=precision, optimizers=["adamw", "cs_adam:preset=lean"]
    ).rows
    weight = PRECISIONS[precision][0].itemsize
    assert one.parameters == pytest.approx(weight * sum(p.numel() for p in built(config).parameters()), rel=0.02)
    assert lean.peak < one.peak and one.activations == lean.activations > WORKSPACE


# Fused experts: transformers keeps the matrices of all experts as one parameter of three dimensions.
_DECODER = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_LATENT = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "head_dim": 16},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": _LATENT,
}


def experts(name):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{name}Config")(**{**_DECODER, **EXPERTS[name]})
    config.architectures = [f"{name}ForCausalLM"]
    if not any(p.ndim == 3 for p in built(config).parameters()):
        pytest.skip(f"transformers {transformers.__version__} keeps each expert of {name} as a module of its own")
    return config


@pytest.mark.parametrize(
    ("name", "precision"),
    [*(("Mixtral", precision) for precision in PRECISIONS), *((name, "bf16") for name in EXPERTS if name != "Mixtral")],
)
def test_fused_experts_in_every_precision(name, precision):
    config = experts(name)
    ordinary, lean = plan(
        config, seq_len=16, batch_size=2, precision=precision, optimizers=["adamw", "cs_adam:preset=lean"]
    ).rows
    weights = PRECISIONS[precision][0].itemsize * sum(p.numel() for p in built(config).parameters())
    # Sizes on CUDA are rounded up to 512 bytes: at most that much for each of a few dozen parameters.
    assert weights <= ordinary.parameters <= weights + 512 * len(list(built(config).parameters()))
    assert ordinary.gradients == ordinary.parameters and lean.peak < ordinary.peak
    # Both see the same pass, and it takes something.
    assert ordinary.activations == lean.activations > WORKSPACE


@pytest.mark.parametrize(
    "name, precision, optimizer",
    [
        ("Mixtral", "fp32", "cs_adam"),
        ("Mixtral", "bf16-mixed", "adamw"),
        ("GptOss", "fp32", "sm3"),
        ("DeepseekV3", "bf16-mixed", "cs_adam"),
    ],
)
def test_the_peak_of_fused_experts_is_what_the_allocator_counts(name, precision, optimizer):
    model = HuggingFaceModel(experts(name), None, 32)
    common = {"batch_size": 4, "precision": precision, "optimizers": optimizer}
    (row,) = plan(experts(name), seq_len=32, device="cpu", **common).rows
    # As for models without experts: the error is 0.01 %; 1 % leaves room for kernels' workspaces on other machines.
    expected = measured(model.build, model.sample, model.loss, optimizer, precision, 4)
    assert row.peak == pytest.approx(expected, rel=0.01)


def test_grouped_products_without_numbers_have_the_shapes_of_the_real_ones():
    grouped = getattr(F, "grouped_mm", None)
    if grouped is None:
        pytest.skip("this torch has no grouped_mm")
    offs = torch.tensor([3, 8], dtype=torch.int32)
    for first, second, given in (
        ((8, 16), (2, 16, 8), offs),  # tokens by experts
        ((16, 8), (8, 8), offs),  # the gradient of the weights
        ((2, 8, 16), (16, 8), offs),
        ((2, 8, 16), (2, 16, 8), None),
    ):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            real = grouped(torch.ones(first, dtype=dtype), torch.ones(second, dtype=dtype), offs=given)
            recorder = Recorder()
            with FakeTensorMode(allow_non_fake_inputs=True), recorder:
                a, b = torch.empty(first, dtype=dtype), torch.empty(second, dtype=dtype)
                recorder.events.clear()
                found = grouped(a, b, offs=given)
            assert (found.shape, found.dtype, found.stride()) == (real.shape, real.dtype, real.stride())
            # Only the result is allocated.
            assert [size for _, size in recorder.events if size > 4 * len(offs)] == [real.nbytes]


def built(config):
    with torch.device("meta"):
        return HuggingFaceModel(config).build()


# -- ZeRO --------------------------------------------------------------------------------------------------------------


def test_zero_by_formula():
    arguments = {
        "seq_len": 16,
        "batch_size": 2,
        "precision": "fp32",
        "optimizers": ["adamw", "cs_adam"],
        "device": "cpu",
    }
    whole = plan(bert(), **arguments)
    ranks = {stage: plan(bert(), zero_stage=stage, world_size=4, **arguments) for stage in (1, 2, 3)}
    params = whole.params
    for stage, found in ranks.items():
        # Two moments and the weights that are stepped, for a quarter of the elements.
        assert found["adamw"].state == pytest.approx(12 * params / 4, rel=0.01)
        assert found["cs_adam"].state < found["adamw"].state
        assert found["adamw"].parameters == pytest.approx(4 * params / (4 if stage == 3 else 1), rel=0.01)
    gradients = [ranks[stage]["adamw"].gradients for stage in (1, 2)]
    assert gradients[0] == 4 * params > gradients[1] > params
    # One rank keeps the same state as without ZeRO, and the weights that are stepped.
    alone = plan(bert(), zero_stage=1, world_size=1, **arguments)
    assert alone["cs_adam"].state == whole["cs_adam"].state + 4 * params


def test_pieces_of_a_rank_are_those_that_zero_would_cut():
    subject = Subject(lambda: torch.nn.Linear(70, 90))
    (choice,) = choices("cs_adam:preset=exact", "fp32")
    # 6390 elements over 4 ranks are 1598 each; exact moments take 8 bytes, the weights 4.
    assert sharded_cost(choice, subject, False, 1, 4).state == 12 * 1598
    # A quarter of each parameter, rounded up: 1575 and 23.
    assert sharded_cost(choice, subject, False, 3, 4).state == 12 * (1575 + 23)


# -- what makes no sense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "bert-huge"}, "unknown model 'bert-huge'.*bert-base-uncased.*config.json"),
        ({"model": "nobody/has-this"}, "nor in the local cache.*nothing is downloaded"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing='yes' is not allowed: it must be True or False"),
        ({"gpu_memory": "1MiB", "reserve": 0}, "the parameters alone take 438.* MB: use more memory"),
        ({"gpu_memory": "16 gigs"}, "gpu_memory='16 gigs' is not allowed.*'2GiB'"),
        ({"gpu_memory": "256MiB"}, "not larger than the 536.9 MB of reserve"),
        ({"gpu_memory": "1GiB", "reserve": "x"}, "reserve='x' is not allowed"),
        ({"precision": "int4"}, "precision='int4' is not one of fp32, bf16, bf16-mixed, fp16-mixed"),
        ({"optimizers": "adam"}, "unknown optimizer 'adam'. Did you mean 'adamw'.*all, cs_adam.*adafactor"),
        ({"optimizers": "cs_adam:seed=1,seed=2"}, "gives an option twice"),
        ({"model": "bert-large"}, "Did you mean bert-large-uncased or bert-large-cased"),
        ({"model": "google-bert/bert-bse-uncased"}, "Did you mean bert-base-uncased"),
        ({"model": ""}, "name is empty"),
        ({"reserve": "1GiB"}, "reserve='1GiB' is subtracted from a budget, and there is none: set gpu_memory, too"),
        ({"gpu_memory": "1GiB", "reserve": ""}, "reserve='' is not allowed"),
        ({"optimizers": "cs_adam:compresion=1"}, "Did you mean 'compression'"),
        ({"optimizers": "preset=lean"}, "does not belong to an optimizer"),
        ({"optimizers": "adamw:preset=lean"}, "adamw takes no options"),
        ({"optimizers": []}, "no optimizer was given"),
        ({"seq_len": 513}, "seq_len=513 is larger than the 512 positions of bert-base-uncased"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"batch_size": True}, "batch_size=True is not allowed"),
        ({"accumulation": -1}, "accumulation=-1 is not allowed"),
        ({"zero_stage": 2}, "zero_stage=2 needs world_size"),
        ({"zero_stage": 4, "world_size": 2}, "zero_stage=4 is not one of 0, 1, 2, 3"),
        ({"world_size": 2}, "world_size=2 has no effect without zero_stage"),
        ({"zero_stage": 1, "world_size": 0}, "world_size=0 is not allowed"),
        ({"zero_stage": 1, "world_size": 2, "optimizers": "sm3_layerwise"}, "and ZeRO cannot be combined"),
        ({"device": "tpu"}, "device='tpu' is not one of cuda, cpu"),
        ({"task": "translation"}, "task='translation' is not known: use one of masked-lm"),
        ({"task": "seq2seq-lm"}, "bert has no model for this task"),
        ({"model": torch.nn.Linear(2, 2)}, "sample=.* and loss="),
        ({"sample": images}, "sample and loss are only for modules"),
        ({"model": Convolutions, "sample": images, "loss": image_loss, "task": "masked-lm"}, "in the module itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"model": "bert-base-uncased", "optimizers": "cs_adam", **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to take a fraction of")
def test_a_fraction_needs_a_gpu():
    with pytest.raises(ValueError, match="is a fraction of a GPU's memory, and there is no GPU"):
        plan(bert(), gpu_memory="0.5")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not a configuration in JSON"),
        ("[1]", "has no key 'model_type'"),
        ('{"hidden_size": 3}', "has no key 'model_type'"),
        ('{"model_type": "magic"}', "'magic' is unknown to transformers"),
        ('{"model_type": "bert", "hidden_size": "many", "num_hidden_layers": "x"}', "bert does not take these values"),
        ('{"model_type": "clip"}', "no task is known for this kind of model"),
        ('{"model_type": "bert", "num_attention_heads": 0}', "makes no valid bert.*ZeroDivisionError"),
        ('{"model_type": "longformer", "num_hidden_layers": 1}', "cannot be run on 512 tokens.*try another"),
    ],
)
def test_configurations_that_are_none(text, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    for given in (file, tmp_path):
        with pytest.raises(ValueError, match=message):
            plan(given, optimizers="cs_adam")
    file.unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        plan(tmp_path)


def test_a_configuration_of_ones_own(tmp_path):
    config = bert()
    config.save_pretrained(tmp_path)
    found = plan(tmp_path, seq_len=32, optimizers="sm3", precision="fp32", device="cpu", batch_size=2)
    same = plan(bert(), seq_len=32, optimizers="sm3", precision="fp32", device="cpu", batch_size=2)
    assert found.rows == same.rows
    for task in TASKS.keys() - {"seq2seq-lm"}:
        assert plan(bert(), task=task, seq_len=8, batch_size=2, optimizers="sm3").rows[0].peak > 0
    assert HuggingFaceModel(tmp_path).task == "masked-lm"
    with torch.device("meta"):
        assert isinstance(HuggingFaceModel(tmp_path).build(), type(AutoModelForMaskedLM.from_config(config)))


def test_decoders_that_classify_and_positions_without_end(tmp_path):
    kind = {"seq_len": 8, "batch_size": 2, "optimizers": "sm3", "precision": "bf16", "device": "cpu"}
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=99
    )
    assert plan(config, task="sequence-classification", **kind).rows[0].peak > 0
    assert config.pad_token_id is None  # the caller's own object is not changed
    file = tmp_path / "config.json"
    file.write_text(
        '{"model_type": "xlnet", "n_layer": 1, "d_model": 32, "n_head": 2, "d_inner": 32, "vocab_size": 99}'
    )
    assert plan(file, **kind).rows[0].peak > 0  # its max_position_embeddings is -1


def test_nothing_at_all_may_be_reserved():
    kind = {"seq_len": 8, "batch_size": 2, "optimizers": "sm3", "gpu_memory": "1MiB", "device": "cpu"}
    assert plan(bert(), reserve="0GiB", **kind) == plan(bert(), reserve=0, **kind) == plan(bert(), **kind)


def test_a_model_whose_way_depends_on_numbers_is_refused():
    def loss(model, batch):
        return model(batch[batch.sum(1) > 0]).sum()

    with pytest.raises(ValueError, match="depends on the values"):
        plan(lambda: torch.nn.Linear(4, 4), sample=lambda n: torch.zeros(n, 4), loss=loss, optimizers="sm3")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    bert().save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_a_narrow_terminal_hides_no_column(small, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    common = ["plan", "--model", str(small), "--batch-size", "2", "--seq-len", "8", "--optimizer", "adamw"]
    assert cli.main([*common, "--gpu-memory", "560MB"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("adamw", "gradients", "activations", "largest"))


def test_the_command(small, tmp_path, capsys):
    chart = tmp_path / "chart.png"
    common = ["plan", "--model", str(small), "--batch-size", "2", "--seq-len", "32", "--precision", "bf16"]
    argv = [*common, "--gpu-memory", "1GiB"]
    argv += ["--optimizer", "adamw", "--optimizer", "cs_adam:preset=lean,seed=1"]
    assert cli.main([*argv, "--plot", str(chart)]) == 0
    said = capsys.readouterr().out
    assert "cs_adam preset=lean,seed=1" in said and "largest batch" in said and "budget 1.1 GB" in said
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 5000
    argv = [*common, "--optimizer", "adamw", "--gpu-memory", "800MB", "--json"]
    assert cli.main([*argv, "--plot", str(tmp_path / "chart.svg"), "--gradient-checkpointing"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["optimizer"] for row in found["rows"]] == ["adamw"]
    assert found["rows"][0]["largest_batch"] > 2 and found["gradient_checkpointing"] is True
    assert "<svg" in (tmp_path / "chart.svg").read_text()
    assert cli.main([*common, "--zero-stage", "3", "--world-size", "8", "--optimizer", "sm3"]) == 0
    assert "ZeRO-3 over 8 ranks, by formula" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--gpu-memory", "lots"], "gpu_memory='lots' is not allowed"),
        (["--optimizer", "adam"], "unknown optimizer 'adam'"),
        (["--plot", "chart.bmp"], "must end in .png, .svg or .pdf"),
        (["--plot", "nowhere/at/all.png"], "No such file or directory"),
        (["--zero-stage", "2"], "needs world_size"),
        (["--seq-len", "9999"], "larger than the 512 positions"),
    ],
)
def test_the_command_says_what_is_wrong(more, message, small, capsys):
    given = ["plan", "--model", str(small), "--seq-len", "8", "--batch-size", "2", *more]
    assert cli.main(given if "--optimizer" in more else [*given, "--optimizer", "sm3"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("sketch-plugins plan: ") and "Traceback" not in err


@pytest.mark.parametrize(("cls", "options"), DENSE, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_what_the_plan_says_of_eager_steps_is_what_an_optimizer_does(cls, options, monkeypatch):
    """It asks the same stores as the loops of a CPU."""
    pytest.importorskip("numba", reason="without Numba every step on a CPU is eager")
    chosen, choose = [], resolved.choose
    monkeypatch.setattr(resolved, "choose", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(300, 130), (40, 3, 4, 4), (64,)]]
    optimizer = cls(params, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    said = takes_eager_steps(optimizer, cuda=False)
    optimizer.step()
    assert said == any(backend is None for backend, _ in chosen)
