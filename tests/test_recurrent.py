from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot, softplus

from ff_utils.config import Batch, RecurrentConfig, TrainConfig
from ff_utils.data import load_dataset
from ff_utils.ff.network import PREDICTIONS
from ff_utils.ff.recurrent import RecurrentForwardForward
from ff_utils.memory.tracker import track_step
from ff_utils.training import error_rate, fit

SIZES = [(9,), (8, 6), (8, 5, 7)]
LABELS, WRONG = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 3, 0, 2, 2, 0])
TRAIN = TrainConfig(batch_size=50)


def make(hidden=(8, 6), **settings):
    chosen = {"label_scale": 2.5, "threshold": 1.1, "sharpness": 3.0, "steps": 5}
    config = RecurrentConfig(**chosen | {"optimizer": "sgd"} | settings)
    return RecurrentForwardForward(20, 4, list(hidden), config, dtype=torch.float64)


def images(count=6):
    return torch.rand(count, 20, generator=generator(3), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(h):
    return h / h.square().mean(dim=1, keepdim=True).sqrt()


def label_rows(labels):
    return 2.5 * one_hot(labels, 4).double()


def steps_in_full(network, x, label, steps):
    """Every time step's states before normalisation, written out; inputs detached."""
    below = [network.widths[0], *network.hidden]
    x, states = unit(x), []
    h = x
    for layer, width in zip(network.layers, below, strict=False):
        states.append((h @ layer.weight[:, :width].T + layer.bias).relu().detach())
        h = unit(states[-1])
    damping = network.config.damping
    for _ in range(steps):
        around = [x, *(unit(h) for h in states), label]
        made = []
        for number, layer in enumerate(network.layers):
            both = torch.cat([around[number], around[number + 2]], dim=1)
            y = (both @ layer.weight.T + layer.bias).relu()
            made.append(damping * states[number] + (1 - damping) * y)
        yield made
        states = [h.detach() for h in made]


@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize(
    ("damping", "loss"), [(0.0, "softplus"), (0.3, "softplus"), (0.3, "pairwise")]
)
def test_step_moves_weights_along_the_gradient_of_each_time_steps_own_loss(hidden, damping, loss):
    network = make(hidden, damping=damping, loss=loss)
    parameters = [p for layer in network.layers for p in (layer.weight, layer.bias)]
    before = [p.clone() for p in parameters]
    for p in parameters:
        p.requires_grad_()
    rows, label = images().repeat(2, 1), label_rows(torch.cat([LABELS, WRONG]))
    expected, depth = [0.0] * len(hidden), len(hidden)
    for moment, made in enumerate(steps_in_full(network, rows, label, 5), start=1):
        for number, h in enumerate(made):
            # Before the label has come down to a layer, there is nothing for it to learn.
            if moment >= depth - number:
                x = 3.0 * (h.square().mean(dim=1) - 1.1)
                value = softplus(-x[:6]).mean() + softplus(x[6:]).mean()
                if loss == "pairwise":
                    value = softplus(x[6:] - x[:6]).mean()
                value.backward()
                expected[number] += value.item() / (5 - depth + number + 1)
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    found = network.step(*network.start(images()), LABELS, WRONG, 0.1)
    assert found.tolist() == pytest.approx(expected)
    for p, old, gradient in zip(parameters, before, gradients, strict=True):
        assert gradient.any()
        assert torch.allclose(p, old - 0.1 * gradient, atol=1e-12)


@pytest.mark.parametrize("hidden", SIZES)
def test_label_goodness_is_what_trying_every_label_in_full_gives(hidden):
    network = make(hidden, first=2, last=4)
    found = network.label_goodness(images())
    assert found.shape == (len(hidden), 6, 4)
    for tried in range(4):
        label = label_rows(torch.full((6,), tried))
        made = list(steps_in_full(network, images(), label, 4))[1:]
        for number in range(len(hidden)):
            expected = sum(states[number].square().mean(dim=1) for states in made)
            assert torch.allclose(found[number, :, tried], expected, atol=1e-10)


def test_classifier_reads_the_pass_up_that_no_label_enters():
    network = make()
    network.softmax.weight.uniform_(-1, 1)
    _, _, states = network.start(images())
    h = unit(images())
    for (state, _), layer, width in zip(states, network.layers, (20, 8), strict=True):
        h = unit((h @ layer.weight[:, :width].T + layer.bias).relu())
        assert torch.allclose(state, h, atol=1e-7)
    logits = torch.cat([h for h, _ in states], dim=1) @ network.softmax.weight.T
    assert torch.allclose(network.classify(images()), logits)


def test_everything_is_trained():
    network = make(optimizer="adam")
    before = {name: p.clone() for name, p in network.named_parameters()}
    draws = generator()
    for _ in range(5):
        network.train_batch(Batch(images(), LABELS, 0.01, draws, TRAIN))
    for name, p in network.named_parameters():
        # Of each unit and of each input, but for pixels that are never on and units that are off.
        changed = p != before[name]
        assert changed.double().mean() > 0.6, name
    _, down = network.sides(1, network.layers[1].weight != before["layers.1.weight"])
    assert down.any(dim=0).all()  # every label's


def test_prediction_does_not_depend_on_the_chunk():
    network = make(optimizer="adam")
    network.train_batch(Batch(images(), LABELS, 0.01, generator(), TRAIN))
    for by in PREDICTIONS:
        whole = network.predict(images(), by)
        assert len(whole.unique()) > 1
        assert torch.equal(whole, network.predict(images(), by, rows=2))


def test_time_steps_cost_no_memory():
    peaks, rows = [], torch.rand(40, 20, dtype=torch.float64)
    for steps in (5, 20):
        network, draws, labels = make(steps=steps), generator(), torch.arange(40) % 4

        def step(network=network, draws=draws, labels=labels):
            network.train_batch(Batch(rows, labels, 0.01, draws, TRAIN))

        peaks.append(track_step(step, network, inputs=[rows]).peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(("loss", "most"), [("softplus", 0.15), ("pairwise", 0.08)])
def test_it_learns_digits_by_either_prediction(loss, most):
    digits = load_dataset("digits", 1000, 200)
    config = RecurrentConfig(label_scale=10.0, threshold=1.0, sharpness=30.0, loss=loss)
    network = RecurrentForwardForward(digits.pixels, digits.classes, [60, 60], config)
    train = replace(TRAIN, epochs=10, learning_rate=0.003, decay="none")
    history = fit(network, digits, train, quiet=True)
    assert history.error.iloc[-1] == error_rate(network, digits) < most
    assert error_rate(network, digits, "goodness") < most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": []}, "hidden is"),
        ({"hidden": [5] * 9}, "steps is 8; give a whole number of at least 9"),
        ({"steps": 4}, "last is 5; give a whole number of at least 1 and at most 4"),
        ({"normalisation": "length"}, "normalisation is 'length'; choose one of: mean_square"),
    ],
)
def test_bad_settings_are_named(settings, message):
    hidden = settings.pop("hidden", [5])
    with pytest.raises(ValueError, match=message):
        RecurrentForwardForward(20, 4, hidden, RecurrentConfig(**settings))
