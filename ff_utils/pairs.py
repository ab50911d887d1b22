"""Positive and negative samples: an image with its true label and with a wrong one, or without
labels an image and a hybrid of two.

Hinton, "The Forward-Forward Algorithm" (arXiv 2212.13345), sections 3.2 and 3.3.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from ff_utils import checks
from ff_utils.datasets import Dataset

EPSILON = 1e-8  # keeps a row of zeros from being divided by zero
LABELS = ("joined", "pixels", "none")
NEGATIVES = ("random", "hard")


def with_label(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    classes: int,
    label: str = "pixels",
    scale: float = 1.0,
) -> torch.Tensor:
    """Images (N, pixels) with their labels (N,) written in, as a new tensor.

    label: "pixels" overwrites the first `classes` pixels with the one-hot label (Hinton);
        "joined" appends it as `classes` more inputs (the seed); "none" writes nothing.
    labels: None writes the neutral label, 1 / classes everywhere.
    """
    if label == "none":
        return images.clone()
    code = label_code(labels, len(images), classes, scale, images)
    if label == "joined":
        return torch.cat([images, code], dim=1)
    return torch.cat([code, images[:, classes:]], dim=1)


def label_code(
    labels: torch.Tensor | None, rows: int, classes: int, scale: float, like: torch.Tensor
) -> torch.Tensor:
    """One-hot labels times `scale`, (rows, classes); the neutral code where labels is None."""
    if labels is None:
        return like.new_full((rows, classes), scale / classes)
    return like.new_zeros(rows, classes).scatter_(1, labels[:, None], scale)


class Labelled:
    """Images with labels written in, each row normalised, as a first layer reads them.

    Nothing is written: what the image adds to the layer's output is computed once for all labels
    it is tried with, and so is the gradient of the weights that read it. The rows are those of
    one block of N images after the other, a block for each of `labels`: (N,) or None (neutral).
    Otherwise as `with_label` and `layers.normalise_` have it.
    """

    def __init__(
        self, images: torch.Tensor, classes: int, label: str, scale: float, normalisation: str
    ) -> None:
        pixels = images.shape[1]
        joined = label == "joined"
        self.image = images if joined else images[:, classes:]
        self.image_inputs = slice(0, pixels) if joined else slice(classes, None)
        self.code_inputs = slice(pixels, None) if joined else slice(0, classes)
        self.classes, self.scale = classes, scale
        self.width = self.image.shape[1] + classes if normalisation == "mean_square" else 1
        self.squares = torch.linalg.vector_norm(self.image, dim=1).square_()
        self.labels: tuple[torch.Tensor | None, ...] = ()
        self.shared: dict[str, torch.Tensor] = {}

    def with_labels(self, *labels: torch.Tensor | None) -> "Labelled":
        """The same images with these labels, a block of rows for each."""
        rows = copy.copy(self)
        rows.labels = labels
        return rows

    def drop_pixels(self, share: float, generator: torch.Generator) -> None:
        """As `dropped`, of these images: every label meets the same ones. Rows are divided by
        what they had been: it is normalised images that lose pixels, and are not normalised again.
        """
        self.image = dropped(self.image, share, generator)

    def __len__(self) -> int:
        """Rows."""
        return len(self.labels) * len(self.image)

    def times(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Rows times the transpose of `weight` (outputs, inputs), plus `bias`: (rows, outputs)."""
        if "product" not in self.shared:
            self.shared["product"] = self.image @ weight[:, self.image_inputs].t()
        # Label by label, so that rows are read one by one: (classes, outputs).
        codes = weight[:, self.code_inputs].t().mul(self.scale).contiguous()
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
        """Sum over rows of row_scale * y^T times the row, into `dw` (outputs, inputs).

        The image's product is given up: the layer is about to change.
        """
        count, mixed = len(self.image), self.shared.pop("product")
        divisors = torch.cat([self._divisor(labels) for labels in self.labels])
        by_row = (row_scale / divisors)[:, None]
        blocks, shares = y.split(count), by_row.split(count)
        torch.mul(blocks[0], shares[0], out=mixed)
        for block, share in zip(blocks[1:], shares[1:], strict=True):
            mixed.addcmul_(block, share)
        dw[:, self.image_inputs].addmm_(mixed.t(), self.image, beta=0)
        del mixed
        codes = y.new_zeros(len(self), self.classes)
        codes.scatter_(1, torch.cat(self.labels)[:, None], self.scale * by_row)
        dw[:, self.code_inputs].addmm_(y.t(), codes, beta=0)

    def _divisor(self, labels: torch.Tensor | None) -> torch.Tensor:
        code = self.scale**2 / (self.classes if labels is None else 1)
        return self.squares.add(code).sqrt_().div_(math.sqrt(self.width)).add_(EPSILON)


class Written:
    """As `Labelled`, for a first layer that has no image part to share: rows in full.

    write: images (N, pixels) and labels (N,), or None for the neutral one, -> the images' rows,
    normalised.
    """

    def __init__(self, images: torch.Tensor, write: Callable[..., torch.Tensor]) -> None:
        self.images, self.write = images, write

    def with_labels(self, *labels: torch.Tensor | None) -> torch.Tensor:
        """The same images with these labels, a block of rows for each."""
        blocks = [self.write(self.images, chosen) for chosen in labels]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def drop_pixels(self, share: float, generator: torch.Generator) -> None:
        """As `dropped`, of these images: every label meets the same ones. What is left is then
        normalised."""
        self.images = dropped(self.images, share, generator)


def dropped(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Images (N, pixels) with a random `share` of each one's pixels set to zero, and the others
    raised so that their sum stays what it was, on average: dropout."""
    draw = torch.rand(images.shape, generator=generator, device=generator.device)
    return (draw >= share).to(images).mul_(images).div_(1 - share)


def hybrid_images(
    images: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator, blurs: int = 6
) -> torch.Tensor:
    """Of each image (N, pixels) what a smooth random mask shows, and elsewhere of another image.

    Each piece is of a digit and the whole is of none: negatives that need no label, whose
    long-range shape is all that tells them from images. The mask is random bits blurred `blurs`
    times by [1/4, 1/2, 1/4] in both directions, where above a half; one for all channels.
    shape: (height, width) or (channels, height, width) of an image. The other image is the
    row's before: the rows must come in random order. Hinton, section 3.2.
    """
    checks.number("images", len(images), 2)
    *_, height, width = shape
    bits = torch.randint(0, 2, (len(images), height, width), dtype=torch.uint8, generator=generator)
    bits = bits.to(images.device, images.dtype)
    down, across = (_blur(size, blurs).to(images) for size in (height, width))
    mask = (down @ bits @ across.t() > 0.5)[:, None]
    planes = images.view(len(images), -1, height, width)
    return torch.where(mask, planes, planes.roll(1, 0)).flatten(1)


def _blur(size: int, times: int) -> torch.Tensor:
    """What blurring a line `times` times does to it, (size, size); its ends are repeated."""
    beyond = torch.eye(size)[[0, *range(size), size - 1]]
    once = beyond[:-2] / 4 + beyond[1:-1] / 2 + beyond[2:] / 4
    return torch.linalg.matrix_power(once, times)


def random_negatives(
    labels: torch.Tensor, classes: int, generator: torch.Generator
) -> torch.Tensor:
    """A wrong label for each true one (N,), all wrong labels equally likely."""
    shift = torch.randint(1, classes, labels.shape, generator=generator, device=generator.device)
    return (labels + shift.to(labels.device)) % classes


def hard_negatives(
    logits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A wrong label for each true one (N,), drawn as the network itself would guess.

    logits: (N, classes) of the network's guess given a neutral label. The true label's
    probability is set to zero before drawing (Hinton, section 3.3: negatives the network
    finds plausible teach it most).
    """
    return drawn(logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1), generator)


def drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A class for each row of `probabilities` (N, classes), by inverting their cumulative sums:
    one uniform number a row."""
    draw = torch.rand(len(probabilities), 1, generator=generator, device=generator.device)
    cumulative = probabilities.cumsum(dim=1)
    target = draw.to(probabilities) * cumulative[:, -1:]
    found = (cumulative <= target).sum(dim=1)
    # A draw that rounds onto a boundary must not land on a class of probability zero.
    last = probabilities.shape[1] - 1
    landed = probabilities.gather(1, found.clamp(max=last)[:, None])[:, 0] > 0
    return torch.where(landed, found, probabilities.argmax(dim=1))


class Rollouts(nn.Module):
    """Text that a network writes by itself, a stream for each row of a batch: negatives for it.

    Hinton lets his network write from a real beginning and takes what it wrote as negative data,
    in a phase of its own ("sleep"). Here each training step lets every stream write one
    character, so that the network as it is now is the author and one more forward pass all the
    cost; a stream of `length` characters begins anew with a real window. A negative row is a
    stream's window and the character that follows. The streams are buffers, saved in checkpoints.
    """

    def __init__(self, data: Dataset, streams: int, length: int) -> None:
        super().__init__()
        checks.number("rollout_length", length, 1, whole=True)
        if data.shape[-1] != data.classes:
            raise ValueError(f"negatives is 'rollout' and {data.name} is no text: give 'hard'.")
        self.length, self.classes = length, data.classes
        first = data.train_images[:streams]
        self.register_buffer("windows", first.clone())
        # Ages are spread, so that a few streams begin anew in each step, not all in one.
        self.register_buffer("ages", torch.arange(streams, device=first.device) % length)

    def write(
        self, guess: Callable, images: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows (rows, pixels) of as many streams as there are `images`, and what `guess`
        (windows -> logits) lets follow (rows,); `images` are the windows to begin anew with."""
        windows, ages = self.windows[: len(images)], self.ages[: len(images)]
        old = ages >= self.length
        before = torch.where(old[:, None], images, windows)
        after = drawn(guess(before).softmax(dim=1), generator)
        ages.add_(1).masked_fill_(old, 1)
        windows[:, : -self.classes] = before[:, self.classes :]
        windows[:, -self.classes :] = nn.functional.one_hot(after, self.classes)
        return before, after
