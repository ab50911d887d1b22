"""The three systems of the seed as it wrote them, to measure what it measured.

Not to learn with: `networks` has each done right. Source: the seed's repository,
diegofiori/test-forward-forward-pytorch, and the `forward_forward` package it trains.
"""

from itertools import pairwise

import torch
from torch import nn

from ff_utils.live_bytes import counted_as
from ff_utils.remedies import OPTIMIZERS

# A positive and a negative copy of MNIST's training set, whose activations it caches.
DATASET_ROWS = 120_000
THETA, STEPS = 2.0, 8


class Layer(nn.Module):
    """Linear and ReLU with an optimizer of its own, trained by autograd."""

    def __init__(self, inputs: int, outputs: int, optimizer: str, **kind: object) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, **kind)
        # One tensor after the other on every device, as PyTorch did when the seed was measured.
        self.optimizer = OPTIMIZERS[optimizer](self.parameters(), lr=0.03, foreach=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """relu(h W^T + b): (rows, inputs) -> (rows, outputs)."""
        return self.linear(h).relu()

    def learn(self, y: torch.Tensor, positives: int) -> None:
        """One step on an output of this layer whose first `positives` rows are positive."""
        parts = (y[:positives].clone(), -1), (y[positives:].clone(), 1)
        loss = 0
        for part, sign in parts:
            logits = sign * (part.pow(2).mean(dim=1) - THETA)
            loss = loss + torch.log(1 + torch.nan_to_num(torch.exp(logits))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def normalised(h: torch.Tensor) -> torch.Tensor:
    """Each row to length 1."""
    return h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-8)


class ProgressiveForwardForward(nn.Module):
    """The seed's base network: one layer after the other, the data set's activations cached on
    the device, those of a layer and of the next one together. Gradients are kept."""

    def __init__(
        self, pixels: int, classes: int, hidden: list[int], *, optimizer: str, **kind: object
    ) -> None:
        super().__init__()
        self.classes, self.kind = classes, kind
        self.layers = nn.ModuleList(
            Layer(below, above, optimizer, **kind)
            for below, above in pairwise([pixels + classes, *hidden])
        )
        # A run comes to its last layer with gradients and optimizer states of all the others.
        for layer in self.layers[:-1]:
            self._train(layer, torch.rand(2, layer.linear.in_features, **kind), 1)

    def last_stage(self, batch: int, rows: int) -> None:
        """One training step of the last layer, then its output for a data set of `rows`."""
        layer = self.layers[-1]
        with counted_as("inputs"):
            cached = torch.rand(rows, layer.linear.in_features, **self.kind)
        parts = cached.split(batch)
        self._train(layer, parts[0], len(parts[0]) // 2)
        outputs = []
        with torch.no_grad():
            for part in parts:
                z = layer.linear(normalised(part))
                with counted_as("inputs"):
                    outputs.append(z.relu())
                del z

    def step(self, h: torch.Tensor, positives: int) -> None:
        """Train every layer on one batch (rows, inputs): the arithmetic of an epoch's step."""
        for layer in self.layers:
            self._train(layer, h, positives)
            with torch.no_grad():
                h = layer(normalised(h))

    @torch.no_grad()
    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """Goodness of the last label tried, all ten having been tried in turn."""
        for label in range(self.classes):
            one_hot = images.new_zeros(len(images), self.classes)
            one_hot[:, label] = 1
            h = torch.cat([images, one_hot], dim=1)
            total = images.new_zeros(len(images))
            for layer in self.layers:
                h = layer(normalised(h))
                total += h.pow(2).mean(dim=1)
        return total

    def _train(self, layer: Layer, h: torch.Tensor, positives: int) -> None:
        layer.learn(layer(normalised(h)), positives)


class RecurrentForwardForward(nn.Module):
    """The seed's recurrent network: each layer listens to the one below and the one above, its
    state 0.3 old and 0.7 new, for 8 steps; the label is the topmost state.

    What it keeps: the states of this time step and of the next, those that the negatives began
    with, and, under a view of half of them, those the last batch ended with.
    """

    def __init__(
        self, pixels: int, classes: int, hidden: list[int], *, optimizer: str, **kind: object
    ) -> None:
        super().__init__()
        width = hidden[0]
        self.classes = classes
        self.projector = Layer(pixels, width, optimizer, **kind)
        self.layers = nn.ModuleList(Layer(2 * width, width, optimizer, **kind) for _ in hidden)
        self.from_label = Layer(classes, width, optimizer, **kind)
        self.softmax = nn.Linear(width, classes, **kind)
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
        for _ in range(STEPS):
            new_states, x = [], projected
            for number, layer in enumerate(self.layers):
                new_states.append(x)
                below, same, above = self._around(states, number)
                x = self._damped(layer, below, same, above)
                layer.learn(x, count)
            new_states.append(x)
            with torch.no_grad():
                self.softmax(normalised(states[-2][count:].clone())).softmax(dim=1)
                new_states.append(states[-1].clone())
            states = new_states
        self.returned = [state[:count] for state in states]

    @torch.no_grad()
    def evaluate(self, images: torch.Tensor) -> torch.Tensor:
        """Goodness of every label: images (N, pixels) -> (N, classes), all in one go."""
        rows = images.repeat_interleave(self.classes, dim=0)
        labels = torch.eye(self.classes, dtype=images.dtype, device=images.device)
        states = self._bottom_up(rows, labels.repeat(len(images), 1))
        projected = self.projector(normalised(rows))
        total = projected.pow(2).mean(dim=1)
        for _ in range(STEPS):
            new_states, x = [], projected
            for number, layer in enumerate(self.layers):
                new_states.append(x)
                x = self._damped(layer, *self._around(states, number))
                total += x.pow(2).mean(dim=1)
            states = [*new_states, x, states[-1]]
        return total.view(len(images), self.classes)

    def _around(self, states: list[torch.Tensor], number: int) -> tuple[torch.Tensor, ...]:
        above = states[number + 2]
        if number == len(self.layers) - 1:
            above = self.from_label(normalised(above))
        return states[number], states[number + 1], above.detach()

    def _bottom_up(self, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        x, states = self.projector(normalised(images)), []
        for layer in self.layers:
            states.append(x)
            x = self._damped(layer, x, torch.zeros_like(x), torch.zeros_like(x))
        return [*states, x, labels]

    @staticmethod
    def _damped(
        layer: Layer, below: torch.Tensor, same: torch.Tensor, above: torch.Tensor
    ) -> torch.Tensor:
        both = torch.cat([below.detach(), above], dim=1)
        return 0.3 * same.detach() + 0.7 * layer(normalised(both))
