"""Code that the tests of clients share: tiny generated models and texts, and the assertions about a run."""

import importlib.util
import json
import os

import pytest

CS_ADAM = "sketch_plugins.optim.adam.CSAdam"
OPTIONS = "compression=0.25,min_compress_size=256"
WORDS = "red blue green black white grey pink brown gold silver and then comes again a the".split()
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node", "2")
#: Arguments of all clients of Trainer.
TRAINING = (
    *("--output_dir", "out", "--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none"),
    *("--use_cpu", "true", "--bf16", "false", "--save_strategy", "no", "--learning_rate", "1e-3"),
)
OURS = ("--optim", "cs_adam", "--optim_args", OPTIONS)


def needs(package):
    """Skip a file's tests by the name of the missing package. After `make clients` it is an error instead."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        if package in os.environ.get("CLIENTS_INSTALLED", "").split(","):
            raise ModuleNotFoundError(f"{package} is to be installed for these tests, and is not")
        pytest.skip(f"{package} is not installed: `make clients` installs it", allow_module_level=True)


def texts(count=32):
    """Sentences that differ from each other."""
    return [" ".join(WORDS[(start * step) % len(WORDS)] for step in range(1, 9)) for start in range(1, count + 1)]


def tokenizer(folder):
    """Words as tokens, in a folder that `AutoTokenizer` reads, with a template for chats."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[SEP]"]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]",
        sep_token="[SEP]", cls_token="[BOS]", model_max_length=32,
    )  # fmt: skip
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


def llama(folder):
    """A Llama of 30,000 weights and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(folder)


def bert(folder):
    """A BERT of 30,000 weights without a head, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer(folder)


def rows(file, **columns):
    """A data set in JSON lines, with a column for each keyword."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained(ran, processes, optimizer=CS_ADAM, steps=2, compression=0.25, share=0.7):
    """The last step of each process of a client that ended without error and used the requested optimizer.

    Args:
        ran: result of the fixture ``client``.
        processes: number of processes that trained; they end with the same weights.
        optimizer: the class that took every step.
        steps: number of steps of each process.
        compression: the option of the optimizer's groups; None: it has none.
        share: upper bound of the state relative to AdamW's 8 bytes a weight. The state is more than 1 byte a weight:
            the first moment takes 1, and tensors that are too small for a sketch take 8.
    """
    assert ran.status == 0, ran.output[-6000:]
    assert {step["optimizer"] for step in ran.steps} == {optimizer}, ran.output[-3000:]
    of = {}
    for step in ran.steps:
        of.setdefault(step["process"], []).append(step)
    assert [len(taken) for taken in of.values()] == [steps] * processes
    last = [taken[-1] for taken in of.values()]
    assert sorted(step["rank"] for step in last) == list(range(processes))
    assert {step["world"] for step in last} == {processes} and len({step["digest"] for step in last}) == 1
    for step in last:
        assert step["compression"] == compression
        assert 1 < step["bytes"] / step["weights"] < share * 8, step
    assert "no optimizer of sketch-plugins" not in ran.output
    return last
