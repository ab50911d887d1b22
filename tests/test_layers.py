import itertools
import time

import pytest
import torch

from ff_utils import layers
from ff_utils.layers import FFLayer, LocalSoftmax


def make(inputs=13, outputs=9, **settings):
    settings = {"theta": 0.3, "scale": 2.0, "dtype": torch.float64} | settings
    return FFLayer(inputs, outputs, generator=torch.Generator().manual_seed(1), **settings)


def rows(count=12, inputs=13, normalisation="mean_square", seed=2):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    layers.normalise_(h, normalisation)
    return h


def written_out(name, x, positive):
    """Each loss as its formula says, for autograd to differentiate."""
    p = torch.sigmoid(x)
    return {
        "softplus": -torch.log(p) if positive else -torch.log(1 - p),
        "probabilistic": -torch.log(p + 1e-6) if positive else torch.log(p + 1e-6),
        "linear": -x if positive else x,
    }[name]


@pytest.mark.parametrize(
    ("normalisation", "loss", "positives"),
    list(itertools.product(layers.NORMALISATIONS, layers.LOSSES, [1, 5, 11])),
)
def test_the_analytic_step_is_autograds_to_1e_10(normalisation, loss, positives):
    layer = make(normalisation=normalisation, loss=loss)
    h = rows(normalisation=normalisation)
    weight = layer.weight.clone().requires_grad_()
    bias = layer.bias.clone().requires_grad_()
    y = torch.relu(h @ weight.t() + bias)
    x = layer.scale * (y.square().mean(dim=1) - layer.theta)
    value = (
        written_out(loss, x[:positives], True).mean()
        + written_out(loss, x[positives:], False).mean()
    )
    value.backward()
    taken = []
    layer.optimizer.update = lambda gradients, rate: taken.extend(gradients)
    scratch = torch.full((200,), 7.0, dtype=torch.float64)
    output, found = layer.step(h.clone(), positives, 0.1, scratch)
    assert (taken[0] - weight.grad).abs().max() < 1e-10
    assert (taken[1] - bias.grad).abs().max() < 1e-10
    assert abs(found - value) < 1e-10
    expected = y.detach().clone()
    layers.normalise_(expected, normalisation)
    assert torch.allclose(output, expected)


@pytest.mark.parametrize("normalisation", layers.NORMALISATIONS)
def test_the_pairwise_step_is_autograds_too(normalisation):
    layer = make(normalisation=normalisation, loss="pairwise")
    h = rows(normalisation=normalisation)
    weight = layer.weight.clone().requires_grad_()
    bias = layer.bias.clone().requires_grad_()
    g = layer.scale * torch.relu(h @ weight.t() + bias).square().mean(dim=1)
    value = -torch.log(torch.sigmoid(g[:6] - g[6:])).mean()
    value.backward()
    taken = []
    layer.optimizer.update = lambda gradients, rate: taken.extend(gradients)
    _, found = layer.step(h, 6, 0.1, torch.full((200,), 7.0, dtype=torch.float64))
    assert (taken[0] - weight.grad).abs().max() < 1e-10
    assert (taken[1] - bias.grad).abs().max() < 1e-10
    assert abs(found - value) < 1e-10
    with pytest.raises(ValueError, match="'pairwise' needs whole batches, half of them positive"):
        layer.step(rows(), 5, 0.1, torch.zeros(200, dtype=torch.float64))


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_a_step_is_one_step_of_pytorchs_adam(weight_decay):
    layer = make(weight_decay=weight_decay)
    weight = torch.nn.Parameter(layer.weight.clone())
    bias = torch.nn.Parameter(layer.bias.clone())
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    oracle = kind([weight, bias], lr=0.01, weight_decay=weight_decay)
    scratch = torch.zeros(200, dtype=torch.float64)
    for seed in range(5):
        h = rows(seed=seed)
        y = torch.relu(h @ weight.t() + bias)
        x = layer.scale * (y.square().mean(dim=1) - layer.theta)
        softplus = torch.nn.functional.softplus
        oracle.zero_grad()
        (softplus(-x[:6]).mean() + softplus(x[6:]).mean()).backward()
        oracle.step()
        layer.step(h.clone(), 6, 0.01, scratch)
    assert torch.allclose(layer.weight, weight, atol=1e-12)
    assert torch.allclose(layer.bias, bias, atol=1e-12)


def test_losses_stay_finite_where_exponentials_do_not():
    x = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    for positive in (True, False):
        value, slope = layers.softplus_loss(x, positive)
        assert value.isfinite().all() and slope.isfinite().all()


def test_the_seeds_names_mean_the_same_losses_and_others_are_refused():
    for theirs, ours in layers.SEED_LOSSES.items():
        assert layers.loss_function(theirs) is layers.LOSSES[ours]
    with pytest.raises(ValueError, match="loss is 'hinge'; choose one of: softplus"):
        FFLayer(3, 3, loss="hinge")


def test_the_seeds_probabilistic_loss_teaches_least_where_it_should_most():
    _, near = layers.probabilistic_loss(torch.tensor(0.0), False)
    _, far = layers.probabilistic_loss(torch.tensor(20.0), False)
    assert far < 1e-6 < near
    assert layers.softplus_loss(torch.tensor(20.0), False)[1] > 0.99


@pytest.mark.parametrize(("kind", "size"), [("length", 1.0), ("mean_square", 5.0)])
def test_normalised_rows_have_one_length_and_dead_rows_stay_zero(kind, size):
    y = torch.rand(4, 25, dtype=torch.float64)
    y[2] = 0
    original = y.clone()
    divisor = layers.normalise_(y, kind)
    lengths = y.norm(dim=1)
    assert torch.allclose(lengths[[0, 1, 3]], torch.tensor(size, dtype=torch.float64))
    assert lengths[2] == 0
    assert torch.allclose(y * divisor[:, None], original)


def test_dead_layers_change_nothing_and_make_no_nan():
    layer = make()
    layer.bias.fill_(-1e3)
    before = layer.weight.clone()
    output, loss = layer.step(rows(), 6, 0.01, torch.zeros(200, dtype=torch.float64))
    assert loss.isfinite() and output.abs().max() == 0
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("normalisation", layers.NORMALISATIONS)
def test_the_local_softmax_learns_as_autograd_would(normalisation):
    softmax = LocalSoftmax([4, 6], 3, normalisation, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    activations = [torch.randn(8, w, generator=generator, dtype=torch.float64) for w in (4, 6)]
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    linear = torch.nn.Linear(10, 3, dtype=torch.float64)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    oracle = torch.optim.Adam(linear.parameters(), lr=0.05)
    gains = [2.0, 6**0.5] if normalisation == "length" else [1.0, 1.0]
    joined = torch.cat([g * h for g, h in zip(gains, activations, strict=True)], dim=1)
    for _ in range(4):
        oracle.zero_grad()
        expected = torch.nn.functional.cross_entropy(linear(joined), labels)
        expected.backward()
        oracle.step()
        found = softmax.step(activations, softmax(activations), labels, 0.05)
        assert abs(found - expected) < 1e-10
    assert torch.allclose(softmax.weight, linear.weight, atol=1e-10)
    assert torch.allclose(softmax.bias, linear.bias, atol=1e-10)


def test_state_is_saved_with_the_layer():
    layer = make()
    layer.step(rows(), 6, 0.01, torch.zeros(200, dtype=torch.float64))
    twin = make()
    twin.load_state_dict(layer.state_dict())
    for one in (layer, twin):
        one.step(rows(seed=5), 6, 0.01, torch.zeros(200, dtype=torch.float64))
    assert torch.equal(layer.weight, twin.weight)


@pytest.mark.parametrize(("inputs", "outputs"), [(13, 9), (9, 9)])
@pytest.mark.parametrize("micro_batches", [2, 5, 12])
def test_micro_batches_learn_what_the_batch_learns(inputs, outputs, micro_batches):
    one, other = make(inputs=inputs, outputs=outputs), make(inputs=inputs, outputs=outputs)
    scratch = torch.zeros(200, dtype=torch.float64)
    for seed in range(3):
        h = rows(inputs=inputs, seed=seed)
        output, loss = one.step(h.clone(), 5, 0.01, scratch)
        found, found_loss = other.step(h.clone(), 5, 0.01, scratch, micro_batches)
        assert torch.allclose(found, output, atol=1e-12)
        assert torch.allclose(found_loss, loss, atol=1e-12)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], tensor, atol=1e-10), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_plain_descent_follows_autograds_gradient(weight_decay):
    settings = {"optimizer": "sgd", "theta": 0.3, "weight_decay": weight_decay}
    layer = FFLayer(13, 9, **settings, dtype=torch.float64)
    h, before = rows(), layer.weight.clone().requires_grad_()
    y = torch.relu(h @ before.t() + layer.bias)
    x = y.square().mean(dim=1) - 0.3
    softplus = torch.nn.functional.softplus
    (softplus(-x[:6]).mean() + softplus(x[6:]).mean()).backward()
    layer.step(h.clone(), 6, 0.1, torch.zeros(200, dtype=torch.float64))
    kept = before.detach() * (1 - 0.1 * weight_decay)
    assert torch.allclose(layer.weight, kept - 0.1 * before.grad, atol=1e-12)


def test_the_analytic_step_is_not_slower_than_autograds():
    layer = FFLayer(1000, 1000)
    twin = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.Adam(twin.parameters(), fused=True)
    scratch, h = torch.zeros(1_000_000), torch.rand(2000, 1000)

    def by_autograd():
        y = twin(h).relu()
        x = y.square().mean(dim=1) - 2
        softplus = torch.nn.functional.softplus
        (softplus(-x[:1000]).mean() + softplus(x[1000:]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            return y / y.norm(dim=1, keepdim=True)

    seconds = {"analytic": [], "autograd": []}
    for _ in range(7):
        for name, run in (
            ("analytic", lambda: layer.step(h.clone(), 1000, 1e-3, scratch)),
            ("autograd", by_autograd),
        ):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    assert min(seconds["analytic"]) < min(seconds["autograd"])
