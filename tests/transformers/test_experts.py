"""Mixtures of experts through Trainer: transformers' own classes, in which a parameter holds all experts of a layer."""

import pytest
import torch
import transformers
from transformers import set_seed

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "Qwen2Moe": {
        "intermediate_size": 48, "num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    },
}  # fmt: skip


def model_of(kind):
    set_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZE, **EXPERTS[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("name", ["cs_adam", "sm3", "sketchy"])
def test_experts_train_and_a_resumed_run_is_the_uninterrupted_one(kind, name, make_trainer, tmp_path):
    def trainer(model, **options):
        return make_trainer(name, model, save_strategy="steps", save_steps=3, **options)

    whole = trainer(model_of(kind))
    batches = {key: p for key, p in whole.model.named_parameters() if p.ndim == 3}
    if not batches:
        pytest.skip(f"transformers {transformers.__version__} keeps each expert as a parameter of its own")
    before = {key: p.detach().clone() for key, p in batches.items()}
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for key, p in batches.items():
        assert p.shape[0] == 4
        moved = (p.detach() - before[key]).abs().amax((1, 2))
        assert (moved > 0).all(), f"an expert of {key} has not moved: {moved}"
        state = whole.optimizer.optimizer.state[p]
        if name == "cs_adam":  # each expert has buckets of its own
            assert state["second_moment.table"].shape[1] % 4 == 0
        if name == "sketchy":  # and covariances of its own
            found = [value for kind, value in state.items() if kind.startswith("preconditioner.vectors")]
            assert found and all(value.shape[0] == 4 for value in found)
    # Trainer itself does not load the experts of a checkpoint, whose names on disk are others (with AdamW neither).
    saved = tmp_path / "out" / "checkpoint-3"
    model = model_of(kind)
    model.load_state_dict(type(model).from_pretrained(saved).state_dict())  # with the memory of a model that was built
    again = trainer(model, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(saved))
    wanted = dict(whole.model.named_parameters())
    assert all(torch.equal(p, wanted[key]) for key, p in again.model.named_parameters())
