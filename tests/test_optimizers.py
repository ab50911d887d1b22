"""Adam with moments of 8 bits: beside PyTorch's Adam, in both kinds of network, resumed."""

import copy

import pytest
import torch
from torch import nn

from ff_utils.backprop import Backprop, mlp
from ff_utils.config import FFConfig, TrainConfig
from ff_utils.data import load_dataset
from ff_utils.ff.network import ForwardForward
from ff_utils.memory import measure
from ff_utils.offload import OffloadedBackprop
from ff_utils.optimizers import TORCH_OPTIMIZERS, Adam8bit, moments_8bit, update_8bit
from ff_utils.training import fit


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def regression(optimizer, steps):
    """Weights (40, 30) fitted to noisy products of others, and their mean squared error."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 30, generator=generator)
    targets = inputs @ torch.randn(30, 40, generator=generator)
    targets += torch.randn(500, 40, generator=generator)
    layer = nn.Linear(30, 40, bias=False)
    nn.init.zeros_(layer.weight)
    step = TORCH_OPTIMIZERS[optimizer](layer.parameters(), lr=0.01)
    for _ in range(steps):
        step.zero_grad()
        loss = nn.functional.mse_loss(layer(inputs), targets)
        loss.backward()
        step.step()
    return layer.weight.detach(), float(loss.detach())


def test_300_steps_end_within_five_percent_of_adams_weights_and_error():
    weights, error = regression("adam", 300)
    close, close_error = regression("adam_8bit", 300)
    assert (close - weights).norm() < 0.05 * weights.norm()
    assert close_error == pytest.approx(error, rel=0.05)


def test_moments_are_stored_within_a_step_of_their_code():
    p, gradient = torch.zeros(1000), torch.logspace(-4, 0, 1000)
    gradient[::2] *= -1
    state = moments_8bit(p)
    update_8bit(p, gradient, state, 0.001)
    first = state["first_moment"].float()
    first = (first * first.abs() * state["first_scale"]).view(-1)[:1000]
    second = (state["second_moment"].float() ** 4 * state["second_scale"]).view(-1)[:1000]
    scale = (0.1 * gradient).abs().max()
    assert ((first - 0.1 * gradient).abs() <= scale / 127).all()
    root = (0.001 * gradient.square()).sqrt()
    assert ((second.sqrt() - root).abs() <= root.max() / 255).all()
    # The first step of Adam is the learning rate, whatever the gradient.
    assert torch.allclose(p, -0.001 * gradient.sign(), rtol=0.01)
    assert sum(tensor.nbytes for tensor in state.values()) < 2.1 * 1024


def test_vanishing_gradients_leave_finite_small_steps():
    p = torch.ones(300)
    state = moments_8bit(p)
    for gradient in (torch.ones(300), torch.zeros(300), torch.full((300,), 1e-30)):
        for _ in range(200):
            update_8bit(p, gradient, state, 0.001)
    assert p.isfinite().all() and (p - 1).abs().max() < 0.3


@pytest.mark.parametrize("network", ["ff", "backprop"])
def test_networks_learn_the_digits_nearly_as_with_adam(network, digits):
    config = TrainConfig(epochs=4, batch_size=50, learning_rate=0.003)
    errors = {}
    for optimizer in ("adam", "adam_8bit"):
        if network == "ff":
            choices = FFConfig(label_scale=4.0, threshold=1.0, sharpness=30.0, optimizer=optimizer)
            trained = ForwardForward(digits.pixels, digits.classes, [100, 100], choices)
        else:
            layers = mlp(digits.pixels, digits.classes, [100, 100])
            trained = Backprop(layers, optimizer=optimizer, optimizer_in_backward=True)
        errors[optimizer] = fit(trained, digits, config, quiet=True).error.iloc[-1]
    assert errors["adam_8bit"] < errors["adam"] + 0.02 and errors["adam"] < 0.12


def test_state_dict_resumes_the_same_bits():
    def steps(network, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            network(torch.rand(20, 30, generator=generator)).square().sum().backward()
            optimizer.step()

    network = mlp(30, 10, [40]).to(torch.bfloat16).float()
    optimizer = Adam8bit(network.parameters())
    steps(network, optimizer, range(3))
    again = copy.deepcopy(network)
    resumed = Adam8bit(again.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((network, optimizer), (again, resumed)):
        steps(one, other, range(3, 6))
    for p, q in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, tensor in optimizer.state[p].items():
            other = resumed.state[q][name]
            assert tensor.dtype == other.dtype and torch.equal(tensor, other)


def test_ff_network_with_8_bits_resumes_from_its_state_dict():
    config = FFConfig(classifier=False, optimizer="adam_8bit")
    first, second = (ForwardForward(30, 4, [20, 20], config) for _ in range(2))
    first.step(torch.rand(20, 30), 10, 0.01)
    second.load_state_dict(first.state_dict())
    h = torch.rand(20, 30)
    for network in (first, second):
        network.step(h.clone(), 10, 0.01)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_temporaries_stay_a_few_megabytes_and_moments_a_quarter():
    eight, whole, none = (
        measure("ff_resident", depth=2, hidden=3000, batch=500, optimizer=optimizer)
        for optimizer in ("adam_8bit", "adam", "sgd")
    )
    ratio = eight.breakdown["optimizer_state"] / whole.breakdown["optimizer_state"]
    assert ratio == pytest.approx((1 + 4 / 256) / 4, rel=0.01)
    extra = eight.peak_bytes - none.peak_bytes - eight.breakdown["optimizer_state"]
    assert extra < 8e6


def test_what_8_bits_cannot_do_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="can't be offloaded: take 'adam' or 'sgd'"):
        OffloadedBackprop(30, 10, [20], optimizer="adam_8bit")
    p = torch.zeros(4, 6).t()
    with pytest.raises(ValueError, match="needs contiguous parameters: take 'adam'"):
        update_8bit(p, p.clone(), moments_8bit(p), 0.1)
