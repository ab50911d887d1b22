import math
from dataclasses import replace

import pytest
import torch

from ff_utils import language
from ff_utils.config import Batch, FFConfig, TrainConfig
from ff_utils.data import load_dataset
from ff_utils.ff.negatives import Rollouts
from ff_utils.ff.network import ForwardForward
from ff_utils.training import fit

CONFIG = FFConfig(label="joined", label_scale=2.0, threshold=1.0, sharpness=10.0)
TRAIN = TrainConfig(epochs=3, batch_size=20, learning_rate=0.005)


def test_clean_keeps_words_apart_and_uses_thirty_symbols():
    assert (
        language.clean('He met\nwith "a wolf!"  It\'s gone: so')
        == "he met with a wolf. its gone; so"
    )
    assert len(set(language.SYMBOLS)) == 30
    assert set(language.clean(language.FABLES.read_text())) <= set(language.SYMBOLS)


def test_windows_are_followed_by_their_own_next_character():
    data = language.load_text()
    text = language.clean(language.FABLES.read_text())
    for images, labels, start in (
        (data.train_images, data.train_labels, 0),
        (data.test_images, data.test_labels, len(data.train_labels) + 10),
    ):
        for row in (0, 5, len(labels) - 1):
            shown = language.decode(images[row].reshape(10, 30).argmax(1))
            assert shown == text[start + row : start + row + 10]
            assert language.SYMBOLS[labels[row]] == text[start + row + 10]


def test_perplexity_reads_the_text():
    labels = torch.tensor([0, 1, 2, 3])
    assert language.perplexity(torch.zeros(4, 30), labels) == pytest.approx(30)
    sure = torch.full((4, 30), -50.0).scatter(1, labels[:, None], 50.0)
    assert language.perplexity(sure, labels) == pytest.approx(1)
    assert language.perplexity(sure, (labels + 1) % 4) > 1e6


def test_ngram_probabilities_sum_to_one_and_count_right():
    codes = language.encode("abab" * 5)
    model = language.NGram(codes, 2)
    for context in ("", "a", "b", "z", "ab"):
        assert math.fsum(model.probabilities(context)) == pytest.approx(1)
    # After "a" always "b": 10 counts of one kind, backing off to p(b) = (10 + 2/30) / 22.
    below = (10 + 2 / 30) / 22
    assert model.probabilities("a")[1] == pytest.approx((10 + below) / 11)


def test_generation_follows_its_model_and_seed():
    def always_b(rows):
        return torch.full((1, 30), -99.0).index_fill(1, torch.tensor([1]), 99.0)

    assert language.generate(always_b, "x", 5, 10) == "bbbbb"

    def blind(rows):
        return torch.zeros(1, 30)

    first = language.generate(blind, "", 30, 10, seed=1)
    assert first == language.generate(blind, "", 30, 10, seed=1)
    assert first != language.generate(blind, "", 30, 10, seed=2)


@pytest.fixture(scope="module")
def saying(tmp_path_factory):
    """A text that says one thing over and over, which ten characters are enough to know."""
    path = tmp_path_factory.mktemp("text") / "saying.txt"
    path.write_text("the cat sat on a mat; " * 60)
    return language.load_text(str(path))


def test_validation_part_is_the_end_of_the_training_text_and_shares_no_character_with_it():
    data = language.load_text()
    part = language.validation_part(data)
    kept = language.text_of(part.train_images, part.train_labels)
    held = language.text_of(part.test_images, part.test_labels)
    whole = language.text_of(data.train_images, data.train_labels)
    assert torch.equal(torch.cat([kept, held]), whole)
    assert len(part.test_labels) == pytest.approx(len(data.test_labels), rel=0.01)


def after_the_last(rows):
    """Sure of the symbol after a window's last one."""
    last = rows.reshape(len(rows), -1, 30)[:, -1].argmax(1)
    return torch.full((len(rows), 30), -99.0).scatter(1, (last[:, None] + 1) % 30, 99.0)


def test_rollouts_go_on_with_what_the_network_wrote_and_begin_anew_with_real_windows(saying):
    rollouts, generator = Rollouts(saying, 6, 4), torch.Generator().manual_seed(0)
    images = saying.train_images[100:106]
    before = language.decode(rollouts.windows[0].view(10, 30).argmax(1))
    for step in range(9):
        windows, after = rollouts.write(after_the_last, images, generator)
        for row in range(6):
            shown = language.decode(windows[row].view(10, 30).argmax(1))
            assert (
                language.SYMBOLS[after[row]]
                == language.SYMBOLS[(language.SYMBOLS.index(shown[-1]) + 1) % 30]
            )
            # Streams 0 and 4 begin in the same step, streams 1 and 5 one step sooner.
            assert ((windows[row] == images[row]).all()) == ((step + row) % 4 == 0 and step > 0)
        shown = language.decode(windows[0].view(10, 30).argmax(1))
        if step % 4 or not step:
            assert shown == before
        before = shown[1:] + language.SYMBOLS[after[0]]


def test_rollouts_of_a_short_batch_let_only_as_many_streams_write(saying):
    rollouts, generator = Rollouts(saying, 6, 50), torch.Generator().manual_seed(0)
    still = rollouts.windows[4:].clone()
    windows, after = rollouts.write(after_the_last, saying.train_images[:4], generator)
    assert windows.shape == (4, 300) and after.shape == (4,)
    assert torch.equal(rollouts.windows[4:], still)
    assert rollouts.ages.tolist() == [1, 2, 3, 4, 4, 5]


def test_rollout_step_is_the_networks_own_step_on_real_and_written_rows(saying):
    one, other = (ForwardForward(300, 30, [20, 20], CONFIG) for _ in range(2))
    images, labels = saying.train_images[50:58], saying.train_labels[50:58]
    config = replace(TRAIN, batch_size=8, negatives="rollout", rollout_length=5)
    one.start_training(saying, config)
    twin = Rollouts(saying, 8, 5)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(3):
        found = one.train_batch(Batch(images, labels, 0.01, draws[0], config))
        neutral = other(other.encode(images, None))
        other.softmax.step(neutral, other.softmax(neutral), labels, 0.01)
        windows, written = twin.write(other.classify, images, draws[1])
        rows = other.encode(torch.cat([images, windows]), torch.cat([labels, written]))
        losses = other.step(rows, 8, 0.01)
        assert torch.allclose(losses, torch.stack([found["loss_1"], found["loss_2"]]), atol=1e-5)


@pytest.mark.parametrize("method", language.METHODS)
def test_train_by_every_method_learns_what_comes_next(saying, method):
    classify, history = language.train(method, saying, [60, 60], TRAIN, config=CONFIG, quiet=True)
    found = language.score(classify, saying)
    assert found["perplexity"] < 1.5 and found["error"] == 0
    assert found["perplexity"] == pytest.approx(history.perplexity.iloc[-1])
    assert history.perplexity.is_monotonic_decreasing and (history["sample"].str.len() == 40).all()
    assert language.generate(classify, "the cat sat ", 8, 10) == "on a mat"


def test_choose_takes_the_settings_that_end_best_on_the_validation_text(saying, tmp_path):
    part = language.validation_part(saying)
    grid = {"learning_rate": [1e-5, 0.005], "epochs": [1, 2]}
    given = ("backprop", part, [30], grid, TRAIN)
    classify, history, runs = language.choose(*given, checkpoints=str(tmp_path), quiet=True)
    assert list(runs) == ["method", *grid, "perplexity", "error"]
    tried = set(zip(runs.epochs, runs.learning_rate, strict=True))
    assert tried == {(count, rate) for count in (1, 2) for rate in (1e-5, 0.005)}
    best = runs.loc[runs.perplexity.idxmin()]
    assert best.learning_rate == 0.005 and len(history) == best.epochs == 2
    assert language.score(classify, part)["perplexity"] == pytest.approx(best.perplexity)
    assert len(list(tmp_path.iterdir())) == 4
    again, *_ = language.choose(*given, checkpoints=str(tmp_path), quiet=True)
    assert torch.equal(again(part.test_images), classify(part.test_images))


def test_rollouts_need_a_text_and_bad_settings_are_named(saying):
    digits = load_dataset("digits")
    rollout = replace(TRAIN, negatives="rollout")
    with pytest.raises(ValueError, match="negatives is 'rollout' and digits is no text: give 'ha"):
        fit(ForwardForward(digits.pixels, 10, [20]), digits, rollout)
    with pytest.raises(ValueError, match="method is 'easy'; choose one of: hard, rollout, random"):
        language.train("easy", saying, [20], TRAIN)
    with pytest.raises(ValueError, match="saying has 11 windows to train on: too few"):
        language.validation_part(saying.subset(11))


def test_load_text_refuses_bad_texts(tmp_path):
    (tmp_path / "one.txt").write_text("a" * 2000)
    with pytest.raises(ValueError, match="one has one class only; give data with at least two"):
        language.train("hard", language.load_text(str(tmp_path / "one.txt")), [20], TRAIN)
    (tmp_path / "japanese.txt").write_text("\u72d0\u3068\u8461\u8404" * 1000)
    with pytest.raises(ValueError, match="with 0 of the 30 symbols; give at least 1000"):
        language.load_text(str(tmp_path / "japanese.txt"))
    with pytest.raises(ValueError, match="cannot be read"):
        language.load_text(str(tmp_path / "none.txt"))
    (tmp_path / "digits.txt").write_text("12345 " * 1000)
    with pytest.raises(ValueError, match="of the 30 symbols; give at least 1000"):
        language.load_text(str(tmp_path / "digits.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff" * 1000)
    with pytest.raises(ValueError, match="cannot be read"):
        language.load_text(str(tmp_path / "binary"))
    with pytest.raises(ValueError, match="cannot be read"):
        language.load_text("~/no such text.txt")
    with pytest.raises(ValueError, match="window is 0"):
        language.load_text(window=0)
