import itertools
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from ff_utils import language, training
from ff_utils.backprop import Backprop, mlp
from ff_utils.config import FFConfig, LocalConfig, RecurrentConfig, TrainConfig
from ff_utils.data import load_dataset
from ff_utils.ff.local import LocalForwardForward
from ff_utils.ff.network import ForwardForward
from ff_utils.ff.recurrent import RecurrentForwardForward
from ff_utils.training import Checkpoint, error_rate, fit, fit_greedy_cached, goodness_errors

FF = FFConfig(label_scale=4.0, threshold=1.0, sharpness=30.0)
TRAIN = TrainConfig(epochs=2, batch_size=50, learning_rate=0.003)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def few(digits):
    return digits.subset(200, 100)


def make(data, hidden=(100, 100), **changes):
    return ForwardForward(data.pixels, data.classes, list(hidden), replace(FF, **changes))


def train(network, data, note=dict, checkpoint=None, **changes):
    config = replace(TRAIN, **changes)
    return fit(network, data, config, note=note, checkpoint=checkpoint, quiet=True)


def unsupervised(data):
    return make(data, hidden=[30, 30], label="none", label_scale=1.0, first_read=2)


def local(data):
    config = LocalConfig(label_scale=4.0)
    return LocalForwardForward(data.shape, data.classes, [[4, 2, 5], [2, 1, 8]], config)


def recurrent(data):
    return RecurrentForwardForward(data.pixels, data.classes, [30], RecurrentConfig())


def backprop(data, **remedies):
    return Backprop(mlp(data.pixels, data.classes, [50, 50]), **remedies)


def in_backward(data):
    return backprop(data, optimizer_in_backward=True)


FORMS = [make, local, recurrent, unsupervised, backprop, in_backward]


def same_state(one, other):
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("schedule", "negatives", "prob"),
    [("joint", "random", 1.0), ("joint", "hard", 0.5), ("layerwise", "hard", 1.0)],
)
def test_fit_learns_digits_in_every_schedule(digits, schedule, negatives, prob):
    network, changes = make(digits), {"classifier_update_prob": prob}
    history = train(network, digits, epochs=8, schedule=schedule, negatives=negatives, **changes)
    assert len(history) == (8 if schedule == "joint" else 16)
    assert history.error.iloc[-1] == error_rate(network, digits) < 0.08
    shown = network.predict(digits.test_images, by="softmax")
    assert history.error.iloc[-1] == pytest.approx((shown != digits.test_labels).float().mean())
    by_goodness = error_rate(network, digits, "goodness")
    assert goodness_errors(network, digits)[-1] == pytest.approx(by_goodness) and by_goodness < 0.15
    confusion = network.softmax.confusion
    assert torch.allclose(confusion.sum(1), torch.ones(10), atol=1e-4)
    assert (confusion.argmax(1) == torch.arange(10)).all()


def test_error_rate_of_a_plain_classifier_is_that_of_its_backprop(few):
    network = backprop(few)
    history = train(network, few)
    assert error_rate(network.network, few) == error_rate(network, few) == history.error.iloc[-1]


def test_error_rate_at_a_depth_reads_the_layers_below_alone(few):
    network = make(few)
    train(network, few)
    network.softmax.weight[:, 100:] = 0
    of_first = error_rate(network, few)
    network.layers[1].weight.fill_(torch.nan)
    error = network.after_epoch(few, 1, stage=0)["error"]
    assert error == of_first != error_rate(network, few)


def test_fit_gives_the_same_bits_for_a_seed_and_others_for_another(few):
    networks = [make(few, seed=seed) for seed in (1, 1, 2)]
    for network, seed in zip(networks, (1, 1, 2), strict=True):
        train(network, few, epochs=1, seed=seed)
    assert same_state(networks[0], networks[1]) and not same_state(networks[0], networks[2])


def test_layerwise_fit_leaves_finished_layers_alone(few):
    network, weights = make(few), []

    def remember():
        weights.append(network.layers[0].weight.clone())
        return {"seen": len(weights)}

    history = train(network, few, schedule="layerwise", note=remember)
    assert history.stage.tolist() == [0, 0, 1, 1] and history.seen.tolist() == [1, 2, 3, 4]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[3])


@pytest.mark.parametrize("form", [*FORMS, "layerwise", "rollout"])
def test_checkpoint_resumes_a_broken_run_to_the_bits_of_an_unbroken_one(few, tmp_path, form):
    data, changes = few, {"random_shift": 1, "dropout": 0.1}
    if form == "layerwise":
        form, changes = make, {"schedule": form}
    if form == "rollout":
        data, changes = language.load_text().subset(300, 100), {"negatives": form}
        changes["rollout_length"] = 7

        def form(data):
            return make(data, hidden=[20], label="joined")

    whole, resumed = form(data), form(data)
    expected = train(whole, data, **changes)
    notes = iter([{}] * (len(expected) - 1))  # the run breaks off in its last epoch
    path = tmp_path / "run.pt"
    with pytest.raises(StopIteration):
        train(form(data), data, note=lambda: next(notes), checkpoint=path, **changes)
    found = train(resumed, data, checkpoint=path, **changes)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert same_state(whole, resumed)
    again = train(form(data), data, checkpoint=path, **changes)
    pd.testing.assert_frame_equal(again, found)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_checkpoint_of_another_run_or_not_whole_is_refused(few, tmp_path):
    path = tmp_path / "run.pt"
    train(make(few), few, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match=r"run.pt is of a run whose epochs is 1, not 2: delete"):
        train(make(few), few, epochs=2, checkpoint=path)
    with pytest.raises(ValueError, match=r"of a run whose network.threshold is 1.0, not 2.0"):
        train(make(few, threshold=2.0), few, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match=r"of a run whose images is 200, not 100"):
        train(make(few), few.subset(100, 100), epochs=1, checkpoint=path)
    whole = path.read_bytes()
    network = torch.load(path)["states"][0]
    weights = next(values for name, values in network.items() if name.endswith("weight"))
    place = whole.index(weights.numpy().tobytes()[:64])
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for damaged in (whole[:1000], flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run.pt is not a whole checkpoint: delete it"):
            train(make(few), few, epochs=1, checkpoint=path)


def test_checkpoint_survives_a_full_disk(few, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    train(make(few), few, epochs=1, checkpoint=path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left.*make room .* is still there"):
        Checkpoint(path, make(few), torch.Generator(), {}).save([])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_random_shift_moves_each_image_by_up_to_as_many_pixels():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(3, 5, 6)
    image[:, 2, 3] = torch.tensor([1.0, 2.0, 3.0])
    rows = image.flatten().repeat(400, 1)
    moved = training.random_shift(rows, (3, 5, 6), 2, generator).view(400, 3, 5, 6)
    assert torch.equal(moved.sum((2, 3)), torch.tensor([1.0, 2.0, 3.0]).expand(400, 3))
    places = {tuple(p.tolist()) for p in (moved[:, 0] > 0).nonzero()[:, 1:]}
    assert places == set(itertools.product(range(5), range(1, 6)))


@pytest.mark.parametrize("form", FORMS)
def test_dropout_meets_every_image_once_an_epoch(few, monkeypatch, form):
    met, stages = [], len(form(few).start_training(few, TRAIN))

    def noted(drop):
        def drop_pixels(images, *rest):
            met.append(drop(images, *rest))
            return met[-1]

        return drop_pixels

    for name, module in list(sys.modules.items()):
        if name.startswith("ff_utils.") and hasattr(module, "drop_pixels"):
            monkeypatch.setattr(module, "drop_pixels", noted(module.drop_pixels))
    history = [train(form(few), few, epochs=1, dropout=share) for share in (0.0, 0.5)]
    assert sum(map(len, met)) == 2 * stages * len(few.train_labels)
    dropped = met[len(met) // 2 :]
    assert all(images.count_nonzero() < 0.6 * images.numel() for images in dropped)
    assert not history[0].filter(like="loss").equals(history[1].filter(like="loss"))


def test_fit_stops_at_a_dead_layer(few):
    network = make(few)
    network.layers[1].bias.fill_(-100.0)
    with pytest.raises(FloatingPointError, match="layer 2 is dead in epoch 1"):
        train(network, few, learning_rate=1e-6)


def test_fit_stops_at_a_loss_that_is_not_finite_with_layer_epoch_and_remedy(few):
    network = make(few)
    network.layers[1].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layer 2 is nan in epoch 1; lower learning_rate"):
        train(network, few)


def test_batches_hold_every_image_once_an_epoch_in_a_new_order(digits):
    generator = torch.Generator().manual_seed(0)
    epochs = [list(training.batches(digits, 64, generator)) for _ in range(2)]
    sums = [torch.cat([images for images, _ in e]).sum(1) for e in epochs]
    assert not torch.equal(*sums)
    assert torch.equal(sums[0].sort().values, digits.train_images.sum(1).sort().values)
    assert torch.equal(sums[0].sort().values, sums[1].sort().values)


def test_decay_takes_the_learning_rate_to_zero_over_the_second_half():
    config = replace(TRAIN, learning_rate=0.5)
    rates = [training.learning_rate(config, step, 10) for step in range(11)]
    assert rates[:6] == [0.5] * 6 and rates[-1] == 0
    assert rates[5:] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    assert training.learning_rate(replace(config, decay="none"), 9, 10) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10**6}, "batch_size is 1000000; give .* at most 200"),
        ({"random_shift": 8}, "random_shift is 8; give .* at most 7"),
    ],
)
def test_fit_refuses_settings_that_the_data_does_not_allow(few, changes, message):
    with pytest.raises(ValueError, match=message):
        train(make(few), few, **changes)


def test_greedy_cached_training_of_one_layer_is_the_layers_own_steps(few):
    network, twin = (make(few, [20], classifier=False) for _ in range(2))
    data = few.subset(50, 50)
    config = replace(TRAIN, epochs=1, decay="none")
    fit_greedy_cached(network, data, config, quiet=True)
    generator = torch.Generator().manual_seed(0)
    ((images, labels),) = training.batches(data, 50, generator)
    wrong = training.random_negatives(labels, 10, generator)
    h = twin.encode(torch.cat([images, images]), torch.cat([labels, wrong]))
    twin.step(h, 50, config.learning_rate)
    assert same_state(network, twin)


def test_greedy_cached_training_refuses_what_it_cannot_do(few):
    with pytest.raises(ValueError, match="label is 'none'"):
        fit_greedy_cached(unsupervised(few), few, TRAIN)
    for changes in ({"dropout": 0.1}, {"random_shift": 1}):
        with pytest.raises(ValueError, match="new inputs in every epoch: give 0"):
            fit_greedy_cached(make(few), few, replace(TRAIN, **changes))


def test_compare_trains_every_variant_and_seed_and_says_what_it_changed(few):
    variants = {"ours": {}, "random": {"negatives": "random", "label_scale": 1.0}}
    train_config = replace(TRAIN, epochs=1)
    table = training.compare(few, [20], FF, train_config, variants, seeds=2)
    assert table.variant.tolist() == ["ours"] * 2 + ["random"] * 2
    assert table.seed.tolist() == [0, 1, 0, 1]
    assert table.negatives.tolist()[2:] == ["random"] * 2
    network = make(few, [20], seed=1, label_scale=1.0)
    history = train(network, few, epochs=1, seed=1, negatives="random")
    assert table.error.iloc[3] == history.error.iloc[-1]
    assert table.goodness_error.iloc[3] == goodness_errors(network, few)[-1]


def test_epochs_to_counts_to_the_first_epoch_at_each_level():
    errors = pd.Series([0.5, 0.2, 0.3, 0.1])
    assert training.epochs_to(errors, [0.5, 0.2, 0.15, 0.05]) == [1, 2, 4, None]
