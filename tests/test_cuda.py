"""What only a GPU can show."""

import pytest
import torch

from ff_utils import config, memory
from ff_utils.ff.network import ForwardForward
from ff_utils.memory import ARMS, Sizes
from ff_utils.memory.gpu import measure_here
from ff_utils.offload import OffloadedForwardForward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HIDDEN = [1024, 768, 1024, 1024, 512, 1024]
CHOICES = config.FFConfig(threshold=1.0, sharpness=30.0, seed=5)


def networks(**offloaded):
    in_memory = ForwardForward(784, 10, HIDDEN, CHOICES, device="cuda")
    return in_memory, OffloadedForwardForward(784, 10, HIDDEN, CHOICES, device="cuda", **offloaded)


def assert_equal_weights(in_memory, offloaded):
    found = offloaded.state_dict()
    for name, tensor in in_memory.state_dict().items():
        assert torch.allclose(found[name], tensor.cpu(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("ahead", [0, 1])
def test_offloaded_network_learns_what_one_in_memory_learns(ahead):
    in_memory, offloaded = networks(ahead=ahead)
    h = in_memory.encode(torch.rand(512, 784, device="cuda"), torch.zeros(512).long().cuda())
    for _ in range(10):  # not waited for in between, so that copies and steps overlap
        in_memory.step(h.clone(), 256, 0.003)
        offloaded.step(h.clone(), 256, 0.003)
    assert_equal_weights(in_memory, offloaded)


def test_offloaded_parts_and_cached_activations_learn_the_same():
    in_memory, offloaded = networks()
    images = torch.rand(512, 784, device="cuda")
    labels = torch.arange(512, device="cuda") % 10
    h = in_memory.encode(images, labels)
    for _ in range(3):
        in_memory.step(h.clone(), 256, 0.003)
        offloaded.step_in_parts(h, 256, 0.003, 8)
    for network in (in_memory, offloaded):
        generator = torch.Generator().manual_seed(0)
        course = config.TrainConfig(negatives="random")
        for _ in range(3):
            network.train_batch(config.Batch(images, labels, 0.003, generator, course))
    assert_equal_weights(in_memory, offloaded)


@pytest.mark.parametrize("arm", ARMS)
def test_arm_asks_the_allocator_for_what_is_simulated(arm):
    found = measure_here(arm, Sizes(5, 1024, 3000, device="cuda"))
    assert not found.get("error")
    simulated = memory.measure(arm, depth=5, hidden=1024, batch=3000)
    tensors = found["requested_bytes"] - found["workspace_bytes"]
    assert tensors == pytest.approx(simulated.peak_bytes, rel=0.02)
    assert found["moved_bytes"] == simulated.moved_bytes


def test_fresh_process_measures_what_this_one_does():
    report = memory.measure("ff_streamed", depth=4, hidden=1024, batch=1000, instrument="cuda")
    here = measure_here("ff_streamed", Sizes(4, 1024, 1000, device="cuda"))
    assert report.peak_bytes == pytest.approx(here["peak_bytes"], rel=0.01)
    assert report.step_seconds > 0


def test_offloaded_peaks_do_not_grow_with_depth():
    few, many = (
        measure_here("ff_streamed", Sizes(depth, 1024, 1000, device="cuda"))["peak_bytes"]
        for depth in (4, 100)
    )
    assert many < 1.01 * few


def test_memory_that_runs_out_is_an_error_and_the_next_point_runs():
    assert "memory" in measure_here("backprop", Sizes(2, 200_000, 100, device="cuda"))["error"]
    assert not measure_here("backprop", Sizes(2, 100, 100, device="cuda")).get("error")
