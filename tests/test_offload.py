import io
import random
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ff_utils import (
    FFConfig,
    ForwardForward,
    OffloadedForwardForward,
    TrainConfig,
    fit,
    fit_greedy_cached,
    goodness_errors,
    load_dataset,
    mlp,
    offload,
)
from ff_utils.config import SCHEDULES
from ff_utils.offload import FileStore, OffloadedBackprop, Slots

HIDDEN = [24, 16, 24, 24]
CONFIG = FFConfig(label_scale=4.0, threshold=1.0, sharpness=30.0, seed=5)
TRAIN = TrainConfig(epochs=2, batch_size=40, learning_rate=0.003)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", 300)


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path):
    return "memory" if request.param == "memory" else tmp_path / "layers"


def equal(one, other):
    state, found = one.state_dict(), other.state_dict()
    return state.keys() == found.keys() and all(torch.equal(state[k], found[k]) for k in state)


def pair(data, store, ahead=1, dtype=torch.float32, **settings):
    """A network in memory and the same one offloaded; settings: of both."""
    sizes, config = (data.pixels, data.classes, HIDDEN), replace(CONFIG, **settings)
    in_memory = ForwardForward(*sizes, config, dtype=dtype)
    kind = {"store": store, "ahead": ahead, "dtype": dtype}
    return in_memory, OffloadedForwardForward(*sizes, config, **kind)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_offloaded_network_learns_the_bits_of_one_in_memory(digits, store, schedule, optimizer):
    in_memory, offloaded = pair(digits, store, optimizer=optimizer)
    assert equal(in_memory, offloaded)
    train = replace(TRAIN, schedule=schedule)
    tables = [fit(network, digits, train, quiet=True) for network in (in_memory, offloaded)]
    assert equal(in_memory, offloaded)
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    assert goodness_errors(in_memory, digits) == goodness_errors(offloaded, digits)
    for by in ("goodness", "softmax"):
        found = [network.predict(digits.test_images, by) for network in (in_memory, offloaded)]
        assert torch.equal(*found)


def test_offloaded_classifier_learns_the_same_from_cached_and_recomputed(digits, store):
    in_memory, recomputed = pair(digits, store, recompute=True)
    cached, offloaded = pair(digits, "memory")
    for network in (in_memory, recomputed, cached, offloaded):
        fit(network, digits, TRAIN, quiet=True)
    assert in_memory.softmax.weight.any()
    assert all(equal(in_memory, other) for other in (recomputed, cached, offloaded))


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_offloaded_step_is_the_same_with_fetching_ahead_and_micro_batches(
    digits, store, ahead, micro_batches
):
    in_memory, offloaded = pair(digits, store, ahead=ahead)
    h = in_memory.encode(digits.train_images[:60], digits.train_labels[:60])
    for _ in range(3):
        expected = in_memory.step(h.clone(), 30, 0.01, micro_batches)
        assert torch.equal(offloaded.step(h.clone(), 30, 0.01, micro_batches), expected)
    assert equal(in_memory, offloaded)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_offloaded_step_in_parts_learns_the_same(digits, store, micro_batches):
    in_memory, offloaded = pair(digits, store, dtype=torch.float64, classifier=False)
    h = in_memory.encode(digits.train_images[:60], digits.train_labels[:60])
    for _ in range(3):
        expected = in_memory.step(h.clone(), 25, 0.01)
        found = offloaded.step_in_parts(h, 25, 0.01, micro_batches)
        assert torch.allclose(found, expected, atol=1e-12)
    state = offloaded.state_dict()
    for name, tensor in in_memory.state_dict().items():
        assert torch.allclose(state[name], tensor, atol=1e-10), name


def test_greedy_training_from_files_is_that_from_memory(digits, store, tmp_path):
    in_memory, offloaded = pair(digits, store)
    train = replace(TRAIN, epochs=15, learning_rate=0.01)
    tables = [
        fit_greedy_cached(network, digits, train, store=kept, quiet=True)
        for network, kept in ((in_memory, "memory"), (offloaded, tmp_path / "kept"))
    ]
    assert equal(in_memory, offloaded)
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    assert not any((tmp_path / "kept").iterdir())  # the cache is gone with its use
    assert list(tables[0].layer) == [layer for layer in (1, 2, 3, 4) for _ in range(15)]
    first = tables[0][tables[0].layer == 1].loss
    assert first.iloc[-1] < first.iloc[0]
    assert goodness_errors(in_memory, digits)[0] < 0.5


def test_offloaded_weights_go_to_and_from_a_network_in_memory(digits, store):
    in_memory, offloaded = pair(digits, store)
    other, _ = pair(digits, "memory", seed=6)
    offloaded.load_state_dict(other.state_dict())
    assert equal(other, offloaded) and not equal(in_memory, offloaded)
    in_memory.load_state_dict(offloaded.state_dict())
    assert equal(in_memory, other)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_offloaded_backprop_learns_what_plain_backprop_learns(store, micro_batches):
    network = mlp(30, 10, HIDDEN, dtype=torch.float64)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    offloaded = OffloadedBackprop(30, 10, HIDDEN, store=store, dtype=torch.float64)
    linears = [module for module in network if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for number, linear in enumerate(linears):
            (layer,) = offloaded.iter_layers([number])
            linear.weight.copy_(layer.weight)
            linear.bias.copy_(layer.bias)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        images = torch.rand(50, 30, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (50,), generator=generator)
        expected = torch.nn.functional.cross_entropy(network(images), labels)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        found = offloaded.step(images, labels, 1e-3, micro_batches)
        assert torch.allclose(found, expected)
        assert torch.allclose(offloaded(images[:7]), network(images[:7]), atol=1e-9)
    for number, linear in enumerate(linears):
        (layer,) = offloaded.iter_layers([number])
        assert torch.allclose(layer.weight, linear.weight, atol=1e-12)
        assert torch.allclose(layer.bias, linear.bias, atol=1e-12)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"short"), Path.unlink])
def test_file_store_refuses_a_layer_cut_short_or_gone(digits, tmp_path, damage):
    _, offloaded = pair(digits, tmp_path)
    damage(tmp_path / "1.weights")
    with pytest.raises(ValueError, match=r"1\.weights is missing or not whole: start again"):
        offloaded.predict(digits.test_images[:5])


def test_file_store_leaves_a_full_folder_alone(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pair(digits, "~/layers")
    with pytest.raises(ValueError, match="layers is not empty: give a new folder"):
        pair(digits, tmp_path / "layers")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file cannot be made .File exists.: give another"):
        pair(digits, tmp_path / "file")


def test_file_store_reads_until_the_tensor_is_full(tmp_path, monkeypatch):
    """One read moves 2 GiB at most: here at most 1,000 bytes."""

    class Slow(io.FileIO):
        def readinto(self, view):
            return super().readinto(view[:1000])

    store, tensor = FileStore(tmp_path / "layers"), torch.rand(5000)
    store.write("x", tensor)
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Slow(path))
    assert torch.equal(store.read("x", torch.empty(5000)), tensor)
    with pytest.raises(ValueError, match="x is missing or not whole"):
        store.read("x", torch.empty(5001))


def test_file_store_on_a_full_disk_is_one_sentence(digits, tmp_path):
    _, offloaded = pair(digits, tmp_path)
    (tmp_path / "2.weights").unlink()
    (tmp_path / "2.weights").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not be written .No space left.*more room"):
        offloaded.slots.store.write("2.weights", torch.rand(5000))


def test_offloaded_network_is_not_moved(digits):
    _, offloaded = pair(digits, "memory")
    with pytest.raises(RuntimeError, match="stays where it was built: give `device` there"):
        offloaded.to(torch.float64)
    with pytest.raises(ValueError, match="ahead is 2; give a whole number"):
        OffloadedForwardForward(20, 4, [5], ahead=2)


class Stream:
    """Work in order, done when `hurries` says so or else as late as events allow."""

    def __init__(self, hurries):
        self.work, self.done, self.hurries = [], 0, hurries

    def submit(self, job):
        self.work.append(job)
        if self.hurries():
            self.run_until(len(self.work))

    def run_until(self, count):
        while self.done < count:
            self.done += 1
            self.work[self.done - 1]()

    def record_event(self):
        return self, len(self.work)

    def wait_event(self, event):
        stream, count = event
        self.submit(lambda: stream.run_until(count))


@pytest.fixture(params=["late", "early in", "early out", "now and then"])
def copies_between_their_events(request, monkeypatch):
    """Streams as a GPU has them: the computing one works at once, copies whenever they may."""
    chosen = random.Random(0)
    hurries = {
        "late": [lambda: False] * 2,
        "early in": [lambda: True, lambda: False],
        "early out": [lambda: False, lambda: True],
        "now and then": [lambda: chosen.random() < 0.3] * 2,
    }[request.param]
    copying = [Stream(hurry) for hurry in hurries]
    current, made = [Stream(lambda: True)], iter(copying)

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    class Store:
        pinned, moved, kept = True, 0, {}

        def write(self, name, tensor):
            current[-1].submit(lambda: self.kept.update({name: tensor.clone()}))

        def read(self, name, into):
            current[-1].submit(lambda: into.copy_(self.kept[name]))

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: next(made))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda: [s.run_until(len(s.work)) for s in copying]
    )
    monkeypatch.setattr(Slots, "_outlive_copies", lambda *_: None)
    monkeypatch.setattr(offload, "open_store", lambda *_: Store())


@pytest.mark.parametrize("ahead", [0, 1])
def test_slots_copies_that_run_whenever_their_events_let_them_change_no_bit(
    digits, copies_between_their_events, ahead
):
    in_memory, offloaded = pair(digits, "memory", ahead=ahead)
    h = in_memory.encode(digits.train_images[:60], digits.train_labels[:60])
    for _ in range(3):
        expected = in_memory.step(h.clone(), 30, 0.01)
        assert torch.equal(offloaded.step(h.clone(), 30, 0.01), expected)
        tried = [n.label_goodness(digits.test_images[:9]) for n in (in_memory, offloaded)]
        assert torch.equal(*tried)
    assert equal(in_memory, offloaded)
