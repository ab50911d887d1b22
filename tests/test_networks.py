import itertools

import pytest
import torch

from ff_utils import layers, networks, pairs
from ff_utils.networks import ForwardForward


def make(label="pixels", normalisation="mean_square", hidden=(8, 6), **settings):
    return ForwardForward(
        20,
        4,
        list(hidden),
        label=label,
        label_scale=2.5,
        normalisation=normalisation,
        dtype=torch.float64,
        **settings,
    )


def images(count=7):
    return torch.rand(count, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("label", "normalisation"), list(itertools.product(("joined", "pixels"), layers.NORMALISATIONS))
)
def test_label_goodness_is_what_trying_every_label_in_full_gives(label, normalisation):
    network = make(label, normalisation)
    found = network.label_goodness(images())
    for tried in range(4):
        h = network.inputs(images(), torch.full((7,), tried))
        for depth, layer in enumerate(network.layers):
            y = layer(h)
            expected = y.square().mean(dim=1)
            assert torch.allclose(found[depth, :, tried], expected, atol=1e-12)
            h = y / (y.norm(dim=1, keepdim=True) + 1e-300)
            h = h * (y.shape[1] ** 0.5 if normalisation == "mean_square" else 1)


@pytest.mark.parametrize(
    ("label", "normalisation"), list(itertools.product(pairs.LABELS, layers.NORMALISATIONS))
)
def test_labelled_rows_teach_what_rows_with_the_labels_written_in_teach(label, normalisation):
    one, other = make(label, normalisation, seed=1), make(label, normalisation, seed=1)
    labels, wrong = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 3, 0, 2, 2])
    for _ in range(3):
        rows = other.labelled(images(5))
        for h, found in zip(
            one.activations(one.inputs(images(5), None), 2),
            other.activations(rows.with_labels(None), 2),
            strict=True,
        ):
            assert torch.allclose(h, found, atol=1e-10)
        h = one.inputs(images(5).repeat(2, 1), torch.cat([labels, wrong]))
        expected = one.step(h, 5, 0.01)
        found = other.step(rows.with_labels(labels, wrong), 5, 0.01)
        assert torch.allclose(found, expected, atol=1e-10)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], tensor, atol=1e-8), name


def test_dropped_pixels_are_zero_for_every_label_and_the_others_make_up_for_them():
    network, pictures = make(), images(2000)
    rows = network.labelled(pictures)
    plain = rows.image.clone()
    rows.drop_pixels(0.25, torch.Generator().manual_seed(0))
    kept = rows.image != 0
    assert torch.allclose(rows.image[kept], plain[kept] / 0.75)
    assert abs(kept.double().mean() - 0.75) < 0.01
    one, other = (rows.with_labels(torch.full((2000,), c)) for c in (0, 1))
    weight = torch.zeros(1, 20, dtype=torch.float64)
    weight[0, 4:] = 1.0
    bias = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(one.times(weight, bias), other.times(weight, bias))


def test_both_adds_the_softmax_and_the_goodness_as_log_probabilities():
    network = make(scale=3.0, seed=2)
    network.softmax.weight.uniform_(-1, 1)
    expected = network.guess(images()).log_softmax(1)
    for g in network.label_goodness(images()):
        expected = expected + 3.0 * g / 2
    assert torch.allclose(network.scores(images(), "both"), expected)
    with pytest.raises(ValueError, match="by is 'vote'; choose one of: softmax, goodness, both"):
        network.predict(images(), "vote")


def test_the_first_layer_counts_and_one_layer_alone_can_tell_classes_apart():
    network = make(hidden=(50,))
    assert network.label_goodness(images()).shape == (1, 7, 4)
    assert len(network.predict(images()).unique()) > 1


def test_prediction_does_not_depend_on_the_chunk():
    network = make()
    for by in networks.PREDICTIONS:
        whole = network.predict(images(), by)
        assert torch.equal(whole, network.predict(images(), by, rows=2))


def test_a_step_trains_every_layer_on_what_the_layer_below_gave_before_its_update():
    network, twin = make(seed=1), make(seed=1)
    h = network.inputs(images(6), torch.tensor([0, 1, 2, 3, 0, 1]))
    losses = network.step(h.clone(), 3, 0.01)
    below = h.clone()
    scratch = torch.zeros(1000, dtype=torch.float64)
    for layer, loss in zip(twin.layers, losses, strict=True):
        y = layer(below)
        above = y.clone()
        layers.normalise_(above, "mean_square")
        _, found = layer.step(below.clone(), 3, 0.01, scratch)
        assert torch.equal(found, loss)
        below = above
    for one, other in zip(network.layers, twin.layers, strict=True):
        assert torch.equal(one.weight, other.weight)


def test_layers_and_their_optimizer_state_are_in_the_state_dict():
    names = set(make().state_dict())
    assert {"layers.0.weight", "layers.1.bias_second_moment", "softmax.weight"} <= names
    assert "gradient" not in names
    make().eval()


def test_a_seed_means_the_same_weights():
    assert torch.equal(make(seed=5).layers[1].weight, make(seed=5).layers[1].weight)
    assert not torch.equal(make(seed=5).layers[1].weight, make(seed=6).layers[1].weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": []}, "hidden is"),
        ({"hidden": [10, 0]}, r"hidden\[1\] is 0"),
        ({"label": "corner"}, "label is 'corner'"),
        ({"normalisation": "batch"}, "normalisation is 'batch'"),
        ({"theta": 0}, "theta is 0"),
        ({"theta": float("nan")}, "theta is nan"),
        ({"scale": -1}, "scale is -1"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"loss": "mse"}, "loss is 'mse'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ForwardForward(20, 4, **({"hidden": [5]} | settings))


def test_the_baseline_is_linear_and_relu_with_the_seeds_normalisation_between_on_demand():
    plain = networks.backprop_network(20, 4, [8, 6])
    assert [type(m).__name__ for m in plain] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    seeds = networks.backprop_network(20, 4, [8, 6], normalised=True)
    assert [type(m).__name__ for m in seeds][2] == "RowNormalisation"
    rows = seeds[2](torch.rand(3, 8))
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))


def test_the_baseline_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    networks.backprop_network(20, 4, [8], seed=9)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_gradients_added_up_over_parts_are_those_of_the_batch(micro_batches):
    one, other = make(seed=1), make(seed=1)
    h = one.inputs(images(8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    for _ in range(3):
        expected = one.step(h.clone(), 3, 0.01)
        kept = h.clone()
        found = other.step_accumulated(h, 3, 0.01, micro_batches)
        assert torch.allclose(found, expected, atol=1e-12) and torch.equal(h, kept)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], tensor, atol=1e-10), name
