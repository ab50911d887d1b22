import itertools

import pytest
import torch

from ff_utils.ff import negatives


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_negatives_are_wrong_and_every_wrong_label_is_as_likely():
    labels = torch.arange(10).repeat(9000)
    wrong = negatives.random_negatives(labels, 10, generator())
    assert (wrong != labels).all() and wrong.min() == 0 and wrong.max() == 9
    counts = torch.zeros(10, 10).index_put_((labels, wrong), torch.ones(90_000), accumulate=True)
    off_diagonal = counts[~torch.eye(10, dtype=bool)]
    assert (off_diagonal - 1000).abs().max() < 5 * 1000**0.5


def test_hard_negatives_follow_the_softmax_without_the_true_label():
    logits = torch.tensor([3.0, 1.0, 0.0, 2.0]).repeat(60_000, 1)
    labels = torch.zeros(60_000, dtype=torch.long)
    sampled = negatives.hard_negatives(logits, labels, generator())
    assert (sampled != 0).all()
    expected = torch.tensor([1.0, 0.0, 2.0]).softmax(0)
    found = sampled.bincount(minlength=4)[1:] / 60_000
    assert torch.allclose(found, expected, atol=0.01)


@pytest.mark.parametrize("sure", [200.0, 1e4])
def test_hard_negatives_are_wrong_however_sure_the_network_is(sure):
    labels = torch.arange(10).repeat(500)
    for towards in (labels, (labels + 3) % 10):
        logits = torch.full((5000, 10), -sure).scatter(1, towards[:, None], sure)
        sampled = negatives.hard_negatives(logits, labels, generator())
        assert (sampled != labels).all() and sampled.min() >= 0 and sampled.max() <= 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3])
def test_hard_negatives_are_wrong_whatever_the_logits(dtype, classes):
    odd = [0.0, torch.inf, -torch.inf, torch.nan]
    logits = torch.tensor(list(itertools.product(odd, repeat=classes)), dtype=dtype)
    for label in range(classes):
        labels = torch.full((len(logits),), label)
        for seed in range(20):
            wrong = negatives.hard_negatives(logits, labels, generator(seed))
            assert (wrong != label).all() and wrong.min() >= 0 and wrong.max() < classes


def test_hard_negatives_take_an_infinite_logit_and_leave_a_nan():
    logits = torch.tensor([[0.0, torch.inf, 0.0, 5.0], [0.0, torch.nan, 0.0, -torch.inf]])
    labels = torch.tensor([0, 0])
    for seed in range(20):
        assert negatives.hard_negatives(logits, labels, generator(seed)).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sampled_classes_stay_in_range_and_follow_the_probabilities_in_any_precision(dtype):
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0], dtype=dtype).repeat(1_000_000, 1)
    sampled = negatives.sample_classes(probabilities, generator())
    assert sampled.max() == 3
    found = sampled.bincount(minlength=5) / 1_000_000
    assert torch.allclose(found, probabilities[0].float(), atol=0.003)


def test_label_is_written_over_the_first_pixels_or_appended():
    images = torch.rand(3, 20)
    labels = torch.tensor([0, 4, 9])
    kept = images.clone()
    written = negatives.with_label(images, labels, 10, "pixels", scale=4.0)
    assert torch.equal(images, kept)
    assert torch.equal(written[:, 10:], images[:, 10:])
    assert torch.equal(written[:, :10], 4.0 * torch.eye(10)[labels])
    joined = negatives.with_label(images, labels, 10, "joined")
    assert torch.equal(joined, torch.cat([images, torch.eye(10)[labels]], dim=1))


def test_neutral_label_is_the_same_for_every_class():
    neutral = negatives.with_label(torch.rand(2, 20), None, 10, "pixels", scale=4.0)
    assert torch.allclose(neutral[:, :10], torch.full((2, 10), 0.4))


def test_dropped_pixels_are_zero_and_the_others_make_up_for_them():
    images = torch.rand(2000, 20, generator=generator(1)) + 0.1
    kept = negatives.drop_pixels(images, 0.25, generator())
    assert torch.allclose(kept[kept != 0], images[kept != 0] / 0.75)
    assert abs((kept != 0).float().mean() - 0.75) < 0.01


@pytest.mark.parametrize("shape", [(9, 11), (3, 9, 11)])
def test_hybrid_is_of_one_image_in_the_mask_and_of_another_elsewhere(shape):
    # Every image is of one number, so that a pixel says which image it comes from.
    numbers = torch.arange(50.0)[:, None].repeat(1, 99 * (1 if len(shape) == 2 else 3))
    hybrids = negatives.hybrid_images(numbers, shape, generator(), 3)
    own = hybrids == numbers
    other = hybrids == (numbers - 1) % 50
    assert (own ^ other).all()  # the row before
    assert 0.4 < own.float().mean() < 0.6
    if len(shape) == 3:  # one mask for all channels
        planes = own.view(50, 3, 99)
        assert (planes == planes[:, :1]).all()
    again = negatives.hybrid_images(numbers, shape, generator(), 3)
    assert torch.equal(hybrids, again)


def test_hybrids_mask_is_random_bits_blurred_again_and_again():
    bits = torch.randint(0, 2, (2, 6, 7), generator=generator()).double()
    blurred = bits.clone()
    for _ in range(4):
        for dim in (1, 2):
            size = blurred.shape[dim]
            before = blurred.index_select(dim, torch.arange(-1, size - 1).clamp(min=0))
            after = blurred.index_select(dim, torch.arange(1, size + 1).clamp(max=size - 1))
            blurred = before / 4 + blurred / 2 + after / 4
    images = torch.stack([torch.ones(42), torch.zeros(42)]).double()
    found = negatives.hybrid_images(images, (6, 7), generator(), 4).view(2, 6, 7)
    assert torch.equal(found[0] == 1, blurred[0] > 0.5)
    assert torch.equal(found[1] == 0, blurred[1] > 0.5)


def test_hybrids_have_larger_pieces_with_more_blurs():
    images = torch.stack([torch.ones(784), torch.zeros(784)]).repeat(100, 1)
    edges = []
    for blurs in (1, 6, 20):
        found = negatives.hybrid_images(images, (28, 28), generator(), blurs).view(-1, 28, 28)
        edges.append((found[:, 1:] != found[:, :-1]).float().mean().item())
    assert edges[0] > 1.5 * edges[1] > 2 * edges[2]


def test_hybrids_need_two_images():
    with pytest.raises(ValueError, match="images is 1; give a number of at least 2"):
        negatives.hybrid_images(torch.rand(1, 16), (4, 4), generator())
