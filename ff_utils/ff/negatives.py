"""Negative data and labels in the input: Hinton, arXiv 2212.13345, sections 3.2 and 3.3.

A positive row is an image with its true label, a negative row the same image with a wrong one.
Without labels, a positive row is an image and a negative row a hybrid of two images.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from ff_utils.config import FFConfig
from ff_utils.data import Dataset
from ff_utils.ff.layers import EPSILON
from ff_utils.utils import check_number


def with_label(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    classes: int,
    label: str = "pixels",
    scale: float = 1.0,
) -> torch.Tensor:
    """Images (N, pixels) with their labels (N,), or the neutral label for None, as a new tensor.

    label: "pixels" overwrites the first `classes` pixels with the one-hot label (Hinton);
        "joined" appends it as `classes` more inputs (the original package); "none" writes nothing.
    """
    if label == "none":
        return images.clone()
    code = one_hot(labels, len(images), classes, scale, images)
    if label == "joined":
        return torch.cat([images, code], dim=1)
    return torch.cat([code, images[:, classes:]], dim=1)


def one_hot(
    labels: torch.Tensor | None, rows: int, classes: int, scale: float, like: torch.Tensor
) -> torch.Tensor:
    """One-hot labels times `scale`, (rows, classes); for None the neutral label, all equal."""
    if labels is None:
        return like.new_full((rows, classes), scale / classes)
    return like.new_zeros(rows, classes).scatter_(1, labels[:, None], scale)


class FactoredInput:
    """A first layer's input, images with labels written in, without the rows in memory.

    The product of the images with the weights is computed once for all the labels that are tried,
    and so is the gradient of those weights. The rows are those of `with_label`, normalised.
    """

    def __init__(self, images: torch.Tensor, classes: int, config: FFConfig) -> None:
        pixels, joined = images.shape[1], config.label == "joined"
        self.image = images if joined else images[:, classes:]
        self.image_columns = slice(0, pixels) if joined else slice(classes, None)
        self.label_columns = slice(pixels, None) if joined else slice(0, classes)
        self.classes, self.scale = classes, config.label_scale
        mean_square = config.normalisation == "mean_square"
        self.width = self.image.shape[1] + classes if mean_square else 1
        self.squares = torch.linalg.vector_norm(self.image, dim=1).square_()
        self.labels: tuple[torch.Tensor | None, ...] = ()
        self.shared: dict[str, torch.Tensor] = {}

    def with_labels(self, *labels: torch.Tensor | None) -> "FactoredInput":
        """A block of the N images for each of `labels`, (N,) or None for the neutral label."""
        rows = copy.copy(self)
        rows.labels = labels
        return rows

    def drop_pixels(self, share: float, generator: torch.Generator) -> None:
        """`drop_pixels` of the images; rows are still divided by the norm they had before."""
        self.image = drop_pixels(self.image, share, generator)

    def __len__(self) -> int:
        """Rows."""
        return len(self.labels) * len(self.image)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Rows times the transpose of `weight` (out_features, in_features), plus `bias`."""
        if "product" not in self.shared:
            self.shared["product"] = self.image @ weight[:, self.image_columns].t()
        # A row of `codes` is what one label adds: (classes, out_features), rows read one by one.
        codes = weight[:, self.label_columns].t().mul(self.scale).contiguous()
        y = weight.new_empty(len(self), len(weight))
        for block, labels in zip(y.split(len(self.image)), self.labels, strict=True):
            if labels is None:
                block.copy_(codes.mean(dim=0))
            else:
                torch.index_select(codes, 0, labels, out=block)
            block.add_(self.shared["product"])
            torch.addcdiv(bias, block, self._divisor(labels)[:, None], out=block)
        return y

    def write_gradient(self, y: torch.Tensor, row_scale: torch.Tensor, dw: torch.Tensor) -> None:
        """Write y^T (row_scale * rows) into `dw` (out_features, in_features).

        The images' product is used up, since the weights are about to change.
        """
        count, mixed = len(self.image), self.shared.pop("product")
        divisors = torch.cat([self._divisor(labels) for labels in self.labels])
        by_row = (row_scale / divisors)[:, None]
        blocks, shares = y.split(count), by_row.split(count)
        torch.mul(blocks[0], shares[0], out=mixed)
        for block, share in zip(blocks[1:], shares[1:], strict=True):
            mixed.addcmul_(block, share)
        dw[:, self.image_columns].addmm_(mixed.t(), self.image, beta=0)
        del mixed
        codes = y.new_zeros(len(self), self.classes)
        codes.scatter_(1, torch.cat(self.labels)[:, None], self.scale * by_row)
        dw[:, self.label_columns].addmm_(y.t(), codes, beta=0)

    def _divisor(self, labels: torch.Tensor | None) -> torch.Tensor:
        """What `normalise_` divides the rows with these labels by, (N,)."""
        code = self.scale**2 / (self.classes if labels is None else 1)
        return self.squares.add(code).sqrt_().div_(math.sqrt(self.width)).add_(EPSILON)


class DenseInput:
    """As `FactoredInput`, with the rows in memory; encode: (images, labels) -> normalised rows."""

    def __init__(self, images: torch.Tensor, encode: Callable[..., torch.Tensor]) -> None:
        self.images, self.encode = images, encode

    def with_labels(self, *labels: torch.Tensor | None) -> torch.Tensor:
        """A block of N rows for each of `labels`."""
        blocks = [self.encode(self.images, block) for block in labels]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def drop_pixels(self, share: float, generator: torch.Generator) -> None:
        """`drop_pixels` of the images; rows are normalised after it."""
        self.images = drop_pixels(self.images, share, generator)


def drop_pixels(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Dropout: a random `share` of each image's pixels set to zero, the others divided by
    1 - share, so that an image's sum stays the same on average. Images (N, pixels)."""
    if not share:
        return images
    draw = torch.rand(images.shape, generator=generator, device=generator.device)
    return (draw >= share).to(images).mul_(images).div_(1 - share)


def random_negatives(
    labels: torch.Tensor, classes: int, generator: torch.Generator
) -> torch.Tensor:
    """A wrong label for each true one (N,), all wrong labels equally likely."""
    shift = torch.randint(1, classes, labels.shape, generator=generator, device=generator.device)
    return (labels + shift.to(labels.device)) % classes


def hard_negatives(
    logits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A wrong label for each true one (N,), drawn from what the classifier predicts: section 3.3.

    logits: (N, classes) under the neutral label. A nan counts as the least plausible.
    """
    logits = logits.float().nan_to_num(torch.finfo(torch.float32).min)
    return sample_classes(logits.scatter_(1, labels[:, None], -torch.inf).softmax(dim=1), generator)


def sample_classes(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A class for each row of `probabilities` (N, classes), never one of probability zero."""
    # In float32: in less precision a number below 1 is rounded to 1.
    draw = torch.rand(len(probabilities), 1, generator=generator, device=generator.device)
    cumulative = probabilities.cumsum(dim=1, dtype=torch.float32)
    target = draw.to(cumulative) * cumulative[:, -1:]
    sampled = (cumulative <= target).sum(dim=1).clamp_(max=probabilities.shape[1] - 1)
    # Rounding can end on a class of probability zero.
    possible = probabilities.gather(1, sampled[:, None])[:, 0] > 0
    return torch.where(possible, sampled, probabilities.argmax(dim=1))


def hybrid_images(
    images: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator, mask_blurs: int = 6
) -> torch.Tensor:
    """Of each image (N, pixels) what a smooth random mask shows, elsewhere another image's.

    Negatives that need no label and that only long-range shape can tell from images (Hinton,
    section 3.2). The mask, one for all channels, is where random bits, blurred `mask_blurs` times
    by [1/4, 1/2, 1/4] in both directions, exceed a half. The other image is that of the row
    before: rows must come in random order. shape: ([channels,] height, width) of an image.
    """
    check_number("images", len(images), 2)
    *_, height, width = shape
    bits = torch.randint(0, 2, (len(images), height, width), dtype=torch.uint8, generator=generator)
    bits = bits.to(images.device, images.dtype)
    down, across = (_blur(size, mask_blurs).to(images) for size in (height, width))
    mask = (down @ bits @ across.t() > 0.5)[:, None]
    planes = images.view(len(images), -1, height, width)
    return torch.where(mask, planes, planes.roll(1, 0)).flatten(1)


def _blur(size: int, times: int) -> torch.Tensor:
    """The matrix (size, size) that blurs a line `times` times; its ends are repeated."""
    padded = torch.eye(size)[[0, *range(size), size - 1]]
    once = padded[:-2] / 4 + padded[1:-1] / 2 + padded[2:] / 4
    return torch.linalg.matrix_power(once, times)


class Rollouts(nn.Module):
    """Negatives for text: what the network itself writes, one stream of text a row of a batch.

    In Hinton's paper the network writes in a phase of its own ("sleep"). Here every training step
    lets each stream write one character, at the cost of one more forward pass. A negative row is a
    stream's window and that character. A stream begins anew with a real window after `length`.
    """

    def __init__(self, data: Dataset, streams: int, length: int) -> None:
        super().__init__()
        check_number("rollout_length", length, 1, whole=True)
        if data.shape[-1] != data.classes:
            raise ValueError(f"negatives is 'rollout' and {data.name} is no text: give 'hard'.")
        self.length, self.classes = length, data.classes
        first = data.train_images[:streams]
        self.register_buffer("windows", first.clone())
        # Ages are spread, so that a few streams begin anew in each step, not all in one.
        self.register_buffer("ages", torch.arange(streams, device=first.device) % length)

    def write(
        self, classify: Callable, images: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows (rows, pixels) of a stream for each of `images`, the real windows to begin anew
        with, and the characters (rows,) drawn from `classify` (windows -> logits) to follow them.
        """
        windows, ages = self.windows[: len(images)], self.ages[: len(images)]
        ended = ages >= self.length
        before = torch.where(ended[:, None], images, windows)
        after = sample_classes(classify(before).softmax(dim=1), generator)
        ages.add_(1).masked_fill_(ended, 1)
        windows[:, : -self.classes] = before[:, self.classes :]
        windows[:, -self.classes :] = nn.functional.one_hot(after, self.classes)
        return before, after
