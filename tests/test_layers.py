import itertools

import pytest
import torch
from torch.nn.functional import softplus

from ff_utils.config import NORMALISATIONS, LayerConfig
from ff_utils.ff import layers
from ff_utils.ff.layers import FFLayer, SoftmaxClassifier, split_batch
from ff_utils.utils import time_alternately


def make(in_features=13, out_features=9, **settings):
    config = LayerConfig(**{"threshold": 0.3, "sharpness": 2.0} | settings)
    generator = torch.Generator().manual_seed(1)
    return FFLayer(in_features, out_features, config, generator=generator, dtype=torch.float64)


def rows(count=12, in_features=13, normalisation="mean_square", seed=2):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(count, in_features, generator=generator, dtype=torch.float64)
    layers.normalise_(h, normalisation)
    return h


def scratch():
    return torch.full((200,), 7.0, dtype=torch.float64)


def written_out(name, x, positives):
    """Each loss as its formula says, for autograd to differentiate."""
    p, real, fake = torch.sigmoid(x), slice(None, positives), slice(positives, None)
    if name == "pairwise":
        return -torch.log(torch.sigmoid(x[real] - x[fake])).mean()
    positive, negative = {
        "softplus": (-torch.log(p), -torch.log(1 - p)),
        "probabilistic": (-torch.log(p + 1e-6), torch.log(p + 1e-6)),
        "linear": (-x, x),
    }[name]
    return positive[real].mean() + negative[fake].mean()


def by_autograd(layer, h, positives, loss):
    """Output, loss, and the gradients of weight and bias."""
    weight, bias = (p.clone().requires_grad_() for p in (layer.weight, layer.bias))
    y = torch.relu(h @ weight.t() + bias)
    x = layer.config.sharpness * (y.square().mean(dim=1) - layer.config.threshold)
    value = written_out(loss, x, positives)
    value.backward()
    return y.detach(), value.detach(), [weight.grad, bias.grad]


def catch_gradients(layer):
    caught = []
    layer.optimizer.update = lambda gradients, rate: caught.extend(gradients)
    return caught


CASES = [*itertools.product(["softplus", "probabilistic", "linear"], [1, 5, 11]), ("pairwise", 6)]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize(("loss", "positives"), CASES)
def test_step_has_autograds_gradient_to_1e_10(normalisation, loss, positives):
    layer, h = make(normalisation=normalisation, loss=loss), rows(normalisation=normalisation)
    y, value, gradients = by_autograd(layer, h, positives, loss)
    caught = catch_gradients(layer)
    output, found = layer.step(h.clone(), positives, 0.1, scratch())
    for one, other in zip(caught, gradients, strict=True):
        assert (one - other).abs().max() < 1e-10
    assert abs(found - value) < 1e-10
    layers.normalise_(y, normalisation)
    assert torch.allclose(output, y)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_pairwise_loss_refuses_what_is_not_in_pairs(micro_batches):
    with pytest.raises(ValueError, match="'pairwise' needs a negative row for each positive one"):
        make(loss="pairwise").step(rows(), 5, 0.1, scratch(), micro_batches)


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_adam_is_pytorchs(weight_decay):
    layer = make(weight_decay=weight_decay)
    twin = make(weight_decay=weight_decay)
    parameters = [torch.nn.Parameter(p.clone()) for p in (twin.weight, twin.bias)]
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    oracle = kind(parameters, lr=0.01, weight_decay=weight_decay)
    for seed in range(5):
        h = rows(seed=seed)
        twin.weight.data, twin.bias.data = (p.detach() for p in parameters)
        _, _, gradients = by_autograd(twin, h, 6, "softplus")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        oracle.step()
        layer.step(h.clone(), 6, 0.01, scratch())
    assert torch.allclose(layer.weight, parameters[0], atol=1e-12)
    assert torch.allclose(layer.bias, parameters[1], atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_sgd_follows_autograds_gradient(weight_decay):
    layer = make(optimizer="sgd", weight_decay=weight_decay)
    before = layer.weight.clone()
    _, _, gradients = by_autograd(layer, rows(), 6, "softplus")
    layer.step(rows(), 6, 0.1, scratch())
    expected = before * (1 - 0.1 * weight_decay) - 0.1 * gradients[0]
    assert torch.allclose(layer.weight, expected, atol=1e-12)


def test_goodness_is_the_mean_square_and_the_divisor_tells_it():
    for normalisation in NORMALISATIONS:
        layer, y = make(normalisation=normalisation), torch.rand(5, 9, dtype=torch.float64)
        expected = y.square().mean(dim=1)
        assert torch.allclose(layers.goodness(y), expected)
        assert torch.allclose(layer.goodness_of(layer.normalise_(y)), expected)


def test_softplus_loss_stays_finite_where_exponentials_do_not():
    x = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    for sign in (1.0, -1.0):
        value, slope = layers.softplus_loss(x, sign)
        assert value.isfinite().all() and slope.isfinite().all()


def test_probabilistic_loss_teaches_least_where_it_should_most():
    _, near = layers.probabilistic_loss(torch.tensor(0.0), -1.0)
    _, far = layers.probabilistic_loss(torch.tensor(20.0), -1.0)
    assert far < 1e-6 < near
    assert layers.softplus_loss(torch.tensor(20.0), -1.0)[1] > 0.99


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


def test_dead_layer_changes_nothing_and_makes_no_nan():
    layer = make()
    layer.bias.fill_(-1e3)
    before = layer.weight.clone()
    output, loss = layer.step(rows(), 6, 0.01, scratch())
    assert loss.isfinite() and output.abs().max() == 0
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("first", [1, 2])
def test_classifier_learns_as_autograd_would_from_the_first_layer_it_reads(normalisation, first):
    config = LayerConfig(normalisation=normalisation)
    classifier = SoftmaxClassifier([4, 6], 3, config, first=first, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    activations = [torch.randn(8, w, generator=generator, dtype=torch.float64) for w in (4, 6)]
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    gains = [2.0, 6**0.5] if normalisation == "length" else [1.0, 1.0]
    read = [g * h for g, h in zip(gains, activations, strict=True)][first - 1 :]
    joined = torch.cat(read, dim=1)
    linear = torch.nn.Linear(joined.shape[1], 3, dtype=torch.float64)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    oracle = torch.optim.Adam(linear.parameters(), lr=0.05)
    for _ in range(4):
        oracle.zero_grad()
        expected = torch.nn.functional.cross_entropy(linear(joined), labels)
        expected.backward()
        oracle.step()
        found = classifier.step(activations, classifier(activations), labels, 0.05)
        assert abs(found - expected) < 1e-10
    assert torch.allclose(classifier.weight, linear.weight, atol=1e-10)
    assert torch.allclose(classifier.bias, linear.bias, atol=1e-10)
    with pytest.raises(ValueError, match=r"first_read is 3; give a whole number .* at most 2"):
        SoftmaxClassifier([4, 6], 3, first=3)


def test_confusion_moves_towards_the_mean_prediction_for_each_class():
    classifier = SoftmaxClassifier([4], 3)
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
    classifier.update_confusion(logits, torch.tensor([1, 1, 2]))
    predicted = logits.softmax(dim=1)
    third = torch.full((3,), 1 / 3)
    assert torch.allclose(classifier.confusion[0], third)
    assert torch.allclose(classifier.confusion[1], 0.9 * third + 0.1 * predicted[:2].mean(0))
    assert torch.allclose(classifier.confusion[2], 0.9 * third + 0.1 * predicted[2])


@pytest.mark.parametrize(("positives", "pairs"), [(5, False), (6, True)])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 12])
def test_parts_hold_every_row_once_and_whole_pairs_where_they_must(micro_batches, positives, pairs):
    parts, numbers = split_batch(12, positives, micro_batches, pairs), torch.arange(12)
    held = [numbers[part.rows].tolist() for part in parts]
    assert sorted(itertools.chain(*held)) == numbers.tolist() and len(parts) <= micro_batches
    for part, rows_of_part in zip(parts, held, strict=True):
        assert part.positives == sum(n < positives for n in rows_of_part)
        assert part.counts == (positives, 12 - positives) and part.first == (0 in rows_of_part)
        if pairs:
            real, fake = rows_of_part[: part.positives], rows_of_part[part.positives :]
            assert [n + 6 for n in real] == fake


@pytest.mark.parametrize(("loss", "positives"), [("softplus", 5), ("pairwise", 6)])
@pytest.mark.parametrize("in_features", [13, 9])
@pytest.mark.parametrize("micro_batches", [2, 5, 12])
def test_micro_batches_learn_what_the_batch_learns(in_features, micro_batches, loss, positives):
    one, other = (make(in_features, loss=loss) for _ in range(2))
    for seed in range(3):
        h = rows(in_features=in_features, seed=seed)
        output, value = one.step(h.clone(), positives, 0.01, scratch())
        found = other.step(h.clone(), positives, 0.01, scratch(), micro_batches)
        assert torch.allclose(found[0], output, atol=1e-12)
        assert torch.allclose(found[1], value, atol=1e-12)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], tensor, atol=1e-10), name


def test_step_is_not_slower_than_autograds():
    layer, twin = FFLayer(500, 500), torch.nn.Linear(500, 500)
    optimizer = torch.optim.Adam(twin.parameters(), fused=True)
    grad_buffer, h = torch.zeros(250_000), torch.rand(1000, 500)

    def autograd_step():
        y = twin(h).relu()
        x = y.square().mean(dim=1) - 2
        (softplus(-x[:500]).mean() + softplus(x[500:]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            return y / y.norm(dim=1, keepdim=True)

    def analytic_step():
        return layer.step(h.clone(), 500, 1e-3, grad_buffer)

    tasks = {"analytic": analytic_step, "autograd": autograd_step}
    seconds = time_alternately(tasks, 15, quiet=True)
    assert seconds.analytic.min() < 1.1 * seconds.autograd.min()  # on a machine that is not quiet
