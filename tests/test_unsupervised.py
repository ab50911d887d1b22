import pytest
import torch

from ff_utils import datasets, training, unsupervised
from ff_utils.networks import ForwardForward


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def make(data, hidden=(100, 100, 100), **settings):
    settings = {"label": "none", "theta": 1.0, "scale": 20.0, "first_read": 2} | settings
    return ForwardForward(data.pixels, data.classes, list(hidden), **settings)


def train(network, data, **settings):
    settings = {"epochs": 2, "batch_size": 50, "learning_rate": 0.003, "blurs": 1} | settings
    return unsupervised.train_unsupervised(network, data, quiet=True, **settings)


def test_layers_that_saw_no_label_tell_hybrids_from_images_and_classes_apart(digits):
    network = make(digits)
    history = train(network, digits, epochs=15, learning_rate=0.01)
    assert history.stage.tolist() == ["layers"] * 15 + ["softmax"] * 15
    assert (history.loc[14, ["loss_1", "loss_2", "loss_3"]] < 1.35).all()  # chance is 1.386
    assert history.error.iloc[-1] < 0.09


def test_the_softmax_leaves_the_layers_as_they_are_and_the_layers_never_see_a_label(digits):
    network = make(digits)
    other = datasets.replace(digits, train_labels=digits.train_labels.flip(0))
    train(network, digits, epochs=1)
    before = {name: t.clone() for name, t in network.layers.state_dict().items()}
    unsupervised.softmax_step(network, digits.train_images[:9], digits.train_labels[:9], 0.1)
    blind = make(digits)
    train(blind, other, epochs=1)
    for name, tensor in before.items():
        assert torch.equal(network.layers.state_dict()[name], tensor), name
        assert torch.equal(blind.layers.state_dict()[name], tensor), name
    assert not torch.equal(network.softmax.weight, blind.softmax.weight)


def test_the_softmax_reads_from_the_layer_that_is_named(digits):
    network = make(digits, hidden=(7, 5, 3))
    assert network.softmax.weight.shape == (10, 8)
    h = network.inputs(digits.test_images[:6], None)
    activations = list(network.activations(h, 3))
    network.softmax.weight.normal_(generator=torch.Generator().manual_seed(0))
    expected = torch.cat(activations[1:], dim=1) @ network.softmax.weight.t()
    assert torch.allclose(network.guess(digits.test_images[:6]), expected, atol=1e-5)


def test_a_run_broken_in_the_softmax_stage_resumes_to_the_same_bits(digits, tmp_path):
    whole, broken, resumed = (make(digits) for _ in range(3))
    expected = train(whole, digits)
    path, write = tmp_path / "run.pt", training.Checkpoint.save

    def save_three(checkpoint, rows):
        write(checkpoint, rows)
        if len(rows) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Checkpoint, "save", save_three)
        train(broken, digits, checkpoint=path)
    found = train(resumed, digits, checkpoint=path)
    assert found.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_what_needs_a_label_refuses_a_network_without_one(digits):
    network = make(digits)
    with pytest.raises(ValueError, match="train this network by train_unsupervised"):
        training.train_forward_forward(
            network, digits, epochs=1, batch_size=50, learning_rate=0.003
        )
    with pytest.raises(ValueError, match="train this network by train_unsupervised"):
        training.train_layer_after_layer(
            network, digits, epochs=1, batch_size=50, learning_rate=0.003
        )
    with pytest.raises(ValueError, match="predict by 'softmax'"):
        network.predict(digits.test_images)
    assert network.predict(digits.test_images[:5], by="softmax").shape == (5,)
    with pytest.raises(ValueError, match="the softmax alone can predict, give guesses=True"):
        make(digits, guesses=False)
    with pytest.raises(ValueError, match="label is 'pixels': build the network with"):
        train(make(digits, label="pixels"), digits)


def test_a_layer_that_the_softmax_does_not_read_cannot_be_trained_alone(digits):
    with pytest.raises(ValueError, match="softmax reads layer 1: give first_read=1"):
        training.train_forward_forward(
            make(digits, label="pixels"), digits, schedule="layerwise", epochs=1, batch_size=50,
            learning_rate=0.003,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"first_read is 4; give a whole number .* at most 3"):
        make(digits, first_read=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blurs": 0}, "blurs is 0"),
        ({"batch_size": 1}, "batch_size is 1; give a whole number of at least 2"),
        ({"batch_size": 359}, "batch_size is 359, which leaves one image alone"),
    ],
)
def test_bad_settings_are_named(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        train(make(digits), digits, **settings)


def test_a_layer_that_answers_to_nothing_stops_training(digits):
    network = make(digits)
    network.layers[1].bias.fill_(-100.0)
    with pytest.raises(FloatingPointError, match="layer 2 is dead in epoch 1"):
        train(network, digits, learning_rate=1e-6)
