"""Whole networks: progressive Forward-Forward, and the multilayer perceptron backprop trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from ff_utils import checks, pairs
from ff_utils.layers import FFLayer, LocalSoftmax, normalise_
from ff_utils.live_bytes import counted_as

PREDICTIONS = ("softmax", "goodness", "both")
EVALUATION_ROWS = 2000


class ForwardForward(nn.Module):
    """A stack of FF layers that reads an image with a label written in.

    guesses: have a softmax that reads the layers, predicts from the neutral label, and draws
        hard negatives. Without, there is nothing but the layers: predict by goodness.
    first_read: the first layer that the softmax reads, from 1; Hinton's reads from 2.
    recompute: compute the activations that the softmax learns from again, rather than keep one of
        every layer: less memory for one more forward pass, to the same bits.
    With label="none" the network reads the image alone: train it by `train_unsupervised`.
    Hinton, arXiv 2212.13345, section 3.3; with label="joined", normalisation="length",
    theta=2 and scale=1, the seed's network.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        hidden: list[int],
        *,
        label: str = "pixels",
        label_scale: float = 1.0,
        normalisation: str = "mean_square",
        loss: str = "softplus",
        theta: float = 2.0,
        scale: float = 1.0,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        guesses: bool = True,
        first_read: int = 1,
        recompute: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.whole_numbers("hidden", hidden, 1)
        checks.number("classes", classes, 2, whole=True)
        checks.one_of("label", label, pairs.LABELS)
        checks.number("label_scale", label_scale, 0, above=True)
        checks.number("pixels", pixels, classes if label == "pixels" else 1, whole=True)
        if label == "none" and not guesses:
            raise ValueError("label is 'none': the softmax alone can predict, give guesses=True.")
        self.pixels, self.classes, self.hidden = pixels, classes, list(hidden)
        self.settings = {"pixels": pixels, "classes": classes, "hidden": list(hidden)}
        self.settings |= {"label": label, "label_scale": label_scale, "loss": loss}
        self.settings |= {"normalisation": normalisation, "theta": theta, "scale": scale}
        self.settings |= {"optimizer": optimizer, "guesses": guesses, "seed": seed}
        self.settings |= {"first_read": first_read, "weight_decay": weight_decay}
        self.label, self.label_scale, self.normalisation = label, label_scale, normalisation
        self.recompute = recompute
        inputs = pixels + (classes if label == "joined" else 0)
        generator = torch.Generator().manual_seed(seed)
        settings = {
            "normalisation": normalisation,
            "loss": loss,
            "theta": theta,
            "scale": scale,
            "optimizer": optimizer,
            "weight_decay": weight_decay,
            "generator": generator,
            "dtype": dtype,
        }
        # One gradient buffer, as large as the largest layer, serves all of them in turn.
        plan = self.plan(inputs)
        largest = max(weights for _, weights in plan)
        self.register_buffer(
            "gradient", torch.zeros(largest, device=device, dtype=dtype), persistent=False
        )
        self.layers = nn.ModuleList(
            self.place(number, partial(make, **settings)) for number, (make, _) in enumerate(plan)
        )
        self.softmax = None
        if guesses:
            kind = (normalisation, optimizer, device, dtype)
            self.softmax = LocalSoftmax(list(hidden), classes, *kind, first=first_read)

    def plan(self, inputs: int) -> list[tuple[Callable[..., FFLayer], int]]:
        """What makes each layer above `inputs` inputs, and how many weights it has."""
        sizes = pairwise([inputs, *self.hidden])
        return [(partial(FFLayer, below, above), below * above) for below, above in sizes]

    def place(self, number: int, make: Callable[..., FFLayer]) -> FFLayer:
        """Make a layer where it lives: here, on the device with all others."""
        return make(device=self.gradient.device)

    def visit(self, numbers: Sequence[int], update: bool = False) -> Iterator[FFLayer]:
        """The layers of these numbers, one after the other, each ready to run; `update` says
        that it will be trained."""
        for number in numbers:
            yield self.layers[number]

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Images (N, pixels) with labels (N,), or the neutral label for None, normalised."""
        images = images.to(self.gradient.dtype)
        h = pairs.with_label(images, labels, self.classes, self.label, self.label_scale)
        normalise_(h, self.normalisation)
        return h

    def labelled(self, images: torch.Tensor) -> pairs.Labelled | pairs.Written:
        """Images (N, pixels) as the first layer reads them, whatever their labels will be."""
        if self.label == "none":
            return pairs.Written(images, self.inputs)
        images = images.to(self.gradient.dtype)
        choices = (self.label, self.label_scale, self.normalisation)
        return pairs.Labelled(images, self.classes, *choices)

    def forward(self, h: torch.Tensor) -> list[torch.Tensor]:
        """Normalised activations of every layer: (rows, inputs) -> list of (rows, width)."""
        return list(self.activations(h, len(self.layers)))

    def activations(self, h: torch.Tensor | pairs.Labelled, layers: int) -> Iterator[torch.Tensor]:
        """Normalised activations of the first `layers` layers, one at a time."""
        for layer in self.visit(range(layers)):
            h = layer(h)
            layer.normalise_(h)
            yield h

    def keep(self, h: torch.Tensor | pairs.Labelled, layers: int) -> Iterable[torch.Tensor]:
        """`activations` that can be read more than once: kept, or computed each time."""
        if self.recompute:
            return _Recomputed(partial(self.activations, h, layers))
        return list(self.activations(h, layers))

    def step(
        self,
        h: torch.Tensor | pairs.Labelled,
        positives: int,
        learning_rate: float,
        micro_batches: int = 1,
    ) -> torch.Tensor:
        """Train every layer on one batch; returns their losses (layers,).

        h: (rows, inputs), normalised, the first `positives` rows positive; OVERWRITTEN. Or
           `labelled` rows, with which the first layer computes its image part once.
        A layer is done before the next one starts: two activations live at a time, or one and
        a part with `micro_batches`.
        """
        losses = []
        for layer in self.visit(range(len(self.layers)), update=True):
            h, loss = layer.step(h, positives, learning_rate, self.gradient, micro_batches)
            losses.append(loss)
        return torch.stack(losses)

    def step_accumulated(
        self, h: torch.Tensor, positives: int, learning_rate: float, micro_batches: int
    ) -> torch.Tensor:
        """As `step`, but each part of the batch goes through all layers before the next one.

        Less where activations outweigh weights: a gradient of every layer is kept from part to
        part, and activations of one part only. h: (rows, inputs), normalised; left as it is.
        """
        numbers = range(len(self.layers))
        with counted_as("gradients"):
            gradients = [
                (torch.empty_like(layer.weight), torch.empty_like(layer.bias))
                for layer in self.visit(numbers)
            ]
        losses, size = 0, -(-len(h) // micro_batches)
        for start in range(0, len(h), size):
            y, found, rows = h[start : start + size].clone(), [], (start, positives, len(h))
            for layer, (dw, db) in zip(self.visit(numbers), gradients, strict=True):
                y, loss = layer.add_gradient(y, rows, dw, db, first=start == 0)
                found.append(loss)
            losses = losses + torch.stack(found)
            del y
        for layer, pair in zip(self.visit(numbers, update=True), gradients, strict=True):
            layer.optimizer.update(list(pair), learning_rate)
        return losses

    def guess(self, images: torch.Tensor) -> torch.Tensor:
        """Softmax logits (N, classes) of images (N, pixels) under the neutral label.

        ValueError for a network built without a softmax.
        """
        if self.softmax is None:
            raise ValueError("this network was built with guesses=False: predict by 'goodness'.")
        neutral = self.labelled(images).with_labels(None)
        return self.softmax(self.activations(neutral, len(self.layers)))

    def label_goodness(self, images: torch.Tensor) -> torch.Tensor:
        """Goodness of every label in every layer: images (N, pixels) -> (layers, N, classes).

        The labels go through a layer together, so that each layer is visited once.
        """
        if self.label == "none":
            raise ValueError("label is 'none': no goodness tells of a label, predict by 'softmax'.")
        count = len(images)
        tried = torch.arange(self.classes, device=images.device)[:, None].expand(-1, count)
        h = self.labelled(images).with_labels(*tried.contiguous())
        found = self.gradient.new_empty(len(self.layers), self.classes, count)
        for number, layer in enumerate(self.visit(range(len(self.layers)))):
            h = layer(h)
            g = layer.goodness_of(layer.normalise_(h))
            found[number] = g.view(self.classes, count)
        return found.transpose(1, 2)

    def scores(self, images: torch.Tensor, by: str) -> torch.Tensor:
        """What each label has for it: images (N, pixels) -> (N, classes), largest is best.

        by: "softmax", the logits under the neutral label; "goodness", summed over all layers;
            "both", the log probability of the softmax plus, as a mean over layers, the goodness
            times its sharpness `scale`, which makes it a log probability too.
        """
        checks.one_of("by", by, PREDICTIONS)
        if by == "softmax":
            return self.guess(images)
        found = self.label_goodness(images)
        if by == "goodness":
            return found.sum(0)
        return found.mean(0).mul_(self.settings["scale"]).add_(self.guess(images).log_softmax(1))

    def predict(
        self, images: torch.Tensor, by: str = "goodness", rows: int = EVALUATION_ROWS
    ) -> torch.Tensor:
        """Class of each image (N,), `rows` network inputs at a time so that memory stays small.

        by: as in `scores`, whose largest is taken.
        """
        size = rows if by == "softmax" else max(1, rows // self.classes)
        return torch.cat([self.scores(part, by).argmax(1) for part in images.split(size)])


class _Recomputed:
    """What `make` yields, as often as it is read."""

    def __init__(self, make: Callable[[], Iterator[torch.Tensor]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.make()


def backprop_network(
    pixels: int,
    classes: int,
    hidden: list[int],
    *,
    seed: int = 0,
    normalised: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Linear and ReLU layers of the given widths, then a linear classifier.

    normalised: put the seed's normalisation (each row to length 1) between the hidden layers,
        as its "backprop" network does.
    """
    checks.whole_numbers("hidden", hidden, 1)
    kind = {"device": device, "dtype": dtype}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for number, (below, above) in enumerate(pairwise([pixels, *hidden])):
            if normalised and number > 0:
                modules.append(RowNormalisation())
            modules += [nn.Linear(below, above, **kind), nn.ReLU()]
        modules.append(nn.Linear(hidden[-1], classes, **kind))
    return nn.Sequential(*modules)


class RowNormalisation(nn.Module):
    """Each row to length 1: (rows, width) -> (rows, width)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Divide by the norm."""
        return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)
