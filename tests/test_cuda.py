"""What only a GPU can show."""

from dataclasses import replace

import pytest
import torch

from ff_utils import memory, reference, training
from ff_utils.arms import ARMS
from ff_utils.closed_form import Setting
from ff_utils.networks import ForwardForward
from ff_utils.streaming import StreamedForwardForward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HIDDEN = [1024, 768, 1024, 1024, 512, 1024]
SETTINGS = {"theta": 1.0, "scale": 30.0, "seed": 5, "device": "cuda"}


def networks(**streamed):
    resident = ForwardForward(784, 10, HIDDEN, **SETTINGS)
    return resident, StreamedForwardForward(784, 10, HIDDEN, **SETTINGS, **streamed)


def agree(resident, streamed):
    found = streamed.state_dict()
    for name, tensor in resident.state_dict().items():
        assert torch.allclose(found[name], tensor.cpu(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("ahead", [0, 1])
def test_streamed_learns_what_resident_learns(ahead):
    resident, streamed = networks(ahead=ahead)
    h = resident.inputs(torch.rand(512, 784, device="cuda"), torch.zeros(512).long().cuda())
    for _ in range(10):  # not waited for in between, so that copies and steps overlap
        resident.step(h.clone(), 256, 0.003)
        streamed.step(h.clone(), 256, 0.003)
    agree(resident, streamed)


def test_rows_in_parts_and_kept_guesses_learn_the_same():
    resident, streamed = networks()
    images = torch.rand(512, 784, device="cuda")
    labels = torch.arange(512, device="cuda") % 10
    h = resident.inputs(images, labels)
    for _ in range(3):
        resident.step(h.clone(), 256, 0.003)
        streamed.step_in_parts(h, 256, 0.003, 8)
    for network in (resident, streamed):
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            training.forward_forward_step(network, None, images, labels, 0.003, generator, "random")
    agree(resident, streamed)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_and_asks_the_allocator_for_what_is_simulated(arm):
    s = Setting(5, 1024, 3000)
    point = {"kind": "step", "arm": arm, "depth": s.depth, "hidden": s.hidden, "batch": s.batch}
    found = reference.measure(point, "cuda")
    assert not found.get("error")
    simulated = memory.measure(arm, depth=s.depth, hidden=s.hidden, batch=s.batch)
    tensors = found["requested_bytes"] - found["workspace_bytes"]
    assert tensors == pytest.approx(simulated.peak_bytes, rel=0.02)
    assert found["moved_bytes"] == simulated.moved_bytes


def test_streamed_peaks_do_not_grow_with_depth():
    peaks = [
        reference.measure({"kind": "step", "arm": "ff_streamed", **vars(replace(s))}, "cuda")
        for s in (Setting(4, 1024, 1000), Setting(100, 1024, 1000))
    ]
    assert peaks[1]["peak_bytes"] < 1.01 * peaks[0]["peak_bytes"]
