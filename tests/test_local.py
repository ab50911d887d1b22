import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from ff_utils.config import NORMALISATIONS, LocalConfig, TrainConfig
from ff_utils.data import load_dataset
from ff_utils.ff import layers, local
from ff_utils.ff.local import LocalForwardForward
from ff_utils.training import error_rate, fit

SHAPES = {"plain": (7, 9), "colour": (3, 7, 9)}
FIELDS = [(3, 2, 5), (2, 1, 4)]


@pytest.fixture(autouse=True, params=[local.SHARED_GAIN, 0], ids=["own copies", "shared copies"])
def _copies(request, monkeypatch):
    """Every test with a copy of the inputs for each position, and with one for a row of them."""
    monkeypatch.setattr(local, "SHARED_GAIN", request.param)


def make(shape=(3, 7, 9), device="cpu", **settings):
    config = LocalConfig(**{"label_scale": 2.5, "threshold": 0.3, "sharpness": 2.0} | settings)
    return LocalForwardForward(shape, 4, FIELDS, config, device=device, dtype=torch.float64)


def rows(layer, count=12):
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(count, layer.in_features, generator=generator, dtype=torch.float64)
    layers.normalise_(h, "mean_square")
    return h


def dense(layer):
    """The layer's weights (out_features, in_features) as a dense layer has them, zero where it sees
    nothing, found by asking each unit about each input in turn."""
    bias = layer.bias.clone()
    layer.bias.fill_(1e3)  # far above zero, ReLU lets everything through
    weight = (layer(torch.eye(layer.in_features, dtype=torch.float64)) - 1e3).t().contiguous()
    layer.bias.copy_(bias)
    return weight


def numbers_seen(fields):
    """The inputs that each position sees (positions, seen), by asking the fields for them."""
    every = torch.arange(fields.read.max() + 1).view(1, -1)
    read = fields.inputs(every)[..., 0]
    if not fields.overlap:
        return read
    read = read[:, None].expand(-1, fields.wide, -1)
    return read.gather(2, fields.places[:, 0].expand(fields.high, -1, -1)).flatten(0, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_unit_sees_its_field_of_all_channels_and_in_the_first_layer_the_label(shape, padded):
    network = make(shape, padded=padded)
    *planes, height, width = shape
    first, second = (dense(layer) != 0 for layer in network.layers)
    margin = 1 if padded else 0
    high, wide = ((size + 2 * margin - 3) // 2 + 1 for size in (height, width))
    for down, across in itertools.product(range(high), range(wide)):
        image = torch.zeros(*planes, height, width, dtype=bool)
        top, left = 2 * down - margin, 2 * across - margin
        image[..., max(top, 0) : top + 3, max(left, 0) : left + 3] = True
        expected = torch.cat([image.flatten(), torch.ones(4, dtype=bool)])
        for unit in range(5):
            assert torch.equal(first[(down * wide + across) * 5 + unit], expected)
    grid = torch.zeros(high, wide, 5, dtype=bool)
    top = 0 if padded else 1  # of the field in question, at 1, 1
    grid[top : top + 2, top : top + 2] = True
    place = ((wide + 2 * margin - 1) + 1) * 4
    assert torch.equal(second[place], grid.flatten())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_output_is_a_masked_dense_layers(number, padded):
    layer = make(padded=padded).layers[number]
    h = rows(layer)
    assert torch.allclose(layer(h), torch.relu(h @ dense(layer).t() + layer.bias), atol=1e-9)


@pytest.mark.parametrize(
    ("number", "padded", "local", "normalisation", "positives"),
    [
        (0, False, False, "mean_square", 5),
        (1, True, False, "length", 1),
        (0, True, True, "mean_square", 11),
        (1, False, True, "length", 5),
    ],
)
def test_step_has_autograds_gradient_of_a_masked_dense_layer(
    number, padded, local, normalisation, positives
):
    network = make(padded=padded, local_goodness=local, normalisation=normalisation)
    layer = network.layers[number]
    h, weight, bias = rows(layer), dense(layer), layer.bias.clone().requires_grad_()
    mask = weight != 0
    weight.requires_grad_()
    y = torch.relu(h @ (weight * mask).t() + bias)
    units = y.view(len(h), len(layer.weight) if local else 1, -1)
    x = 2.0 * (units.square().mean(dim=2) - 0.3)
    value = softplus(-x[:positives]).mean() + softplus(x[positives:]).mean()
    value.backward()
    caught = []
    layer.optimizer.update = lambda gradients, rate: caught.extend(gradients)
    scratch = torch.full((layer.weight.numel(),), 7.0, dtype=torch.float64)
    output, found = layer.step(h.clone(), positives, 0.1, scratch)
    assert abs(found - value) < 1e-10
    assert (caught[1] - bias.grad).abs().max() < 1e-10
    # The dense gradient of the inputs that each position sees.
    whole = weight.grad.view(*layer.weight.shape[:2], -1)
    seen = whole.gather(2, numbers_seen(layer.fields)[:, None].expand(layer.weight.shape))
    if padded:
        seen = seen.masked_fill(layer.fields.beyond, 0)
    assert (caught[0] - seen).abs().max() < 1e-10
    size = units.norm(dim=2, keepdim=True)
    size = size / units.shape[2] ** 0.5 if normalisation == "mean_square" else size
    assert torch.allclose(output, (units / (size + 1e-300)).flatten(1), atol=1e-6)


def test_weights_beyond_the_edge_are_never_learned():
    layer = make(padded=True).layers[0]
    for _ in range(3):
        layer.step(rows(layer), 6, 0.1, torch.zeros(layer.weight.numel(), dtype=torch.float64))
    beyond = layer.fields.beyond
    assert beyond.any() and layer.weight.masked_select(beyond).abs().max() == 0


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_micro_batches_learn_what_the_batch_learns(micro_batches):
    one, other = make(), make()
    images = torch.rand(8, one.pixels, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    for _ in range(3):
        expected = one.step(one.encode(images, labels), 3, 0.01)
        found = other.step(other.encode(images, labels), 3, 0.01, micro_batches)
        assert torch.allclose(found, expected, atol=1e-12)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], tensor, atol=1e-10), name


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_label_goodness_is_what_trying_every_label_gives(normalisation, local):
    network = make(normalisation=normalisation, local_goodness=local)
    images = torch.rand(5, network.pixels, dtype=torch.float64)
    found = network.label_goodness(images)
    for tried in range(4):
        h = network.encode(images, torch.full((5,), tried))
        for depth, layer in enumerate(network.layers):
            y = layer(h)
            assert torch.allclose(found[depth, :, tried], y.square().mean(dim=1), atol=1e-10)
            h = y.clone()
            layer.normalise_(h)


def test_hintons_networks_have_his_grids():
    fields = ((10, 6, 128), (2, 1, 220), (2, 1, 512))  # for MNIST
    network = LocalForwardForward((28, 28), 10, fields, device="meta")
    assert network.hidden == [16 * 128, 9 * 220, 4 * 512]
    assert [layer.weight.shape for layer in network.layers] == [
        (16, 128, 110), (9, 220, 4 * 128), (4, 512, 4 * 220),
    ]  # fmt: skip
    fields = ((11, 1, 3),) * 2  # for CIFAR-10
    network = LocalForwardForward((3, 32, 32), 10, fields, LocalConfig(padded=True), device="meta")
    assert network.hidden == [3072, 3072]
    assert network.layers[0].weight.shape == (1024, 3, 363 + 10)


@pytest.mark.parametrize(("label", "local"), [("joined", False), ("joined", True), ("none", False)])
def test_it_learns_colour_images_with_labels_and_without(label, local):
    data = load_dataset("colour_digits", 600, 200)
    config = LocalConfig(label=label, label_scale=4.0, threshold=1.0, sharpness=10.0)
    config = replace(config, local_goodness=local)
    network = LocalForwardForward(data.shape, data.classes, [(4, 2, 20), (2, 1, 40)], config)
    train = TrainConfig(epochs=8, batch_size=25, learning_rate=0.01, mask_blurs=1)
    assert fit(network, data, train, quiet=True).error.iloc[-1] < 0.2
    if label == "joined":
        assert error_rate(network, data, "goodness") < 0.3


def test_all_of_it_is_on_its_device_and_the_state_dict_has_what_learns():
    network = make(padded=True, device="meta")
    assert {t.device.type for t in [*network.parameters(), *network.buffers()]} == {"meta"}
    names = set(make(padded=True).state_dict())
    assert {"layers.0.weight", "layers.1.bias_second_moment", "softmax.weight"} <= names
    assert not any("fields" in name or "beyond" in name for name in names)
    assert network.settings["shape"] == [3, 7, 9] and network.settings["padded"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fields": [(9, 1, 3)]}, "the field of layer 1 is 9; give a whole number .* at most 8"),
        ({"fields": [(5, 1, 3), (5, 1, 3)]}, "the field of layer 2 is 5; .* at most 4"),
        ({"fields": [(5, 0, 3)]}, "the stride of layer 1 is 0"),
        ({"fields": [(5, 1, 0)]}, "the channels of layer 1 is 0"),
        ({"fields": [(5, 1)]}, r"layer 1 is \(5, 1\); give field, stride and channels"),
        ({"fields": []}, r"hidden is \[\]; give"),
        ({"label": "pixels"}, "label is 'pixels'; choose one of: joined, none"),
        ({"shape": (8,)}, r"shape is \(8,\); give \(height, width\) or"),
    ],
)
def test_bad_settings_are_named(settings, message):
    sizes, settings = {"shape": (8, 8), "classes": 4, "fields": FIELDS}, dict(settings)
    with pytest.raises(ValueError, match=message):
        sizes |= {name: settings.pop(name) for name in list(settings) if name in sizes}
        LocalForwardForward(**sizes, config=LocalConfig(**settings))
