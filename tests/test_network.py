import itertools
from dataclasses import replace

import pytest
import torch

from ff_utils.config import LABELS, NORMALISATIONS, Batch, FFConfig, TrainConfig
from ff_utils.data import load_dataset
from ff_utils.ff import layers
from ff_utils.ff.network import PREDICTIONS, ForwardForward
from ff_utils.training import fit

LABELLED = list(itertools.product(LABELS, NORMALISATIONS))
TRAIN = TrainConfig(batch_size=50)


def make(label="pixels", normalisation="mean_square", hidden=(8, 6), **settings):
    config = FFConfig(label=label, normalisation=normalisation, label_scale=2.5, **settings)
    return ForwardForward(20, 4, list(hidden), config, dtype=torch.float64)


def images(count=7):
    return torch.rand(count, 20, generator=generator(3), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", 1000, 200)


def for_digits(data, **settings):
    return ForwardForward(data.pixels, data.classes, [30, 20, 10], FFConfig(**settings))


@pytest.mark.parametrize(
    ("label", "normalisation"), [case for case in LABELLED if case[0] != "none"]
)
def test_label_goodness_is_what_trying_every_label_in_full_gives(label, normalisation):
    one = make(label, normalisation)
    found = one.label_goodness(images())
    for tried in range(4):
        h = one.encode(images(), torch.full((7,), tried))
        for depth, layer in enumerate(one.layers):
            y = layer(h)
            expected = y.square().mean(dim=1)
            assert torch.allclose(found[depth, :, tried], expected, atol=1e-12)
            h = y / (y.norm(dim=1, keepdim=True) + 1e-300)
            h = h * (y.shape[1] ** 0.5 if normalisation == "mean_square" else 1)


@pytest.mark.parametrize(("label", "normalisation"), LABELLED)
def test_labelled_input_teaches_what_rows_with_the_labels_written_in_teach(label, normalisation):
    one, other = make(label, normalisation, seed=1), make(label, normalisation, seed=1)
    labels, wrong = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 3, 0, 2, 2])
    for _ in range(3):
        rows = other.labelled_input(images(5))
        for h, found in zip(
            one.activations(one.encode(images(5), None), 2),
            other.activations(rows.with_labels(None), 2),
            strict=True,
        ):
            assert torch.allclose(h, found, atol=1e-10)
        h = one.encode(images(5).repeat(2, 1), torch.cat([labels, wrong]))
        expected = one.step(h, 5, 0.01)
        found = other.step(rows.with_labels(labels, wrong), 5, 0.01)
        assert torch.allclose(found, expected, atol=1e-10)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], tensor, atol=1e-8), name


@pytest.mark.parametrize("label", ["pixels", "none"])
def test_dropped_pixels_are_the_same_for_every_label(label):
    one = make(label)
    rows = one.labelled_input(images(2000))
    rows.drop_pixels(0.25, generator())
    layer = layers.FFLayer(20, 1, dtype=torch.float64)
    layer.weight.zero_()[0, 4:] = 1.0  # blind to the label
    first, second = (layer(rows.with_labels(torch.full((2000,), c))) for c in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, layer(one.labelled_input(images(2000)).with_labels(None)))


def test_both_adds_the_softmax_and_the_goodness_as_log_probabilities():
    one = make(sharpness=3.0, seed=2)
    one.softmax.weight.uniform_(-1, 1)
    expected = one.classify(images()).log_softmax(1)
    for g in one.label_goodness(images()):
        expected = expected + 3.0 * g / 2
    assert torch.allclose(one.scores(images(), "both"), expected)
    with pytest.raises(ValueError, match="by is 'vote'; choose one of: softmax, goodness, both"):
        one.predict(images(), "vote")


def test_classify_reads_the_layers_from_first_read_to_the_depth():
    one = make(hidden=(7, 5, 3), first_read=2)
    assert one.softmax.weight.shape == (4, 8)
    one.softmax.weight.normal_(generator=generator())
    activations = one(one.encode(images(), None))
    expected = torch.cat(activations[1:], dim=1) @ one.softmax.weight.t()
    assert torch.allclose(one.classify(images()), expected)
    expected = activations[1] @ one.softmax.weight[:, :5].t()
    assert torch.allclose(one.classify(images(), depth=2), expected)


def test_prediction_does_not_depend_on_the_chunk():
    one = make()
    for by in PREDICTIONS:
        whole = one.predict(images(), by)
        assert torch.equal(whole, one.predict(images(), by, rows=2))


def test_step_trains_every_layer_on_what_the_layer_below_gave_before_its_update():
    one, twin = make(seed=1), make(seed=1)
    h = one.encode(images(6), torch.tensor([0, 1, 2, 3, 0, 1]))
    losses = one.step(h.clone(), 3, 0.01)
    below = h.clone()
    for layer, loss in zip(twin.layers, losses, strict=True):
        above = layer(below)
        layers.normalise_(above, "mean_square")
        _, found = layer.step(below.clone(), 3, 0.01, twin.grad_buffer)
        assert torch.equal(found, loss)
        below = above
    for layer, other in zip(one.layers, twin.layers, strict=True):
        assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize(("loss", "positives"), [("softplus", 3), ("pairwise", 4)])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_gradients_added_up_over_parts_are_those_of_the_batch(micro_batches, loss, positives):
    one, other = (make(seed=1, loss=loss) for _ in range(2))
    h = one.encode(images(8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    for _ in range(3):
        expected = one.step(h.clone(), positives, 0.01)
        kept = h.clone()
        found = other.step_accumulated(h, positives, 0.01, micro_batches)
        assert torch.allclose(found, expected, atol=1e-12) and torch.equal(h, kept)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], tensor, atol=1e-10), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": []}, "hidden is"),
        ({"hidden": [10, 0]}, r"hidden\[1\] is 0"),
        ({"classes": 1}, "classes is 1"),
        ({"pixels": 3}, "pixels is 3; give a whole number of at least 4"),
        ({"first_read": 4}, r"first_read is 4; give a whole number .* at most 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    sizes = {"pixels": 20, "classes": 4, "hidden": [5]}
    with pytest.raises(ValueError, match=message):
        sizes |= {name: settings.pop(name) for name in list(settings) if name in sizes}
        ForwardForward(**sizes, config=FFConfig(**settings))


def test_recomputed_activations_teach_the_classifier_the_same_bits(digits):
    one, other = for_digits(digits), for_digits(digits, recompute=True)
    for trained in (one, other):
        draws = generator()
        for start in (0, 50):
            batch = (digits.train_images[start:][:50], digits.train_labels[start:][:50])
            trained.train_batch(Batch(*batch, 0.01, draws, TRAIN))
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert one.settings == other.settings


@pytest.mark.parametrize(("stage", "names"), [(None, [1, 2, 3]), (1, [2])])
def test_train_batch_trains_the_layers_of_its_stage_and_the_classifier(digits, stage, names):
    one = for_digits(digits)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    batch = digits.train_images[:50], digits.train_labels[:50]
    losses = one.train_batch(Batch(*batch, 0.01, generator(), TRAIN, stage))
    assert list(losses) == [*(f"loss_{n}" for n in names), "softmax_loss"]
    for number in (1, 2, 3):
        name = f"layers.{number - 1}.weight"
        assert torch.equal(one.state_dict()[name], before[name]) == (number not in names)
    assert not torch.equal(one.softmax.weight, before["softmax.weight"])


def test_train_batch_leaves_out_the_classifier_as_often_as_it_is_told(digits):
    one, updates, draws = for_digits(digits), 0, generator()
    config = replace(TRAIN, classifier_update_prob=0.25)
    for _ in range(200):
        batch = digits.train_images[:10], digits.train_labels[:10]
        updates += "softmax_loss" in one.train_batch(Batch(*batch, 0.01, draws, config))
    assert 30 < updates < 70


def test_training_without_labels_first_trains_layers_then_the_classifier(digits):
    one, blind = (for_digits(digits, label="none") for _ in range(2))
    few, labels = digits.train_images[:50], digits.train_labels[:50]
    assert one.start_training(digits, TRAIN) == ["layers", "softmax"]
    blind.start_training(digits, TRAIN)
    losses = one.train_batch(Batch(few, labels, 0.01, generator(), TRAIN, "layers"))
    blind.train_batch(Batch(few, labels.flip(0), 0.01, generator(), TRAIN, "layers"))
    assert list(losses) == ["loss_1", "loss_2", "loss_3"] and not one.softmax.weight.any()
    trained = {name: tensor.clone() for name, tensor in one.layers.state_dict().items()}
    for name, tensor in trained.items():
        assert torch.equal(blind.layers.state_dict()[name], tensor), name
    assert one.after_epoch(digits, 1, "layers") == {}
    losses = one.train_batch(Batch(few, labels, 0.01, generator(), TRAIN, "softmax"))
    assert list(losses) == ["softmax_loss"] and one.softmax.weight.any()
    for name, tensor in trained.items():
        assert torch.equal(one.layers.state_dict()[name], tensor), name
    assert 0 < one.after_epoch(digits, 1, "softmax")["error"] < 1
    with pytest.raises(ValueError, match="predict by 'softmax'"):
        one.predict(digits.test_images)


def test_layers_that_saw_no_label_tell_hybrids_from_images_and_classes_apart(digits):
    config = FFConfig(label="none", threshold=1.0, sharpness=20.0, first_read=2)
    one = ForwardForward(digits.pixels, digits.classes, [100, 100, 100], config)
    train = TrainConfig(epochs=15, batch_size=50, learning_rate=0.01, decay="none", mask_blurs=1)
    history = fit(one, digits, train, quiet=True)
    of_layers = history[history.stage == "layers"].iloc[-1]
    assert all(of_layers[f"loss_{n}"] < 1.37 for n in (1, 2, 3))  # chance is 1.386
    assert history.error.iloc[-1] < 0.12


def test_after_epoch_gives_the_test_error_of_the_layers_trained_so_far(digits):
    one = for_digits(digits)
    one.softmax.weight.normal_(generator=generator())
    for stage, depth in ((None, 3), (0, 1), (1, 2)):
        wrong = one.classify(digits.test_images, depth).argmax(1) != digits.test_labels
        error = one.after_epoch(digits, 1, stage)["error"]
        assert error == pytest.approx(wrong.float().mean().item())


def test_after_epoch_refuses_a_dead_layer(digits):
    for label in LABELS:
        one = for_digits(digits, label=label)
        one.layers[1].bias.fill_(-100.0)
        with pytest.raises(FloatingPointError, match="layer 2 is dead in epoch 7: all its units"):
            one.after_epoch(digits, 7)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"classifier": False}, {}, "built with classifier=False: train this by fit_greedy_cached"),
        ({"first_read": 2}, {"schedule": "layerwise"}, "softmax reads layer 1, give first_read=1"),
        ({}, {"negatives": "rollout"}, "is no text: give 'hard'"),
        ({"label": "none"}, {"batch_size": 333}, "batch_size is 333, which leaves one image alone"),
    ],
)
def test_start_training_refuses_what_does_not_fit(digits, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        for_digits(digits, **settings).start_training(digits, replace(TRAIN, **changes))


def test_network_without_classifier_predicts_by_goodness_alone():
    one = make(classifier=False)
    assert one.predict(images()).shape == (7,)
    with pytest.raises(ValueError, match="built with classifier=False: predict by 'goodness'"):
        one.classify(images())
