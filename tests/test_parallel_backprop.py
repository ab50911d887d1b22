"""Backprop over processes learns what a plain loop learns, whichever way it is split."""

import pandas as pd
import pytest
import torch
from torch import nn

from ff_utils import distributed, load_dataset, mlp, parallel_backprop
from ff_utils.training import batches

SETTINGS = distributed.Settings("digits", train_size=200, hidden=(24, 16, 20), batch_size=30)
PARTS, ROUNDS = 3, 2


@pytest.fixture(scope="module")
def found():
    return parallel_backprop.compare(SETTINGS, 2, PARTS, ROUNDS)


def plain_losses():
    """Mean loss of each epoch, by autograd and Adam on whole batches in this process."""
    data = load_dataset("digits", SETTINGS.train_size)
    network = mlp(data.pixels, data.classes, list(SETTINGS.hidden), seed=SETTINGS.seed)
    optimizer = torch.optim.Adam(network.parameters(), SETTINGS.learning_rate)
    generator = torch.Generator().manual_seed(SETTINGS.seed)
    means = []
    for _ in range(ROUNDS):
        losses = []
        for images, labels in batches(data, SETTINGS.batch_size, generator):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        means.append(sum(losses) / len(losses))
    return means


def test_every_way_to_split_learns_what_a_plain_loop_learns(found):
    losses = pd.DataFrame(found["epochs"]).pivot(index="kind", columns="round", values="loss")
    assert set(losses.index) == {"single", "threads", "data_parallel", "pipeline"}
    expected = pytest.approx(plain_losses(), rel=1e-4)
    for kind, row in losses.iterrows():
        assert row.tolist() == expected, kind


def test_pipeline_splits_weights_and_data_parallel_repeats_them(found):
    first, second = (row["tensor_bytes"] for row in found["ranks"])
    assert second["single"] == second["threads"] == 0
    assert first["data_parallel"] == second["data_parallel"] == first["single"] > 0
    steps = 4 * 8  # a count of updates for each weight matrix and bias, of 4 bytes
    assert first["pipeline"] + second["pipeline"] == first["single"]
    weights = sum(p.nbytes for p in mlp(64, 10, [24, 16, 20]).parameters())
    assert first["single"] == 4 * weights + steps


def test_timeline_has_every_micro_batch_up_then_down_then_the_update(found):
    for row in found["ranks"]:
        kinds = [kind for *_, kind in row["timeline"]]
        assert kinds[: 2 * PARTS + 1] == ["forward"] * PARTS + ["backward"] * PARTS + ["update"]
        starts, ends, _ = zip(*row["timeline"], strict=True)
        assert all(begin >= end for begin, end in zip(starts[1:], ends, strict=False))
        assert 0 < row["busy"] < 1


@pytest.mark.parametrize(("ranks", "parts"), [(1, 2), (4, 2), (2, 0), (2, 31)])
def test_numbers_out_of_range_are_refused(ranks, parts):
    with pytest.raises(ValueError, match="give a whole number"):
        parallel_backprop.compare(SETTINGS, ranks, parts, 1)
