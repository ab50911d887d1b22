import pytest
import torch

from ff_utils import training
from ff_utils.networks import backprop_network
from ff_utils.remedies import Backprop

REMEDIES = [
    {"checkpoint": True},
    {"optimizer_in_backward": True},
    {"offload": True},
    {"checkpoint": True, "offload": True, "optimizer_in_backward": True},
]
SPLIT = [{"micro_batches": 3}, {**REMEDIES[3], "micro_batches": 3}]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(50, 30, generator=generator)
    return images, torch.randint(10, (50,), generator=generator)


def trained(**remedies):
    network = backprop_network(30, 10, [40, 20, 30, 40, 20])
    if remedies:
        step = Backprop(network, **remedies).step
    else:
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
        step = lambda *given: training.backprop_step(network, optimizer, *given)  # noqa: E731
    losses = [float(step(*batch(seed))) for seed in range(4)]
    assert all(p.grad is None for p in network.parameters())
    return torch.cat([p.detach().flatten() for p in network.parameters()]), losses


@pytest.mark.parametrize("remedies", REMEDIES, ids=str)
def test_each_remedy_learns_what_plain_backprop_learns(remedies):
    (weights, losses), (expected, expected_losses) = trained(**remedies), trained()
    assert torch.equal(weights, expected)
    assert losses == pytest.approx(expected_losses, rel=1e-6)


@pytest.mark.parametrize("remedies", SPLIT, ids=str)
def test_micro_batches_learn_it_but_for_rounding(remedies):
    (weights, losses), (expected, expected_losses) = trained(**remedies), trained()
    assert torch.allclose(weights, expected, atol=1e-6)
    assert losses == pytest.approx(expected_losses, rel=1e-5)


def test_offload_moves_each_activation_out_once_and_leaves_weights():
    network = backprop_network(30, 10, [40, 40])
    backprop = Backprop(network, offload=True)
    backprop.step(*batch(0))
    activation, logits = 4 * 50 * 40, 4 * 50 * 10
    # Out once; back for ReLU and again for the layer above it. So does the log softmax, and the
    # labels (int64) travel both ways with the mean's weight.
    assert backprop.moved == 2 * 3 * activation + 3 * logits + 2 * (8 * 50 + 4)


def test_bad_settings_are_refused():
    network = backprop_network(30, 10, [20])
    with pytest.raises(ValueError, match="micro_batches is 0"):
        Backprop(network, micro_batches=0)
    with pytest.raises(ValueError, match="optimizer is 'rms'; choose one of: adam, sgd"):
        Backprop(network, optimizer="rms")
