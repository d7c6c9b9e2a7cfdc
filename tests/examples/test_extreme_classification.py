"""The extreme-classification example: its hashes, its merged scores, its figures of memory, and a shortened run."""

import csv
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import extreme_classification as example
import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples need the extra `demo`")

SCRIPT = Path(example.__file__)
CS_V = "cs_rmsprop:compression=0.01"
PAPER = "cs_rmsprop:preset=paper_cs_v,compression=0.00333"


def arguments(*options):
    return example.parse(["--quick", *map(str, options)])


def data_of(args):
    data = example.generate(args.classes, args.vocab, args.queries, args.held_out, args.seed, args.device)
    return data, example.merged_classes(args.classes, args.buckets, args.models, args.seed)


def test_the_hash_is_universal():
    models, buckets = 4000, 16
    merged = example.merged_classes(40, buckets, models, seed=3)
    shared = torch.tensor(
        [(merged[:, i] == merged[:, j]).double().mean() for i, j in itertools.combinations(range(40), 2)]
    )
    # A pair shares a bucket in at most 1 / 16 of the draws; 5 standard deviations of a count of 4000, for 780 pairs.
    assert shared.max() < 1 / buckets + 5 * (1 / buckets / models) ** 0.5
    # Models are independent: two of them merge the same pair in 1 / 256 of the draws.
    both = [((m[0] == m[1]) & (n[0] == n[1])) for m, n in zip(merged[::2, :2], merged[1::2, :2], strict=True)]
    assert torch.stack(both).double().mean() < 1 / buckets**2 + 5 * (1 / buckets**2 / (models / 2)) ** 0.5


def test_the_hash_is_balanced_and_exact():
    classes, buckets, models = 20_000, 200, 4
    merged = example.merged_classes(classes, buckets, models, seed=0)
    rng = example.np.random.default_rng(0)
    for row in merged:
        load = torch.bincount(row, minlength=buckets).double()
        assert len(load) == buckets
        # Chi-squared with 199 degrees of freedom: mean 199, standard deviation 20.
        assert ((load - 100) ** 2 / 100).sum() < 199 + 6 * 20
        a, b = (int(rng.integers(low, example.PRIME)) for low in (1, 0))
        # Python's integers know no overflow.
        assert row[-50:].tolist() == [(a * c + b) % example.PRIME % buckets for c in range(classes - 50, classes)]


def test_merged_scores_are_those_of_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    models, queries, buckets, classes = 3, 7, 5, 40
    merged = example.merged_classes(classes, buckets, models, seed=1)
    probabilities = torch.rand(models, queries, buckets, generator=generator).softmax(2)
    before = probabilities.clone()
    naive = torch.tensor(
        [
            [sum(float(probabilities[r, q, merged[r, c]]) for r in range(models)) / models for c in range(classes)]
            for q in range(queries)
        ]
    )
    scores = example.merge(probabilities, merged)
    torch.testing.assert_close(scores, naive)
    assert torch.equal(probabilities, before)
    labels = torch.randint(classes, (queries,), generator=generator)
    # In parts of 3 queries as at once.
    expected = [hit / queries for hit in example.hits(scores, labels)]
    assert example.recalls(probabilities, merged, labels, chunk=3) == pytest.approx(expected)


def test_recall_counts_ties_as_in_a_random_order():
    scores = torch.tensor([[0.3, 0.1, 0.3, 0.3, 0.0], [0.1, 0.2, 0.2, 0.0, 0.0]])
    for k, label in itertools.product((1, 2, 3, 5), range(5)):
        expected = 0.0
        for row in scores.tolist():
            orders = list(itertools.permutations(range(5)))
            found = [sorted(order, key=lambda c: -row[c])[:k] for order in orders]  # stable: ties stay in `order`
            expected += sum(label in best for best in found) / len(orders)
        (hit,) = example.hits(scores, torch.tensor([label, label]), (k,))
        assert hit == pytest.approx(expected)
    assert example.hits(torch.full((1, 5), math.nan), torch.tensor([2]), (1, 3)) == [0, 0]


def test_cs_v_keeps_one_percent_of_the_second_moment():
    args = arguments("--vocab", 5000, "--buckets", 400, "--hidden", 32)
    data, merged = data_of(args)
    bytes_of = {}
    for contender in example.parse_contenders(f"adam,{CS_V},{PAPER}", 1e-2):
        trainer = example.Trainer(contender, args, data.train, merged[0][data.train.labels], 32, 0)
        next(trainer.epoch(0))
        bytes_of[contender.label] = example.state_bytes(trainer.optimizers)
    (adam, adams), cs_v, paper = bytes_of.values()
    vectors = 4 * (32 + 400)
    assert (adam, adams) == (2 * adams, 4 * 32 * (5000 + 400) + vectors)
    # 50 of 5000 rows and 4 of 400, once; 17 of 5000 and 2 of 400 in each of 3 tables. Biases are exact, and there is no
    # first moment.
    assert cs_v == (vectors + 4 * 32 * (50 + 4),) * 2
    assert paper == (vectors + 4 * 32 * 3 * (17 + 2),) * 2
    assert (cs_v[0] - vectors) / (adams - vectors) == 0.01


def test_the_peak_falls_by_the_state_that_is_saved():
    args = arguments("--vocab", 20_000, "--hidden", 32)
    data, merged = data_of(args)
    labels = merged[0][data.train.labels]
    adam, cs_v = (
        example.peak_bytes(run, args, data.train, labels, 8) for run in example.parse_contenders(f"adam,{CS_V}", 1e-2)
    )
    saved = 4 * 32 * 20_000 * (2 - 0.01)
    # SparseAdam's temporaries and ours for 88 touched rows are not the same.
    assert abs(adam - cs_v - saved) < 0.05 * saved
    # Weights and state, and little else at a batch of 8.
    assert 3 * 4 * 32 * 20_000 < adam < 1.2 * 3 * 4 * 32 * 20_000


def test_without_a_sketch_cs_v_is_adam_without_a_first_moment():
    args = arguments()
    data, merged = data_of(args)
    (exact,) = example.parse_contenders("cs_rmsprop:preset=exact@1e-2@3e-3", 1.0)
    trainers = [
        example.Trainer(exact, args, data.train, merged[0][data.train.labels], args.batch_size, 0) for _ in range(2)
    ]
    model = trainers[1].model
    betas = {"betas": (0.0, 0.999)}
    trainers[1].optimizers = [
        torch.optim.SparseAdam([model.input.weight], lr=1e-2, **betas),
        torch.optim.Adam([model.bias, model.output.weight, model.output.bias], lr=3e-3, **betas),
    ]
    (factor,) = {f for f in trainers[0].schedules[0].lr_lambdas}
    trainers[1].schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in trainers[1].optimizers]
    for (_, ours), (_, torchs) in zip(trainers[0].epoch(0), trainers[1].epoch(0), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=0)  # 63 steps of float32
    for p, q in zip(trainers[0].model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def rows_of(out):
    with (out / "results.csv").open() as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def test_a_shortened_run(tmp_path):
    # 300 classes of 13 queries each on average: seen often enough to be told apart.
    options = ("--quick", "--classes", 300, "--queries", 4000, "--batch-size", 64)
    options += ("--optimizers", f"adam@0.16@0.01,{CS_V}@0.16@0.01")
    command = [sys.executable, str(SCRIPT), *map(str, options), "--out", str(tmp_path / "one")]
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "one" / "recall.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    rows = rows_of(tmp_path / "one")
    last = [row for row in rows if row["epoch"] == "2"]
    assert [(r["optimizer"], r["batch"]) for r in last] == [
        ("adam", "base"), ("cs_rmsprop compression=0.01", "base"), ("cs_rmsprop compression=0.01", "fit")
    ]  # fmt: skip
    adam, base, fit = last
    # What was saved has been spent, and no more than that.
    assert int(fit["batch_size"]) > 1.5 * int(base["batch_size"]) == 1.5 * int(adam["batch_size"])
    assert int(base["peak_bytes"]) < int(fit["peak_bytes"]) <= int(fit["budget_bytes"]) == int(adam["peak_bytes"])
    ratio = int(fit["batch_size"]) / int(base["batch_size"])
    for rate in ("lr", "output_lr"):
        assert float(fit[rate]) / float(base[rate]) == pytest.approx(ratio**0.5, rel=1e-3)
    for row in last:
        # Chance is 10 of 300; 11 of 300 classes in the same bucket of one model are told apart by the other.
        assert float(row["recall@10"]) > 0.6
        assert float(row["recall@1"]) <= float(row["recall@10"]) <= float(row["recall@100"]) <= 1
        assert f"{100 * float(row['recall@10']):.1f}" in finished.stdout
    # The same in another process, but for the time it took; without the search for a batch.
    threads = torch.get_num_threads()
    try:
        assert example.main([*map(str, options), "--batches", "base", "--out", str(tmp_path / "two")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert rows_of(tmp_path / "two") == [row for row in rows if row["batch"] == "base"]


def test_tuning_finds_the_lowest_of_its_neighbours(tmp_path):
    options = ("--quick", "--queries", "600", "--epochs", "1", "--models", "1", "--tune", "--batches", "base")
    assert example.main([*options, "--optimizers", "adam@0.01", "--out", str(tmp_path)]) == 0
    with (tmp_path / "rates.csv").open() as f:
        losses = {(float(r["lr"]), float(r["output_lr"])): float(r["valid_loss"]) for r in csv.DictReader(f)}
    lr, output_lr = min(losses, key=losses.__getitem__)
    assert {(lr * 2, output_lr), (lr / 2, output_lr), (lr, output_lr * 2), (lr, output_lr / 2)} <= losses.keys()
    assert {(float(r["lr"]), float(r["output_lr"])) for r in rows_of(tmp_path)} == {(lr, output_lr)}


def test_contenders_are_parsed():
    parsed = example.parse_contenders(f"adam,adam@1e-3,{PAPER}@0.1@2e-2,cs_adam@1e-4", 5e-4)
    assert [(c.label, c.lr, c.output_lr) for c in parsed] == [
        ("adam", 5e-4, 5e-4),
        ("adam", 1e-3, 1e-3),
        ("cs_rmsprop preset=paper_cs_v,compression=0.00333", 0.1, 2e-2),
        ("cs_adam", 1e-4, 1e-4),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "99"], "--classes 99: recall@100 needs 100 to 2147483646 classes"),
        (["--buckets", "501"], "--buckets 501: allowed are 2 to 500"),
        (["--buckets", "1"], "--buckets 1: allowed are 2 to 500"),
        (["--batch-size", "2001"], "--batch-size 2001 is more than the 2000 queries"),
        (["--epochs", "0"], "0 is not a positive whole number"),
        (["--lr-power", "nan"], "--lr-power nan is not in [0, 1]"),
        (["--seed", "-1"], "--seed -1 is negative"),
        (["--memory", "lots"], "--memory='lots' is not allowed"),
        (["--memory", "10KB", "--batch-size", "2"], "adam: not even a batch of 1 fits into 10.0 KB"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--device", "meta"], "--device meta: its memory cannot be measured"),
        (["--optimizers", "adamw"], "unknown optimizer 'adamw'. Did you mean 'cs_adam'? The optimizers are cs_adam"),
        (["--optimizers", "adam:betas=0:0.9"], "adam takes no options here"),
        (["--optimizers", "cs_rmsprop:compression=2"], "compression='2' is not allowed"),
        (["--optimizers", "cs_rmsprop:momentum=0.9"], "RMSprop's momentum is not kept"),
        (["--optimizers", "cs_rmsprop@0@1e-3"], "'cs_rmsprop': the first learning rate, '0', is not a positive number"),
        (["--optimizers", "adam@@1e-3"], "'adam': the first learning rate, '', is not a positive number"),
        (["--optimizers", "cs_adam:depth=2@1@2@3"], "'depth=2': the first learning rate, '1@2', is not a positive"),
        (["--optimizers", "cs_adam@1:depth=2@3"], "unknown optimizer 'cs_adam@1'"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as ended:
        example.main(["--quick", "--out", str(tmp_path), *options])
    assert message in f"{ended.value} {capsys.readouterr().err}"
