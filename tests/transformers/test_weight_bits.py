"""``weight_bits`` in Trainer: a model in bfloat16, resumed runs, the float32 weights beside checkpoints."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from sketch_plugins import full_precision_state_dict
from sketch_transformers import SketchCallback, save_full_precision

OPTIONS = "min_compress_size=256,weight_bits={}"


@pytest.mark.parametrize(("name", "bits"), [("cs_adam", 24), ("cs_adam_layerwise", 24), ("sm3", 32)])
def test_a_resumed_run_is_the_uninterrupted_one(name, bits, make_trainer, new_model, tmp_path):
    def trainer(seed=0, callbacks=None, **options):
        return make_trainer(
            name, new_model(seed, torch.bfloat16), callbacks, optim_args=OPTIONS.format(bits), max_grad_norm=0.0,
            save_strategy="steps", save_steps=3, **options,
        )  # fmt: skip

    whole = trainer(callbacks=[SketchCallback(full_precision=True)])
    whole.train()
    wanted = full_precision_state_dict(whole.model, whole.optimizer)
    stored = whole.model.state_dict()
    assert any(not torch.equal(value, stored[key].float()) for key, value in wanted.items())
    again = trainer(seed=1, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    got = full_precision_state_dict(again.model, again.optimizer)
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    # Written into the checkpoint: a model whose configuration says float32.
    read = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "checkpoint-6" / "float32", dtype="auto")
    assert read.dtype == torch.float32
    assert all(torch.equal(wanted[key], value) for key, value in read.state_dict().items())
    assert (
        sorted(path.name for path in (tmp_path / "out" / "checkpoint-6").iterdir() if path.name.startswith(".")) == []
    )
    # And again, over the existing folder.
    save_full_precision(whole.model, whole.optimizer, tmp_path / "out" / "checkpoint-6" / "float32")


def test_without_weight_bits_there_is_nothing_to_write(make_trainer):
    trainer = make_trainer(callbacks=[SketchCallback(full_precision=True)])
    with pytest.raises(ValueError, match="weight_bits=24"):
        trainer.train()


def test_a_module_of_ones_own(tmp_path):
    from sketch_plugins import CSAdam

    model = torch.nn.Linear(4, 3).to(torch.bfloat16)
    optimizer = CSAdam(model.parameters(), weight_bits=24, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    save_full_precision(model, optimizer, tmp_path / "weights")
    read = torch.load(tmp_path / "weights" / "pytorch_model.bin")
    assert all(torch.equal(read[key], value) for key, value in full_precision_state_dict(model, optimizer).items())
