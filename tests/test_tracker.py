"""The tracker counts what is live: PyTorch's own tracker, and sums by hand, are its oracles."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from ff_utils.memory import MemoryTracker, Sizes, build, measure, timeline, track_step
from ff_utils.utils import HOST, allocation_category


@pytest.mark.parametrize(("depth", "fake"), [(2, True), (7, True), (3, False)])
def test_tracker_counts_what_pytorchs_own_tracker_counts(depth, fake):
    with FakeTensorMode() if fake else nullcontext():
        step = build("backprop", Sizes(depth, 200, 300))
        step.train()
        oracle = MemTracker()
        oracle.track_external(step.network, *step.optimizers, *step.inputs)
        with oracle:
            step.train()
    (snapshot,) = oracle.get_tracker_snapshot("peak").values()
    instrument = "simulated" if fake else "tracked"
    report = measure("backprop", depth=depth, hidden=200, batch=300, instrument=instrument)
    assert report.peak_bytes == snapshot["Total"]


def test_tracker_counts_a_storage_once_until_it_is_freed():
    with MemoryTracker() as tracker:
        a = torch.zeros(1000)
        views = [a[:10], a.view(10, 100).t()]
        assert tracker.live["activations"] == 4000
        b = a + 1
        assert tracker.live["activations"] == 8000
        del a, views
        assert tracker.live["activations"] == 4000
        del b
    assert sum(tracker.live.values()) == 0 and tracker.peak_bytes == 8000


def test_tracker_keeps_host_bytes_out_of_the_peak():
    with MemoryTracker() as tracker:
        with allocation_category(HOST):
            kept = torch.zeros(500)
        with allocation_category("inputs"):
            batch = torch.zeros(100)
    assert tracker.live[HOST] == tracker.peak_host_bytes == kept.nbytes
    assert tracker.peak_bytes == tracker.peak["inputs"] == batch.nbytes


def test_tracker_restarts_from_what_is_live():
    with MemoryTracker() as tracker:
        a = torch.zeros(1000)
        del a
        b = torch.zeros(10)
        tracker.restart()
        assert tracker.peak_bytes == b.nbytes and tracker.timeline == []


def test_tracked_step_tells_parameters_state_gradients_and_temporaries_apart():
    network = nn.Linear(100, 50)
    optimizer = torch.optim.Adam(network.parameters(), foreach=False)
    images = torch.rand(20, 100)

    def step():
        optimizer.zero_grad()
        network(images).pow(2).sum().backward()
        optimizer.step()

    tracker = track_step(step, network, inputs=[images], optimizers=[optimizer])
    weights = 4 * (100 * 50 + 50)
    assert tracker.live["parameters"] == tracker.live["gradients"] == weights
    assert tracker.live["optimizer_state"] == 2 * weights + 2 * 4
    assert tracker.live["inputs"] == images.nbytes
    assert tracker.live["activations"] == tracker.live["temporaries"] == 0


def test_tracker_finds_the_buffers_of_a_network_by_itself():
    step = build("ff_local", Sizes(2, 50, 40))
    tracker = step.track()
    network = step.network
    indices = [
        b for name, b in network.named_buffers() if name.endswith(("read", "beyond", "places"))
    ]
    weights = sum(p.nbytes for p in network.parameters())
    assert indices and tracker.live["parameters"] == weights + sum(b.nbytes for b in indices)
    assert tracker.live["gradients"] == network.grad_buffer.nbytes
    assert tracker.live["optimizer_state"] == 2 * weights + 2 * 2 * 4  # two step counts a layer


def test_timeline_ends_where_it_began_and_holds_the_peak():
    sizes = {"depth": 3, "hidden": 100, "batch": 500}
    live = [sum(sizes.values()) for _, sizes in timeline("ff_resident", **sizes)]
    report = measure("ff_resident", **sizes)
    assert max(live) == report.peak_bytes
    kept = ("parameters", "optimizer_state", "gradients", "inputs")
    assert min(live) >= sum(report.breakdown[name] for name in kept)
