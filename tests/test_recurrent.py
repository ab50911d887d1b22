import pytest
import torch
from torch.nn.functional import softplus

from ff_utils import arms, datasets, memory, networks, training
from ff_utils.recurrent import RecurrentForwardForward, recurrent_step, train_recurrent
from ff_utils.training import prediction_error

SIZES = [(9,), (8, 6), (8, 5, 7)]


def make(hidden=(8, 6), **settings):
    chosen = {"label_scale": 2.5, "theta": 1.1, "scale": 3.0, "steps": 5, "optimizer": "sgd"}
    chosen |= {"dtype": torch.float64} | settings
    return RecurrentForwardForward(20, 4, list(hidden), **chosen)


def images(count=6):
    return torch.rand(count, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


LABELS, WRONG = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 3, 0, 2, 2, 0])


def unit(h):
    return h / h.square().mean(dim=1, keepdim=True).sqrt()


def steps_in_full(network, x, label, steps):
    """Every time step's states before normalisation, written out; inputs detached."""
    below = [network.widths[0], *network.hidden]
    x, states = unit(x), []
    h = x
    for layer, width in zip(network.layers, below, strict=False):
        states.append((h @ layer.weight[:, :width].T + layer.bias).relu().detach())
        h = unit(states[-1])
    for _ in range(steps):
        around = [x, *(unit(h) for h in states), label]
        made = []
        for number, layer in enumerate(network.layers):
            both = torch.cat([around[number], around[number + 2]], dim=1)
            y = (both @ layer.weight.T + layer.bias).relu()
            made.append(network.damping * states[number] + (1 - network.damping) * y)
        yield made
        states = [h.detach() for h in made]


def one_hot(labels, scale=2.5):
    return scale * torch.nn.functional.one_hot(labels, 4).double()


@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize(
    ("damping", "loss"), [(0.0, "softplus"), (0.3, "softplus"), (0.3, "pairwise")]
)
def test_a_batch_moves_every_weight_along_the_gradient_of_each_time_steps_own_loss(
    hidden, damping, loss
):
    network = make(hidden, damping=damping, loss=loss)
    parameters = [p for layer in network.layers for p in (layer.weight, layer.bias)]
    before = [p.clone() for p in parameters]
    for p in parameters:
        p.requires_grad_()
    rows, label = images().repeat(2, 1), one_hot(torch.cat([LABELS, WRONG]))
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
        label = one_hot(torch.full((6,), tried))
        made = list(steps_in_full(network, images(), label, 4))[1:]
        for number in range(len(hidden)):
            expected = sum(states[number].square().mean(dim=1) for states in made)
            assert torch.allclose(found[number, :, tried], expected, atol=1e-10)


def test_the_guess_reads_the_pass_up_that_no_label_enters():
    network = make()
    network.softmax.weight.uniform_(-1, 1)
    states = next(steps_in_full(network, images(), one_hot(LABELS), 1))
    assert len(states) == 2
    _, _, started = network.start(images())
    h = unit(images())
    for (state, _), layer, width in zip(started, network.layers, (20, 8), strict=True):
        h = unit((h @ layer.weight[:, :width].T + layer.bias).relu())
        assert torch.allclose(state, h, atol=1e-7)
    logits = torch.cat([h for h, _ in started], dim=1) @ network.softmax.weight.T
    assert torch.allclose(network.guess(images()), logits)


def test_training_reads_images_it_leaves_alone():
    network, given = make(), images()
    generator = torch.Generator().manual_seed(0)
    recurrent_step(network, given, LABELS, 0.1, generator)
    assert torch.equal(given, images())


def test_everything_is_trained():
    network = make(optimizer="adam")
    before = {name: p.clone() for name, p in network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        recurrent_step(network, images(), LABELS, 0.01, generator)
    for name, p in network.named_parameters():
        # Of each unit and of each input, but for pixels that are never on and units that are off.
        changed = p != before[name]
        assert changed.double().mean() > 0.6, name
    _, down = network.sides(1, network.layers[1].weight != before["layers.1.weight"])
    assert down.any(dim=0).all()  # every label's


def test_prediction_does_not_depend_on_the_chunk():
    network = make(optimizer="adam")
    generator = torch.Generator().manual_seed(0)
    recurrent_step(network, images(), LABELS, 0.01, generator)
    for by in networks.PREDICTIONS:
        whole = network.predict(images(), by)
        assert len(whole.unique()) > 1
        assert torch.equal(whole, network.predict(images(), by, rows=2))


def test_time_steps_cost_no_memory():
    peaks, rows = [], torch.rand(40, 20, dtype=torch.float64)
    for steps in (5, 20):
        arm = arms.recurrent_arm(make(steps=steps), rows, torch.zeros(40, dtype=torch.long))
        peaks.append(memory.watch_step(arm).peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def small(data, **settings):
    chosen = {"label_scale": 10.0, "theta": 1.0, "scale": 30.0} | settings
    return RecurrentForwardForward(data.pixels, data.classes, [100, 100], **chosen)


def train(network, data, **course):
    course = {"epochs": 2, "batch_size": 50, "learning_rate": 0.003, "quiet": True} | course
    return train_recurrent(network, data, **course)


@pytest.mark.parametrize(("loss", "most"), [("softplus", 0.1), ("pairwise", 0.03)])
def test_it_learns_digits_by_either_prediction(digits, loss, most):
    network = small(digits, loss=loss)
    history = train(network, digits, epochs=10)
    assert history.error.iloc[-1] == prediction_error(network, digits, "softmax") < most
    found = prediction_error(network, digits, "goodness")
    assert found == pytest.approx(training.goodness_errors(network, digits)[-1])
    assert found < most
    assert {"loss_1", "loss_2", "softmax_loss", "seconds"} <= set(history)


def test_a_broken_run_resumes_to_the_bits_of_an_unbroken_one(digits, tmp_path):
    whole, resumed, path = small(digits), small(digits), tmp_path / "run.pt"
    expected = train(whole, digits, jitter=1)
    stop_after = iter((None, KeyboardInterrupt()))

    def interrupt():
        if found := next(stop_after):
            raise found
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(small(digits), digits, jitter=1, checkpoint=path, after_epoch=interrupt)
    found = train(resumed, digits, jitter=1, checkpoint=path)
    assert found.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    with pytest.raises(
        ValueError, match=r"of a run whose network is .*'damping': 0.3.*, not .*0.5"
    ):
        train(small(digits, damping=0.5), digits, jitter=1, checkpoint=path)


def test_a_seed_means_the_same_weights():
    one, same, other = (make(seed=s).layers[1].weight for s in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert "gradient" not in make().state_dict()


def test_a_dead_layer_and_a_loss_that_runs_away_stop_training(digits):
    network = small(digits)
    network.layers[1].bias.fill_(-100.0)
    with pytest.raises(FloatingPointError, match="layer 2 is dead in epoch 1, no unit of it"):
        train(network, digits, learning_rate=1e-6)
    network = small(digits)
    network.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layer 1 is nan in epoch 1; lower learning_rate"):
        train(network, digits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": []}, "hidden is"),
        ({"hidden": [5] * 9}, "steps is 8; give a whole number of at least 9"),
        ({"damping": 1}, r"damping is 1; give a number of at least 0 and at most 0.99"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 4}, "last is 5; give a whole number of at least 1 and at most 4"),
        ({"first": 6}, "first is 6; give a whole number of at least 1 and at most 5"),
        ({"label_scale": 0}, "label_scale is 0"),
        ({"weight_decay": 2}, "weight_decay is 2"),
        ({"theta": 0}, "theta is 0"),
        ({"loss": "mse"}, "loss is 'mse'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RecurrentForwardForward(20, 4, **({"hidden": [5]} | settings))
