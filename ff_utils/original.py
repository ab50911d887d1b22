"""The first study's systems as it wrote them, to measure what it measured.

Not to learn with: `ff` has each done right. Source: the repository
diegofiori/test-forward-forward-pytorch, and the `forward_forward` package it trains.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from ff_utils.backprop import RowNormalisation
from ff_utils.optimizers import TORCH_OPTIMIZERS
from ff_utils.utils import allocation_category

# A positive and a negative copy of MNIST's training set, whose activations it caches.
DATASET_ROWS = 120_000
THRESHOLD, STEPS = 2.0, 8
normalised = RowNormalisation()


class OriginalLayer(nn.Module):
    """Linear and ReLU with an optimizer of its own, trained by autograd."""

    def __init__(
        self, in_features: int, out_features: int, optimizer: str, **factory: object
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, **factory)
        # One tensor after the other on every device, as PyTorch did at the first study's time.
        self.optimizer = TORCH_OPTIMIZERS[optimizer](self.parameters(), lr=0.03, foreach=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """relu(h W^T + b): (rows, in_features) -> (rows, out_features)."""
        return self.linear(h).relu()

    def learn(self, y: torch.Tensor, positives: int) -> None:
        """One step on an output of this layer whose first `positives` rows are positive."""
        parts = (y[:positives].clone(), -1), (y[positives:].clone(), 1)
        loss = 0
        for part, sign in parts:
            logits = sign * (part.pow(2).mean(dim=1) - THRESHOLD)
            loss = loss + torch.log(1 + torch.nan_to_num(torch.exp(logits))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class OriginalForwardForward(nn.Module):
    """The first study's base network: one layer after the other, gradients kept, the data set's
    activations cached on the device, those of a layer and of the next one together."""

    def __init__(
        self, pixels: int, classes: int, hidden: list[int], *, optimizer: str, **factory: object
    ) -> None:
        super().__init__()
        self.classes, self.factory = classes, factory
        self.layers = nn.ModuleList(
            OriginalLayer(below, above, optimizer, **factory)
            for below, above in pairwise([pixels + classes, *hidden])
        )
        # A run comes to its last layer with gradients and optimizer states of all the others.
        for layer in self.layers[:-1]:
            layer.learn(layer(normalised(torch.rand(2, layer.linear.in_features, **factory))), 1)

    def last_stage(self, batch: int, rows: int) -> None:
        """One training step of the last layer, then its output for a data set of `rows`."""
        layer = self.layers[-1]
        with allocation_category("inputs"):
            cached = torch.rand(rows, layer.linear.in_features, **self.factory)
        parts = cached.split(batch)
        layer.learn(layer(normalised(parts[0])), len(parts[0]) // 2)
        outputs = []
        with torch.no_grad():
            for part in parts:
                z = layer.linear(normalised(part))
                with allocation_category("inputs"):
                    outputs.append(z.relu())
                del z

    def step(self, h: torch.Tensor, positives: int) -> None:
        """Train every layer on one batch (rows, pixels + classes)."""
        for layer in self.layers:
            layer.learn(layer(normalised(h)), positives)
            with torch.no_grad():
                h = layer(normalised(h))

    @torch.no_grad()
    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """Try every label on images (N, pixels); returns the last one's goodness (N,)."""
        for label in range(self.classes):
            code = images.new_zeros(len(images), self.classes)
            code[:, label] = 1
            h = torch.cat([images, code], dim=1)
            total = images.new_zeros(len(images))
            for layer in self.layers:
                h = layer(normalised(h))
                total += h.pow(2).mean(dim=1)
        return total


class OriginalRecurrent(nn.Module):
    """The first study's recurrent network: each layer reads the one below and the one above, its
    state 0.3 old and 0.7 new, for 8 steps; the label is the topmost state.

    It keeps the states of this time step and of the next, those that the negatives began with,
    and, under a view of half of them, those that the last batch ended with.
    """

    def __init__(
        self, pixels: int, classes: int, hidden: list[int], *, optimizer: str, **factory: object
    ) -> None:
        super().__init__()
        width = hidden[0]
        self.classes = classes
        self.projector = OriginalLayer(pixels, width, optimizer, **factory)
        self.layers = nn.ModuleList(
            OriginalLayer(2 * width, width, optimizer, **factory) for _ in hidden
        )
        self.from_label = OriginalLayer(classes, width, optimizer, **factory)
        self.softmax = nn.Linear(width, classes, **factory)
        self.returned: list[torch.Tensor] = []

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One batch, images (N, pixels) and one-hot labels (N, classes), 8 time steps."""
        count = len(images)
        with torch.no_grad():
            states = self._bottom_up(images, labels)
            negative_states = self._bottom_up(images, labels.roll(1, dims=1))
            states = [torch.cat(pair) for pair in zip(states, negative_states, strict=True)]
            rows = torch.cat([images, images])
        projected = self.projector(normalised(rows))
        self.projector.learn(projected, count)
        learn = partial(OriginalLayer.learn, positives=count)
        for _ in range(STEPS):
            new = self._time_step(states, projected, learn)
            with torch.no_grad():
                self.softmax(normalised(states[-2][count:].clone())).softmax(dim=1)
                states = [*new, states[-1].clone()]
        self.returned = [state[:count] for state in states]

    @torch.no_grad()
    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """Goodness of every label: images (N, pixels) -> (N, classes), all in one go."""
        rows = images.repeat_interleave(self.classes, dim=0)
        labels = torch.eye(self.classes, dtype=images.dtype, device=images.device)
        states = self._bottom_up(rows, labels.repeat(len(images), 1))
        projected = self.projector(normalised(rows))
        total = projected.pow(2).mean(dim=1)

        def add(_: OriginalLayer, x: torch.Tensor) -> None:
            total.add_(x.pow(2).mean(dim=1))

        for _ in range(STEPS):
            states = [*self._time_step(states, projected, add), states[-1]]
        return total.view(len(images), self.classes)

    def _time_step(self, states: list[torch.Tensor], x: torch.Tensor, use: Callable) -> list:
        """The next states but for the label's, x first; use(layer, state) is called for each."""
        new = [x]
        for number, layer in enumerate(self.layers):
            below, same, above = states[number : number + 3]
            if number == len(self.layers) - 1:
                above = self.from_label(normalised(above)).detach()  # its graph is freed here
            new.append(self._damped(layer, below, same, above))
            use(layer, new[-1])
        return new

    def _bottom_up(self, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        x, states = self.projector(normalised(images)), []
        for layer in self.layers:
            states.append(x)
            x = self._damped(layer, x, torch.zeros_like(x), torch.zeros_like(x))
        return [*states, x, labels]

    @staticmethod
    def _damped(
        layer: OriginalLayer, below: torch.Tensor, same: torch.Tensor, above: torch.Tensor
    ) -> torch.Tensor:
        both = torch.cat([below.detach(), above.detach()], dim=1)
        return 0.3 * same.detach() + 0.7 * layer(normalised(both))
