import itertools

import pytest
import torch

from ff_utils import datasets, local_fields, networks, pairs, recurrent, training, unsupervised


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def make(data, hidden=(100, 100), **settings):
    settings = {"label_scale": 4.0, "theta": 1.0, "scale": 30.0} | settings
    return networks.ForwardForward(data.pixels, data.classes, list(hidden), **settings)


def train(network, data, **settings):
    settings = {"epochs": 3, "batch_size": 50, "learning_rate": 0.003, "quiet": True} | settings
    return training.train_forward_forward(network, data, **settings)


@pytest.mark.parametrize(
    ("schedule", "negatives"), list(itertools.product(training.SCHEDULES, pairs.NEGATIVES))
)
def test_forward_forward_learns_digits_in_every_schedule(digits, schedule, negatives):
    network = make(digits)
    history = train(network, digits, epochs=10, schedule=schedule, negatives=negatives)
    assert len(history) == (10 if schedule == "joint" else 20)
    assert history.error.iloc[-1] < 0.07
    assert training.goodness_errors(network, digits)[-1] < 0.15


def test_forward_forward_learns_real_images(data):
    part = data.subset(min(10_000, len(data.train_labels)))
    network = make(part, hidden=(300, 300))
    history = train(network, part, epochs=4, learning_rate=0.001)
    assert history.error.iloc[-1] < 0.1
    shown = network.predict(part.test_images, by="softmax")
    assert (shown != part.test_labels).float().mean().item() == pytest.approx(
        history.error.iloc[-1]
    )


def test_the_seeds_choices_learn_too(digits):
    network = make(
        digits, label="joined", normalisation="length", theta=2.0, scale=1.0, label_scale=1.0
    )
    train(
        network, digits, epochs=30, learning_rate=0.03, schedule="layerwise",
        negatives="random", decay="none",
    )  # fmt: skip
    assert training.goodness_errors(network, digits)[-1] < 0.25


def test_the_same_seed_gives_the_same_bits_and_another_does_not(digits):
    networks_ = [make(digits, seed=s) for s in (1, 1, 2)]
    for network, seed in zip(networks_, (1, 1, 2), strict=True):
        train(network, digits, epochs=1, seed=seed)
    one, same, other = (n.layers[1].weight for n in networks_)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_layerwise_training_leaves_finished_layers_alone(digits):
    network, weights = make(digits), []

    def remember():
        weights.append(network.layers[0].weight.clone())
        return {"seen": len(weights)}

    history = train(network, digits, epochs=2, schedule="layerwise", after_epoch=remember)
    assert history.stage.tolist() == [0, 0, 1, 1] and history.seen.tolist() == [1, 2, 3, 4]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[3])


@pytest.mark.parametrize("schedule", training.SCHEDULES)
def test_a_broken_run_resumes_to_the_bits_of_an_unbroken_one(digits, tmp_path, schedule):
    whole, broken = make(digits), make(digits)
    settings = {"epochs": 2, "schedule": schedule, "jitter": 1}
    expected = train(whole, digits, **settings)
    stop_after = iter((None, KeyboardInterrupt()))

    def interrupt():
        if found := next(stop_after):
            raise found
        return {}

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(broken, digits, **settings, checkpoint=path, after_epoch=interrupt)
    resumed = make(digits)
    found = train(resumed, digits, **settings, checkpoint=path)
    assert found.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    again = train(make(digits), digits, **settings, checkpoint=path)
    assert again.equals(found)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_backprop_resumes_to_the_same_bits_too(digits, tmp_path):
    settings = {"epochs": 2, "batch_size": 50, "learning_rate": 0.002, "quiet": True}
    whole, broken, resumed = (networks.backprop_network(digits.pixels, 10, [50]) for _ in range(3))
    training.train_backprop(whole, digits, **settings)
    path, write = tmp_path / "run.pt", training.Checkpoint.save

    def save_one_epoch(checkpoint, rows):
        write(checkpoint, rows)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Checkpoint, "save", save_one_epoch)
        training.train_backprop(broken, digits, **settings, checkpoint=path)
    training.train_backprop(resumed, digits, **settings, checkpoint=path)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_run_or_not_whole_is_refused(digits, tmp_path):
    path = tmp_path / "run.pt"
    train(make(digits), digits, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match=r"run.pt is of a run whose epochs is 1, not 2: delete"):
        train(make(digits), digits, epochs=2, checkpoint=path)
    with pytest.raises(ValueError, match=r"of a run whose network is .*'theta': 1.0.*, not .*2.0"):
        train(make(digits, theta=2.0), digits, epochs=1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"run.pt is not a whole checkpoint: delete it"):
        train(make(digits), digits, epochs=1, checkpoint=path)


def test_a_full_disk_leaves_the_last_whole_checkpoint(digits, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    train(make(digits), digits, epochs=1, checkpoint=path)
    kept = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    network = make(digits)
    saved = training.Checkpoint(path, network, [], torch.Generator(), {})
    with pytest.raises(OSError, match=r"No space left.*make room .* is still there"):
        saved.save([])
    assert path.read_bytes() == kept and len(list(tmp_path.iterdir())) == 1


def test_jitter_shifts_each_image_by_up_to_as_many_pixels():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(3, 5, 6)
    image[:, 2, 3] = torch.tensor([1.0, 2.0, 3.0])
    rows = image.flatten().repeat(400, 1)
    moved = training.shifted(rows, (3, 5, 6), 2, generator).view(400, 3, 5, 6)
    assert torch.equal(moved.sum((2, 3)), torch.tensor([1.0, 2.0, 3.0]).expand(400, 3))
    places = {tuple(p.tolist()) for p in (moved[:, 0] > 0).nonzero()[:, 1:]}
    assert places == set(itertools.product(range(5), range(1, 6)))


def local(data):
    fields = [[4, 2, 5], [2, 1, 8]]
    return local_fields.LocalForwardForward(data.shape, data.classes, fields, label_scale=4.0)


@pytest.mark.parametrize(
    ("build", "learn", "times"),
    [
        (make, training.train_forward_forward, 1),
        (local, training.train_forward_forward, 1),
        (
            lambda data: recurrent.RecurrentForwardForward(64, 10, [50]),
            recurrent.train_recurrent,
            1,
        ),
        (lambda data: make(data, label="none"), unsupervised.train_unsupervised, 2),
        (lambda data: networks.backprop_network(64, 10, [50]), training.train_backprop, 1),
    ],
)
def test_dropout_meets_every_image_once_an_epoch(digits, monkeypatch, build, learn, times):
    part, met, drop = digits.subset(200), [], pairs.dropped

    def note(images, *rest):
        met.append(drop(images, *rest))
        return met[-1]

    monkeypatch.setattr(pairs, "dropped", note)
    course = {"epochs": 1, "batch_size": 50, "learning_rate": 0.001, "quiet": True}
    history = [learn(build(part), part, dropout=share, **course) for share in (0.0, 0.5)]
    assert sum(map(len, met)) == times * 200
    assert all(images.count_nonzero() < 0.6 * images.numel() for images in met)
    assert not history[0].filter(like="loss").equals(history[1].filter(like="loss"))


def test_a_layer_that_answers_to_nothing_stops_training(digits):
    network = make(digits)
    network.layers[1].bias.fill_(-100.0)
    with pytest.raises(FloatingPointError, match="layer 2 is dead in epoch 1, no unit of it"):
        train(network, digits, learning_rate=1e-6)


def test_every_image_is_seen_once_an_epoch_in_a_new_order(digits):
    generator = torch.Generator().manual_seed(0)
    epochs = [list(training.batches(digits, 64, generator)) for _ in range(2)]
    sums = [torch.cat([images for images, _ in e]).sum(1) for e in epochs]
    assert not torch.equal(*sums)
    assert torch.equal(sums[0].sort().values, digits.train_images.sum(1).sort().values)
    assert torch.equal(sums[0].sort().values, sums[1].sort().values)


def test_the_learning_rate_falls_to_zero_over_the_second_half():
    rates = [training._decayed(step / 10, "linear") for step in range(11)]
    assert rates[:6] == [1.0] * 6 and rates[-1] == 0
    assert rates[5:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert training._decayed(0.9, "none") == 1


def test_guessing_for_a_share_of_the_batches_teaches_nearly_as_well(digits):
    network = make(digits)
    history = train(network, digits, epochs=10, guess_share=0.5)
    assert history.error.iloc[-1] < 0.07
    confusion = network.softmax.confusion
    assert torch.allclose(confusion.sum(1), torch.ones(10), atol=1e-4)
    assert (confusion.argmax(1) == torch.arange(10)).all()
    with pytest.raises(ValueError, match="guess_share is 0; give a number above 0 and at most 1"):
        train(network, digits, guess_share=0)


def test_backprop_learns_and_frees_its_gradients(digits):
    network = networks.backprop_network(digits.pixels, 10, [100, 100])
    history = training.train_backprop(
        network, digits, epochs=8, batch_size=50, learning_rate=0.002, quiet=True
    )
    assert history.error.iloc[-1] < 0.06
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_loss_that_runs_away_stops_training_with_layer_epoch_and_remedy(digits):
    network = make(digits)
    network.layers[1].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layer 2 is nan in epoch 1; lower learning_rate"):
        train(network, digits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 10**6}, "batch_size is 1000000; give .* at most 1437"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": 3.0}, "learning_rate is 3.0"),
        ({"schedule": "random"}, "schedule is 'random'; choose one of: joint, layerwise"),
        ({"negatives": "easy"}, "negatives is 'easy'; choose one of: random, hard"),
        ({"decay": "cosine"}, "decay is 'cosine'"),
    ],
)
def test_bad_settings_are_named(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        train(make(digits), digits, **settings)


def test_data_with_one_class_is_refused(digits):
    of_one = digits.train_labels == 3
    one = datasets.replace(
        digits, train_images=digits.train_images[of_one], train_labels=digits.train_labels[of_one]
    )
    with pytest.raises(ValueError, match="one class only"):
        train(make(one), one)
