"""Short trainings of every form give what they gave before the module was redesigned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ff_utils import language
from ff_utils.backprop import Backprop, mlp
from ff_utils.config import FFConfig, LocalConfig, RecurrentConfig, TrainConfig
from ff_utils.data import load_dataset
from ff_utils.ff.local import LocalForwardForward
from ff_utils.ff.network import ForwardForward
from ff_utils.ff.recurrent import RecurrentForwardForward
from ff_utils.training import fit, fit_greedy_cached, goodness_errors

GOLDEN = json.loads(Path(__file__).with_name("golden_training.json").read_text())
FF = FFConfig(label_scale=4.0, threshold=1.0, sharpness=30.0, seed=1)
TRAIN = TrainConfig(epochs=2, batch_size=50, learning_rate=0.003, seed=1)
SCHEDULED = replace(TRAIN, classifier_update_prob=0.5, classifier_rate=0.3)
LOCAL = LocalConfig(label_scale=2.0, threshold=1.0, sharpness=30.0, seed=1)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", 300, 100)


def forms(data):
    """Of each form: how to build its network, and how to train it."""
    sizes = (data.pixels, data.classes, [40, 40])
    for schedule in ("joint", "layerwise"):
        for negatives in ("random", "hard"):
            for loss in ("softplus", "pairwise"):
                train = replace(SCHEDULED, schedule=schedule, negatives=negatives)
                network = ForwardForward(*sizes, replace(FF, loss=loss))
                yield f"ff-{schedule}-{negatives}-{loss}", network, train
    joined = FFConfig(label="joined", normalisation="length", seed=1)
    joined = replace(joined, weight_decay=0.1, first_read=2, recompute=True)
    network = ForwardForward(*sizes, joined)
    shifted = replace(TRAIN, dropout=0.2, random_shift=1)
    yield "ff-joined-length-decay-dropout-shift", network, shifted
    network = ForwardForward(*sizes, replace(FF, optimizer="sgd"))
    yield "ff-sgd", network, replace(TRAIN, decay="none")
    network = ForwardForward(*sizes, replace(FF, label="none", label_scale=1.0, loss="pairwise"))
    yield "ff-unsupervised", network, replace(TRAIN, mask_blurs=2, dropout=0.1)
    for local in (False, True):
        config = replace(LOCAL, padded=local, local_goodness=local)
        network = LocalForwardForward(data.shape, data.classes, [[4, 2, 8], [2, 1, 16]], config)
        yield f"ff-local-{local}".lower(), network, TRAIN
    config = RecurrentConfig(label_scale=10.0, loss="pairwise", steps=5, threshold=1.0, seed=1)
    network = RecurrentForwardForward(*sizes, replace(config, sharpness=30.0, weight_decay=0.1))
    yield "ff-recurrent", network, replace(TRAIN, classifier_rate=0.3, dropout=0.1)
    yield "backprop", Backprop(mlp(*sizes, seed=1)), replace(TRAIN, dropout=0.1)


def compare(name, history, network=None):
    golden = GOLDEN[name]
    rows = history.drop(columns="seconds").astype(object).where(history.notna(), None)
    for row, expected in zip(rows.to_dict("records"), golden["history"], strict=True):
        for key, value in expected.items():
            wanted = None if value != value else value
            if isinstance(wanted, float):
                wanted = pytest.approx(wanted, rel=1e-3)
            assert row[key] == wanted, (name, key)
    if network is not None:
        found = [p.detach().double().abs().sum().item() for p in network.parameters()]
        assert found == pytest.approx(golden["weights"], rel=1e-3), name


def test_training_of_every_form_is_what_it_was(data):
    for name, network, config in forms(data):
        compare(name, fit(network, data, config, quiet=True), network)


def test_greedy_cached_training_is_what_it_was(data):
    network = ForwardForward(data.pixels, 10, [40] * 3, replace(FF, classifier=False))
    compare("ff-greedy-cached", fit_greedy_cached(network, data, TRAIN, quiet=True), network)
    golden = GOLDEN["ff-greedy-cached"]["goodness_errors"]
    assert goodness_errors(network, data) == pytest.approx(golden, abs=0.011)


@pytest.mark.parametrize("method", ["hard", "rollout", "random", "backprop"])
def test_language_model_is_what_it_was(method):
    text = language.load_text().subset(400, 100)
    config = FFConfig(label="joined", loss="pairwise", label_scale=2.0, threshold=1.0, seed=1)
    config = replace(config, sharpness=10.0)
    _, history = language.train(method, text, [30, 30], TRAIN, config=config, quiet=True)
    compare(f"language-{method}", history)
