import math

import pytest
import torch

from ff_utils import language


def test_cleaning_keeps_words_apart_and_uses_thirty_symbols():
    assert (
        language.clean('He met\nwith "a wolf!"  It\'s gone: so')
        == "he met with a wolf. its gone; so"
    )
    assert len(set(language.SYMBOLS)) == 30
    assert set(language.clean(language.FABLES.read_text())) <= set(language.SYMBOLS)


def test_the_built_in_text_is_long_enough_and_ascii():
    text = language.FABLES.read_text(encoding="ascii")
    assert len(text) >= 60_000


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


def test_n_gram_probabilities_sum_to_one_and_count_right():
    codes = language.encode("abab" * 5)
    model = language.NGram(codes, 2)
    for context in ("", "a", "b", "z", "ab"):
        assert math.fsum(model.probabilities(context)) == pytest.approx(1)
    # After "a" always "b": 10 counts of one kind, backing off to p(b) = (10 + 2/30) / 22.
    below = (10 + 2 / 30) / 22
    assert model.probabilities("a")[1] == pytest.approx((10 + below) / 11)


def test_a_longer_context_predicts_real_text_better():
    data = language.load_text()
    codes = torch.cat([data.train_images[0].reshape(10, 30).argmax(1), data.train_labels])
    text = torch.cat([data.test_images[0].reshape(10, 30).argmax(1), data.test_labels])[:2000]
    found = [
        language.perplexity(language.NGram(codes, n).logits(text, 10), text[10:]) for n in (1, 2, 3)
    ]
    assert found[0] > found[1] > found[2]


def test_generation_follows_its_model_and_seed():
    def always_b(rows):
        return torch.full((1, 30), -99.0).index_fill(1, torch.tensor([1]), 99.0)

    assert language.generate(always_b, "x", 5, 10) == "bbbbb"

    def blind(rows):
        return torch.zeros(1, 30)

    first = language.generate(blind, "", 30, 10, seed=1)
    assert first == language.generate(blind, "", 30, 10, seed=1)
    assert first != language.generate(blind, "", 30, 10, seed=2)


def test_bad_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        language.load_text(str(tmp_path / "none.txt"))
    (tmp_path / "digits.txt").write_text("12345 " * 1000)
    with pytest.raises(ValueError, match="of the 30 symbols; give at least 1000"):
        language.load_text(str(tmp_path / "digits.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff" * 1000)
    with pytest.raises(ValueError, match="cannot be read"):
        language.load_text(str(tmp_path / "binary"))
    with pytest.raises(ValueError, match="window is 0"):
        language.load_text(window=0)
