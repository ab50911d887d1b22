import pytest
import torch
from torch import nn

from ff_utils.backprop import Backprop, cnn, local_mlp, mlp, segment_sizes, split_segments
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
    assert backprop.moved == 2 * 3 * activation + 3 * logits + 2 * (8 * 50 + 4)
    assert Backprop(mlp(30, 10, [40])).moved == 0


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 9, 10])
@pytest.mark.parametrize("normalised", [False, True])
def test_segments_hold_every_module_once_and_the_classifier_last(depth, normalised):
    network = mlp(6, 3, [5] * depth, normalised=normalised)
    segments = split_segments(network)
    assert [module for segment in segments for module in segment] == list(network)
    linear = [sum(isinstance(m, nn.Linear) for m in segment) for segment in segments]
    linear[-1] -= 1
    assert linear == segment_sizes(depth) and max(linear) ** 2 < depth + 2 * max(linear)
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


@pytest.mark.parametrize("gain", [4, 0])
def test_local_network_is_a_masked_dense_one(gain, monkeypatch):
    monkeypatch.setattr(local, "SHARED_GAIN", gain)
    network = local_mlp((2, 5, 6), 7, [(3, 1, 4), (3, 2, 5)], padded=True, seed=1).double()
    first, second = network[0], network[2]
    assert first.fields.overlap == second.fields.overlap == (gain == 0)
    x = torch.rand(8, 60, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    dense, masks = [], []
    for layer, grid in ((first, (5, 6)), (second, (3, 3))):
        seen, channels = layer.fields.seen, layer.weight.shape[1]
        assert len(seen) == grid[0] * grid[1]
        whole = torch.zeros(len(seen), channels, 61 if layer is first else 121).double()
        index = seen.where(seen >= 0, whole.shape[2] - 1)[:, None].expand(layer.weight.shape)
        whole.scatter_(2, index, layer.weight.detach())
        dense.append(whole[..., :-1].flatten(0, 1).clone().requires_grad_())
        masks.append((seen >= 0)[:, None].expand(layer.weight.shape))
    h = torch.relu(twin @ dense[0].t() + first.bias)
    h = torch.relu(h @ dense[1].t() + second.bias)
    labels = torch.arange(8) % 7
    expected = nn.functional.cross_entropy(network[4](h), labels)
    loss = nn.functional.cross_entropy(network(x), labels)
    torch.testing.assert_close(loss, expected)
    torch.autograd.backward([loss, expected])
    torch.testing.assert_close(x.grad, twin.grad)
    for layer, whole, mask in zip((first, second), dense, masks, strict=True):
        grad = whole.grad.view(*layer.weight.shape[:2], -1)
        index = layer.fields.seen.clamp(min=0)[:, None].expand(layer.weight.shape)
        torch.testing.assert_close(layer.weight.grad, grad.gather(2, index) * mask)


def test_backprop_refuses_bad_settings():
    network = mlp(30, 10, [20])
    with pytest.raises(ValueError, match="micro_batches is 0"):
        Backprop(network, micro_batches=0)
    with pytest.raises(ValueError, match="optimizer is 'rms'; choose one of: adam, adam_8bit, sgd"):
        Backprop(network, optimizer="rms")
    with pytest.raises(ValueError, match="hidden is"):
        mlp(30, 10, [])
