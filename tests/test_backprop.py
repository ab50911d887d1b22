import math

import pytest
import torch
from torch import nn

from ff_utils.backprop import Backprop, cnn, local_mlp, mlp, split_segments
from ff_utils.ff import local

REMEDIES = [
    {"checkpoint": "segments"},
    {"optimizer_in_backward": True},
    {"offload": True},
    {"checkpoint": "segments", "offload": True, "optimizer_in_backward": True},
]
REMEDIES += [{"micro_batches": 3}, {**REMEDIES[3], "micro_batches": 3}]
REMEDIES += [{**REMEDIES[1], "checkpoint": kind} for kind in ("segments", "halves", "all")]
REMEDIES += [{"checkpoint": "segments", "micro_batches": 3}]
HIDDEN = [40, 20, 30, 40, 20]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(50, 30, generator=generator)
    return images, torch.randint(10, (50,), generator=generator)


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def trained(**remedies):
    backprop = Backprop(mlp(30, 10, HIDDEN), **remedies)
    losses = [float(backprop.step(*batch(seed))) for seed in range(4)]
    assert all(p.grad is None for p in backprop.parameters())
    return weights_of(backprop), losses


@pytest.fixture(scope="module")
def by_autograd():
    """Weights and losses of the mean cross-entropy's own gradients and one Adam."""
    network, losses = mlp(30, 10, HIDDEN), []
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for seed in range(4):
        images, labels = batch(seed)
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return weights_of(network), losses


@pytest.mark.parametrize("remedies", [{}, *REMEDIES], ids=str)
def test_backprop_with_any_remedy_learns_what_autograd_does(remedies, by_autograd):
    weights, losses = trained(**remedies)
    if "micro_batches" in remedies:  # the same but for rounding
        assert torch.allclose(weights, by_autograd[0], atol=1e-6)
    else:
        assert torch.equal(weights, by_autograd[0])
    assert losses == pytest.approx(by_autograd[1], rel=1e-5)


def test_offload_moves_each_activation_out_once_and_leaves_weights():
    backprop = Backprop(mlp(30, 10, [40, 40]), offload=True)
    backprop.step(*batch(0))
    activation, logits = 4 * 50 * 40, 4 * 50 * 10
    # Out once; back for ReLU and again for the layer above it. So does the log softmax, and the
    # labels (int64) travel both ways with the mean's weight.
    assert backprop.host.moved == 2 * 3 * activation + 3 * logits + 2 * (8 * 50 + 4)


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 9, 10])
@pytest.mark.parametrize("normalised", [False, True])
def test_segments_hold_every_module_once_and_the_classifier_last(depth, normalised):
    network = mlp(6, 3, [5] * depth, normalised=normalised)
    segments = split_segments(network)
    assert [module for segment in segments for module in segment] == list(network)
    linear = [sum(isinstance(m, nn.Linear) for m in segment) for segment in segments]
    linear[-1] -= 1
    assert linear[:-1] == linear[:1] * (len(linear) - 1) and linear[-1] <= linear[0]
    assert linear[0] == math.ceil(math.sqrt(depth))
    assert all(isinstance(segment[0], nn.Linear) for segment in segments)


def test_mlp_is_linear_and_relu_with_the_seeds_normalisation_between_on_demand():
    plain = mlp(20, 4, [8, 6])
    assert [type(m).__name__ for m in plain] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    normalised = mlp(20, 4, [8, 6], normalised=True)
    assert [type(m).__name__ for m in normalised][2] == "RowNormalisation"
    assert torch.allclose(normalised[2](torch.rand(3, 8)).norm(dim=1), torch.ones(3))


def test_mlp_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    mlp(20, 4, [8], seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_cnn_halves_the_image_in_each_block_and_classifies_what_is_left():
    network = cnn((3, 13, 8), 7, [4, 5], seed=1)
    shapes, x = [], torch.rand(2, 3 * 13 * 8)
    for module in network:
        x = module(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(3, 13, 8), (4, 6, 4), (5, 3, 2), (7,)]
    assert torch.equal(network[1][0].weight, cnn((3, 13, 8), 7, [4, 5], seed=1)[1][0].weight)
    for shape in ((28, 28), (3, 8, 3)):
        with pytest.raises(ValueError, match="do not fit 2 blocks"):
            cnn(shape, 10, [4, 5])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gain", [4, 0])
def test_local_network_is_a_masked_dense_one(gain, padded, monkeypatch):
    monkeypatch.setattr(local, "SHARED_GAIN", gain)
    network = local_mlp((2, 5, 6), 7, [(3, 1, 4), (3, 2, 5)], padded=padded, seed=1).double()
    x = torch.rand(8, 60, dtype=torch.float64)
    dense = nn.Sequential(*network)  # each local layer as a dense one, found by asking it
    for number in (0, 2):
        layer = network[number]
        width = (60, len(network[0].bias))[number // 2]
        assert layer.fields.overlap == (gain == 0)
        dense[number] = nn.Linear(width, len(layer.bias)).double()
        with torch.no_grad():
            whole = layer(torch.eye(width).double()) - layer.bias
            dense[number].weight.copy_(whole.t())
            dense[number].bias.copy_(layer.bias)
    labels = torch.arange(8) % 7
    for one in (network, dense):
        nn.functional.cross_entropy(one(x), labels).backward(inputs=list(one[0].parameters()))
    torch.testing.assert_close(network(x), dense(x))
    layer, mask = network[0], (dense[0].weight != 0).double()
    torch.testing.assert_close(layer.bias.grad, dense[0].bias.grad)
    found, expected = layer.weight.grad.sum((1, 2)), (dense[0].weight.grad * mask)
    torch.testing.assert_close(found, expected.view(len(found), -1).sum(1))
    unseen = layer.weight.grad[layer.fields.beyond.expand_as(layer.weight)] if padded else x[:0]
    assert unseen.abs().sum() == 0


def test_backprop_refuses_bad_settings():
    network = mlp(30, 10, [20])
    with pytest.raises(ValueError, match="micro_batches is 0"):
        Backprop(network, micro_batches=0)
    with pytest.raises(ValueError, match="optimizer is 'rms'; choose one of: adam, adam_8bit, sgd"):
        Backprop(network, optimizer="rms")
    with pytest.raises(ValueError, match="hidden is"):
        mlp(30, 10, [])
