import itertools

import pytest
import torch

from ff_utils import datasets, networks, pairs, training


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def make(data, hidden=(100, 100), **settings):
    settings = {"label_scale": 4.0, "theta": 1.0, "scale": 30.0} | settings
    return networks.ForwardForward(data.pixels, data.classes, list(hidden), **settings)


def train(network, data, **settings):
    settings = {"epochs": 3, "batch_size": 50, "learning_rate": 0.003, "quiet": True} | settings
    return training.train_forward_forward(network, data, **settings)


@pytest.mark.parametrize(
    ("schedule", "negatives"), list(itertools.product(training.SCHEDULES, pairs.NEGATIVES))
)
def test_forward_forward_learns_digits_in_every_schedule(digits, schedule, negatives):
    network = make(digits)
    history = train(network, digits, epochs=10, schedule=schedule, negatives=negatives)
    assert len(history) == (10 if schedule == "joint" else 20)
    assert history.error.iloc[-1] < 0.07
    assert training.goodness_errors(network, digits)[-1] < 0.15


def test_forward_forward_learns_real_images(data):
    part = data.subset(min(10_000, len(data.train_labels)))
    network = make(part, hidden=(300, 300))
    history = train(network, part, epochs=4, learning_rate=0.001)
    assert history.error.iloc[-1] < 0.1
    shown = network.predict(part.test_images, by="softmax")
    assert (shown != part.test_labels).float().mean().item() == pytest.approx(
        history.error.iloc[-1]
    )


def test_the_seeds_choices_learn_too(digits):
    network = make(
        digits, label="joined", normalisation="length", theta=2.0, scale=1.0, label_scale=1.0
    )
    train(
        network, digits, epochs=30, learning_rate=0.03, schedule="layerwise",
        negatives="random", decay="none",
    )  # fmt: skip
    assert training.goodness_errors(network, digits)[-1] < 0.25


def test_the_same_seed_gives_the_same_bits_and_another_does_not(digits):
    networks_ = [make(digits, seed=s) for s in (1, 1, 2)]
    for network, seed in zip(networks_, (1, 1, 2), strict=True):
        train(network, digits, epochs=1, seed=seed)
    one, same, other = (n.layers[1].weight for n in networks_)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_layerwise_training_leaves_finished_layers_alone(digits):
    network = make(digits)
    weights = []

    def remember(row):
        weights.append((row["layer"], network.layers[0].weight.clone()))

    train(network, digits, epochs=2, schedule="layerwise", after_epoch=remember)
    assert [layer for layer, _ in weights] == [1, 1, 2, 2]
    assert not torch.equal(weights[0][1], weights[1][1])
    assert torch.equal(weights[1][1], weights[3][1])


def test_every_image_is_seen_once_an_epoch_in_a_new_order(digits):
    generator = torch.Generator().manual_seed(0)
    epochs = [list(training.batches(digits, 64, generator)) for _ in range(2)]
    sums = [torch.cat([images for images, _ in e]).sum(1) for e in epochs]
    assert not torch.equal(*sums)
    assert torch.equal(sums[0].sort().values, digits.train_images.sum(1).sort().values)
    assert torch.equal(sums[0].sort().values, sums[1].sort().values)


def test_the_learning_rate_falls_to_zero_over_the_second_half():
    rates = [training._decayed(step / 10, "linear") for step in range(11)]
    assert rates[:6] == [1.0] * 6 and rates[-1] == 0
    assert rates[5:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert training._decayed(0.9, "none") == 1


def test_backprop_learns_and_frees_its_gradients(digits):
    network = networks.backprop_network(digits.pixels, 10, [100, 100])
    history = training.train_backprop(
        network, digits, epochs=8, batch_size=50, learning_rate=0.002, quiet=True
    )
    assert history.error.iloc[-1] < 0.06
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_loss_that_runs_away_stops_training_with_layer_epoch_and_remedy(digits):
    network = make(digits)
    network.layers[1].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layer 2 is nan in epoch 1; lower learning_rate"):
        train(network, digits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 10**6}, "batch_size is 1000000; give .* at most 1437"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": 3.0}, "learning_rate is 3.0"),
        ({"schedule": "random"}, "schedule is 'random'; choose one of: joint, layerwise"),
        ({"negatives": "easy"}, "negatives is 'easy'; choose one of: random, hard"),
        ({"decay": "cosine"}, "decay is 'cosine'"),
    ],
)
def test_bad_settings_are_named(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        train(make(digits), digits, **settings)


def test_data_with_one_class_is_refused(digits):
    of_one = digits.train_labels == 3
    one = datasets.replace(
        digits, train_images=digits.train_images[of_one], train_labels=digits.train_labels[of_one]
    )
    with pytest.raises(ValueError, match="one class only"):
        train(make(one), one)
