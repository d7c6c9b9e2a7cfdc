"""The parts of the examples on which the fairness of the comparison rests: what is held out, what is parsed."""

import _common as common
import pytest
import torch
from _common import Document, Run


def test_runs_are_parsed():
    assert common.parse_runs("adamw_torch_fused,cs_adam:preset=lean,depth=2@0.01, sgd@1e-1", 5e-4) == [
        Run("adamw_torch_fused", None, 5e-4),
        Run("cs_adam", "preset=lean,depth=2", 0.01),
        Run("sgd", None, 0.1),
    ]


@pytest.mark.parametrize("text", ["", "a,,b", "depth=2", "a:", "a@0", "a@inf", "a@", "a,a", ":x=1"])
def test_runs_that_cannot_be_parsed(text):
    with pytest.raises(ValueError):
        common.parse_runs(text, 1e-3)


def test_whole_documents_are_held_out():
    documents = [Document("file", f"text {i}") for i in range(25)]
    corpus = common._split("source", documents, by_label=False)
    assert [d.text for d in corpus.eval] == ["text 9", "text 19"]
    assert sorted(corpus.train + corpus.eval, key=documents.index) == documents


def test_the_end_of_few_documents_is_held_out():
    text = "".join(f"line {i}\n" for i in range(100))
    corpus = common._split("source", [Document("file", text)], by_label=False)
    assert corpus.train[0].text + corpus.eval[0].text == text
    assert corpus.eval[0].text.startswith("line ")
    assert len(text) / 20 < len(corpus.eval[0].text) <= len(text) / 10


@pytest.mark.parametrize("text", ["", "x", "no line end " * 20, "\n" * 50])
def test_split_tail_keeps_every_character(text):
    assert "".join(common.split_tail(text)) == text


def test_every_label_is_split_on_its_own():
    documents = [Document(label, f"{label} {i}") for label in ("a", "b") for i in range(12)]
    corpus = common._split("source", documents, by_label=True)
    assert [d.text for d in corpus.eval] == ["a 4", "a 9", "b 4", "b 9"]


def test_copies_are_dropped():
    documents = [Document("a", "same"), Document("b", "same"), Document("c", "other")]
    assert common._limited(documents, 10**6) == [documents[0], documents[2]]


def test_the_standard_library_is_read_in_order_without_tests():
    documents = list(common.standard_library())
    labels = [d.label for d in documents]
    assert {"json", "asyncio", "argparse"} <= set(labels)
    assert not {"test", "encodings", "site-packages"} & set(labels)
    assert documents == list(common.standard_library())


def test_blocks_hold_all_tokens_in_order():
    blocks = common.pack([[5, 6, 7], [8, 9]], separator=1, length=3)
    assert blocks.tolist() == [[5, 6, 7], [1, 8, 9]]
    assert common.pack([[5, 6, 7], [8, 9]], 1, length=4, before=[2]).tolist() == [[2, 5, 6, 7], [2, 1, 8, 9]]
    assert common.pack([[5]], 1, length=4).shape == (0, 4)


def test_unigram_loss_of_uniform_tokens_is_the_log_of_the_vocabulary():
    tokens = torch.arange(64).view(8, 8)
    assert common.unigram_loss(tokens, tokens, 64) == pytest.approx(torch.tensor(64.0).log().item(), rel=1e-6)
