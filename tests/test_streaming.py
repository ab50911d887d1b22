import random
from contextlib import contextmanager

import pytest
import torch

from ff_utils import datasets, streaming, training
from ff_utils.networks import ForwardForward, backprop_network
from ff_utils.streaming import Slots, StreamedBackprop, StreamedForwardForward

HIDDEN = [24, 16, 24, 24]
SETTINGS = {"label_scale": 4.0, "theta": 1.0, "scale": 30.0, "seed": 5}


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", 300)


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path):
    return "memory" if request.param == "memory" else tmp_path / "layers"


def equal(one, other):
    state, found = one.state_dict(), other.state_dict()
    return state.keys() == found.keys() and all(torch.equal(state[k], found[k]) for k in state)


def pair(data, store, streamed=None, **settings):
    given = SETTINGS | settings
    resident = ForwardForward(data.pixels, data.classes, HIDDEN, **given)
    given |= streamed or {}
    streamed = StreamedForwardForward(data.pixels, data.classes, HIDDEN, store=store, **given)
    return resident, streamed


@pytest.mark.parametrize("schedule", training.SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_streamed_learns_what_resident_learns_bit_for_bit(digits, store, schedule, optimizer):
    resident, streamed = pair(digits, store, optimizer=optimizer)
    assert equal(resident, streamed)
    tables = [
        training.train_forward_forward(
            network,
            digits,
            epochs=2,
            batch_size=40,
            learning_rate=0.003,
            schedule=schedule,
            quiet=True,
        )
        for network in (resident, streamed)
    ]
    assert equal(resident, streamed)
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    assert training.goodness_errors(resident, digits) == training.goodness_errors(streamed, digits)
    for by in ("goodness", "softmax"):
        found = [network.predict(digits.test_images, by) for network in (resident, streamed)]
        assert torch.equal(*found)


def test_what_the_softmax_learns_from_is_the_same_kept_or_computed_again(digits, store):
    resident, streamed = pair(digits, store, streamed={"recompute": True})
    again = ForwardForward(digits.pixels, digits.classes, HIDDEN, recompute=True, **SETTINGS)
    course = {"epochs": 2, "batch_size": 40, "learning_rate": 0.003, "quiet": True}
    for network in (resident, streamed, again):
        training.train_forward_forward(network, digits, **course)
    assert resident.softmax.weight.any()
    assert equal(resident, streamed) and equal(resident, again)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_fetching_ahead_and_micro_batches_change_no_bit(digits, store, ahead, micro_batches):
    resident, streamed = pair(digits, store, streamed={"ahead": ahead})
    h = resident.inputs(digits.train_images[:60], digits.train_labels[:60])
    for _ in range(3):
        expected = resident.step(h.clone(), 30, 0.01, micro_batches)
        assert torch.equal(streamed.step(h.clone(), 30, 0.01, micro_batches), expected)
    assert equal(resident, streamed)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_rows_that_wait_in_the_store_too_learn_the_same(digits, store, micro_batches):
    resident, streamed = pair(digits, store, dtype=torch.float64, guesses=False)
    h = resident.inputs(digits.train_images[:60], digits.train_labels[:60])
    for _ in range(3):
        expected = resident.step(h.clone(), 25, 0.01)
        found = streamed.step_in_parts(h, 25, 0.01, micro_batches)
        assert torch.allclose(found, expected, atol=1e-12)
    state = streamed.state_dict()
    for name, tensor in resident.state_dict().items():
        assert torch.allclose(state[name], tensor, atol=1e-10), name


def test_layer_after_layer_from_files_is_layer_after_layer_from_memory(digits, store, tmp_path):
    resident, streamed = pair(digits, store)
    settings = {"epochs": 15, "batch_size": 40, "learning_rate": 0.01, "quiet": True}
    tables = [
        training.train_layer_after_layer(network, digits, store=kept, **settings)
        for network, kept in ((resident, "memory"), (streamed, tmp_path / "kept"))
    ]
    assert equal(resident, streamed)
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    assert not any((tmp_path / "kept").iterdir())  # what was kept is gone with its use
    assert list(tables[0].layer) == [layer for layer in (1, 2, 3, 4) for _ in range(15)]
    first = tables[0][tables[0].layer == 1].loss
    assert first.iloc[-1] < first.iloc[0]
    assert training.goodness_errors(resident, digits)[0] < 0.5


def test_weights_go_to_and_from_a_resident_network(digits, store):
    resident, streamed = pair(digits, store)
    other = ForwardForward(digits.pixels, digits.classes, HIDDEN, **(SETTINGS | {"seed": 6}))
    streamed.load_state_dict(other.state_dict())
    assert equal(other, streamed) and not equal(resident, streamed)
    resident.load_state_dict(streamed.state_dict())
    assert equal(resident, other)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_streamed_backprop_learns_what_plain_backprop_learns(store, micro_batches):
    network = backprop_network(30, 10, HIDDEN, dtype=torch.float64)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    streamed = StreamedBackprop(30, 10, HIDDEN, store=store, dtype=torch.float64)
    linears = [module for module in network if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for number, linear in enumerate(linears):
            (layer,) = streamed.visit([number])
            linear.weight.copy_(layer.weight)
            linear.bias.copy_(layer.bias)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        images = torch.rand(50, 30, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (50,), generator=generator)
        expected = training.backprop_step(network, optimizer, images, labels)
        assert torch.allclose(streamed.step(images, labels, 1e-3, micro_batches), expected)
        assert torch.allclose(streamed(images[:7]), network(images[:7]), atol=1e-9)
    for number, linear in enumerate(linears):
        (layer,) = streamed.visit([number])
        assert torch.allclose(layer.weight, linear.weight, atol=1e-12)
        assert torch.allclose(layer.bias, linear.bias, atol=1e-12)


def test_a_layers_file_that_is_cut_short_or_gone_is_one_sentence(digits, tmp_path):
    _, streamed = pair(digits, tmp_path)
    (tmp_path / "1.weights").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"1\.weights is missing or not whole: start again"):
        streamed.predict(digits.test_images[:5])
    (tmp_path / "1.weights").unlink()
    with pytest.raises(ValueError, match=r"1\.weights is missing or not whole"):
        streamed.predict(digits.test_images[:5])


def test_a_folder_that_holds_something_is_left_alone(digits, tmp_path):
    pair(digits, tmp_path / "layers")
    with pytest.raises(ValueError, match="layers is not empty: give a new folder"):
        pair(digits, tmp_path / "layers")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file cannot be made .File exists.: give another"):
        pair(digits, tmp_path / "file")


def test_a_network_without_guesses_says_so(digits):
    resident, streamed = pair(digits, "memory", guesses=False)
    assert streamed.softmax is None and len(streamed.predict(digits.test_images[:3])) == 3
    with pytest.raises(ValueError, match="guesses=False: predict by 'goodness'"):
        resident.predict(digits.test_images, "softmax")
    with pytest.raises(ValueError, match="guesses=False: train it by train_layer_after_layer"):
        training.train_forward_forward(
            streamed, digits, epochs=1, batch_size=40, learning_rate=0.01
        )


def test_a_disk_that_is_full_is_one_sentence(digits, tmp_path):
    _, streamed = pair(digits, tmp_path)
    (tmp_path / "2.weights").unlink()
    (tmp_path / "2.weights").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not be written .No space left.*more room"):
        streamed.slots.store.write("2.weights", torch.rand(5000))


def test_a_streamed_network_is_not_moved_and_reads_only_what_it_knows(digits):
    _, streamed = pair(digits, "memory")
    with pytest.raises(RuntimeError, match="stays where it was built: give `device` there"):
        streamed.to(torch.float64)
    with pytest.raises(ValueError, match="ahead is 2; give a whole number"):
        StreamedForwardForward(20, 4, [5], ahead=2)


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
    monkeypatch.setattr(streaming, "open_store", lambda *_: Store())


@pytest.mark.parametrize("ahead", [0, 1])
def test_copies_that_run_whenever_their_events_let_them_change_no_bit(
    digits, copies_between_their_events, ahead
):
    resident, streamed = pair(digits, "memory", streamed={"ahead": ahead})
    h = resident.inputs(digits.train_images[:60], digits.train_labels[:60])
    for _ in range(3):
        expected = resident.step(h.clone(), 30, 0.01)
        assert torch.equal(streamed.step(h.clone(), 30, 0.01), expected)
        tried = [n.label_goodness(digits.test_images[:9]) for n in (resident, streamed)]
        assert torch.equal(*tried)
    assert equal(resident, streamed)
