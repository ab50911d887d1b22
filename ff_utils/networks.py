"""Whole networks: progressive Forward-Forward, and the multilayer perceptron backprop trains."""

from itertools import pairwise

import torch
from torch import nn

from ff_utils import checks, pairs
from ff_utils.layers import FFLayer, LocalSoftmax, goodness, normalise_

PREDICTIONS = ("goodness", "softmax")
EVALUATION_ROWS = 1000


class ForwardForward(nn.Module):
    """A stack of FF layers that reads an image with a label written in.

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
        self.pixels, self.classes, self.hidden = pixels, classes, list(hidden)
        self.label, self.label_scale, self.normalisation = label, label_scale, normalisation
        inputs = pixels + (classes if label == "joined" else 0)
        generator = torch.Generator().manual_seed(seed)
        settings = {
            "normalisation": normalisation,
            "loss": loss,
            "theta": theta,
            "scale": scale,
            "generator": generator,
            "device": device,
            "dtype": dtype,
        }
        self.layers = nn.ModuleList(
            FFLayer(below, above, **settings) for below, above in pairwise([inputs, *hidden])
        )
        self.softmax = LocalSoftmax(list(hidden), classes, normalisation, device, dtype)
        # One gradient buffer, as large as the largest layer, serves all of them in turn.
        largest = max(layer.weight.numel() for layer in self.layers)
        self.register_buffer(
            "gradient", torch.zeros(largest, device=device, dtype=dtype), persistent=False
        )

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Images (N, pixels) with labels (N,), or the neutral label for None, normalised."""
        h = pairs.with_label(images, labels, self.classes, self.label, self.label_scale)
        normalise_(h, self.normalisation)
        return h

    def forward(self, h: torch.Tensor) -> list[torch.Tensor]:
        """Normalised activities of every layer: (rows, inputs) -> list of (rows, width)."""
        return self.activities(h, len(self.layers))

    def activities(self, h: torch.Tensor, layers: int) -> list[torch.Tensor]:
        """Normalised activities of the first `layers` layers."""
        kept = []
        for layer in self.layers[:layers]:
            h = layer(h)
            normalise_(h, self.normalisation)
            kept.append(h)
        return kept

    def step(self, h: torch.Tensor, positives: int, learning_rate: float) -> torch.Tensor:
        """Train every layer on one batch; returns their losses (layers,).

        h: (rows, inputs), normalised, the first `positives` rows positive; OVERWRITTEN.
        A layer is done before the next one starts: two activations live at a time.
        """
        losses = []
        for layer in self.layers:
            h, loss = layer.step(h, positives, learning_rate, self.gradient)
            losses.append(loss)
        return torch.stack(losses)

    def guess(self, images: torch.Tensor) -> torch.Tensor:
        """Softmax logits (N, classes) of images (N, pixels) under the neutral label."""
        return self.softmax(self(self.inputs(images, None)))

    def label_goodness(self, images: torch.Tensor) -> torch.Tensor:
        """Goodness of every label in every layer: images (N, pixels) -> (layers, N, classes).

        The first layer's image part is computed once and shared by all labels: they differ in
        `classes` inputs only, and their one-hot codes have one length.
        """
        layer = self.layers[0]
        zeros = torch.zeros(len(images), dtype=torch.long, device=images.device)
        h = pairs.with_label(images, zeros, self.classes, self.label, self.label_scale)
        divisor = normalise_(h, self.normalisation)
        place = slice(self.pixels, None) if self.label == "joined" else slice(0, self.classes)
        h[:, place] = 0
        image_part = torch.addmm(layer.bias, h, layer.weight.t())
        label_part = layer.weight[:, place].t()
        found = images.new_empty(len(self.layers), len(images), self.classes)
        for label in range(self.classes):
            y = torch.addcdiv(
                image_part, label_part[label], divisor[:, None], value=self.label_scale
            ).relu_()
            found[0, :, label] = goodness(y)
            for depth, layer_above in enumerate(self.layers[1:], start=1):
                normalise_(y, self.normalisation)
                y = layer_above(y)
                found[depth, :, label] = goodness(y)
        return found

    def predict(
        self, images: torch.Tensor, by: str = "goodness", rows: int = EVALUATION_ROWS
    ) -> torch.Tensor:
        """Class of each image (N,), `rows` images at a time so that memory stays small.

        by: "goodness" takes the label with the most goodness, summed over all layers;
            "softmax" the most probable one under the neutral label.
        """
        checks.one_of("by", by, PREDICTIONS)
        if by == "softmax":
            return torch.cat([self.guess(part).argmax(1) for part in images.split(rows)])
        return torch.cat(
            [self.label_goodness(part).sum(0).argmax(1) for part in images.split(rows)]
        )


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
