"""Recurrent Forward-Forward: the image is a still video, and layers listen above and below.

The seed's second system done right. Each time step trains every weight, the label's too, by the
goodness at that step alone: its inputs are constants to it, so that learning is local in space
and in time, and memory does not grow with time. Source: Hinton, arXiv 2212.13345, section 3.4.
"""

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from torch import nn

from ff_utils import checks, pairs
from ff_utils.datasets import Dataset
from ff_utils.layers import FFLayer, LocalSoftmax, normalise_
from ff_utils.networks import EVALUATION_ROWS, ForwardForward
from ff_utils.pairs import EPSILON
from ff_utils.training import fit, prediction_error, refuse_silent

# A layer's activations, normalised, and what each row was divided by: (rows, width) and (rows,).
State = tuple[torch.Tensor, torch.Tensor]


class RecurrentForwardForward(nn.Module):
    """Hidden layers between an image that stays and a label on top of them.

    At every time step all layers at once read what their neighbours were at the step before, each
    row normalised to mean square 1: with n that normalisation, and h_0 the image, h_L+1 the label,
        y_l = relu(U_l n(h_l-1) + D_l n(h_l+1) + b_l),   h_l <- damping h_l + (1 - damping) y_l.
    Step 0 is one pass from the image up, without D. The label is one-hot times `label_scale`.
    steps: of training; `first` to `last`: the steps whose goodness is summed to predict.
    A layer's weight (width, below + above) is U and D side by side.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        hidden: list[int],
        *,
        label_scale: float = 1.0,
        damping: float = 0.3,
        steps: int = 8,
        first: int = 3,
        last: int = 5,
        loss: str = "softplus",
        theta: float = 2.0,
        scale: float = 1.0,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.number("pixels", pixels, 1, whole=True)
        checks.number("classes", classes, 2, whole=True)
        checks.whole_numbers("hidden", hidden, 1)
        checks.number("label_scale", label_scale, 0, above=True)
        checks.number("damping", damping, 0, 0.99)
        checks.number("steps", steps, len(hidden), whole=True)
        checks.number("last", last, 1, steps, whole=True)
        checks.number("first", first, 1, last, whole=True)
        self.pixels, self.classes, self.hidden = pixels, classes, list(hidden)
        self.label_scale, self.damping, self.steps = label_scale, damping, steps
        self.counted = range(first, last + 1)
        self.settings = {"pixels": pixels, "classes": classes, "hidden": list(hidden)}
        self.settings |= {"label_scale": label_scale, "damping": damping, "steps": steps}
        self.settings |= {"first": first, "last": last, "loss": loss, "theta": theta}
        self.settings |= {"scale": scale, "optimizer": optimizer, "seed": seed}
        self.settings["weight_decay"] = weight_decay
        self.widths = [pixels, *hidden, classes]
        settings = {"loss": loss, "theta": theta, "scale": scale, "optimizer": optimizer}
        settings |= {"generator": torch.Generator().manual_seed(seed), "weight_decay": weight_decay}
        kind = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            FFLayer(below + above, width, **settings, **kind)
            for below, width, above in zip(self.widths, hidden, self.widths[2:], strict=False)
        )
        # Gradients of a batch's time steps are added up here: one of every weight and bias.
        size = sum(p.numel() for p in self.layers.parameters())
        self.register_buffer("gradient", torch.zeros(size, **kind), persistent=False)
        self.softmax = LocalSoftmax(self.hidden, classes, optimizer=optimizer, **kind)

    def sides(self, number: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of layer `number`'s weight that reads the layer below, and the one above."""
        return weight.split([self.widths[number], self.widths[number + 2]], dim=1)

    def start(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[State]]:
        """Images (N, pixels) normalised; what they add to the first layer at every time step,
        bias included (N, width); every layer's state after one pass from the image up."""
        images = images.to(self.gradient.dtype, copy=True)
        normalise_(images, "mean_square")
        h, states, drive = images, [], None
        for number, layer in enumerate(self.layers):
            z = torch.addmm(layer.bias, h, self.sides(number, layer.weight)[0].t())
            drive = z if drive is None else drive
            h = z.relu() if z is drive else z.relu_()
            states.append((h, normalise_(h, "mean_square")))
        return images, drive, states

    def advance(
        self,
        drive: torch.Tensor,
        states: list[State],
        label: torch.Tensor,
        learn: Callable[..., None] | None = None,
    ) -> torch.Tensor:
        """One time step of all layers; returns their goodness (layers, rows).

        states: replaced by the next ones, each as soon as no layer has to read it any more.
        label: (rows, classes), a block of N rows for every label that the N images have.
        learn: (number, below, above, y, state, goodness) -> None, called for every layer; it may
            overwrite y.
        """
        found, waiting = [], None
        for number, layer in enumerate(self.layers):
            below = states[number - 1][0] if number else None
            above = states[number + 1][0] if number + 1 < len(states) else label
            up, down = self.sides(number, layer.weight)
            if below is None:
                y = drive.repeat(len(label) // len(drive), 1)
            else:
                y = torch.addmm(layer.bias, below, up.t())
            y.addmm_(above, down.t()).relu_()
            h, divisor = states[number]
            h = (h * (self.damping * divisor)[:, None]).add_(y, alpha=1 - self.damping)
            state = h, normalise_(h, "mean_square")
            found.append((state[1] - EPSILON).square_())
            if learn is not None:
                learn(number, below, above, y, state, found[-1])
            del y
            if waiting is not None:
                states[number - 1] = waiting
            waiting = state
        states[-1] = waiting
        return torch.stack(found)

    def step(
        self,
        images: torch.Tensor,
        drive: torch.Tensor,
        states: list[State],
        labels: torch.Tensor,
        wrong: torch.Tensor,
        learning_rate: float,
    ) -> torch.Tensor:
        """Train every layer through all time steps; returns their losses (layers,), a mean over
        the steps that they learn at.

        images, drive, states: from `start`; the states are used up. labels, wrong: (N,).
        Of layer l's goodness g = mean_j h_j^2, where h = damping h_old + (1 - damping) relu(z) and
        h_old is a constant,
            dL/dz = (dL/dg) (2 / width) (1 - damping) h    where z > 0, and 0 elsewhere,
            dU += (dL/dz)^T n(h_below),   dD += (dL/dz)^T n(h_above),   db += sum of dL/dz,
        with one update at the end of the batch. A layer learns from the first step that the label
        has come down to it at: before, its positive and its negative rows are the same.
        """
        count, depth = len(images), len(self.layers)
        label = self._label(torch.cat([labels, wrong]))
        for number, (h, divisor) in enumerate(states):
            states[number] = h.repeat(2, 1), divisor.repeat(2)
        del h, divisor
        gradients = self._gradients()
        # What the images' weights learn is read off once: the images are the same at every step.
        mixed, losses = torch.zeros_like(drive), drive.new_zeros(depth)

        def learn(moment, number, below, above, y, state, g) -> None:
            if moment + number < depth:
                return
            layer, (dw, db) = self.layers[number], gradients[number]
            loss, slope = layer.local_loss(g, count, (count, count))
            losses[number] += loss / (self.steps - depth + number + 1)
            h, divisor = state
            by_row = slope.mul_(divisor).mul_(2 * (1 - self.damping) / h.shape[1])
            dz = y.sign_().mul_(h).mul_(by_row[:, None])
            up, down = self.sides(number, dw)
            down.addmm_(dz.t(), above)
            if below is None:
                for block in dz.split(count):
                    mixed.add_(block)
            else:
                up.addmm_(dz.t(), below)
                db.add_(dz.sum(dim=0))

        for moment in range(1, self.steps + 1):
            self.advance(drive, states, label, partial(learn, moment))
        dw, db = gradients[0]
        self.sides(0, dw)[0].addmm_(mixed.t(), images)
        db.add_(mixed.sum(dim=0))
        for layer, pair in zip(self.layers, gradients, strict=True):
            layer.optimizer.update(list(pair), learning_rate)
        return losses

    def _label(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (rows,) as the top layer reads them (rows, classes)."""
        return pairs.label_code(labels, len(labels), self.classes, self.label_scale, self.gradient)

    def _gradients(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The gradient buffer, cleared, as one of each layer's weight and bias."""
        parameters = list(self.layers.parameters())
        parts = self.gradient.zero_().split([p.numel() for p in parameters])
        shaped = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        return list(zip(shaped[::2], shaped[1::2], strict=True))

    def guess(self, images: torch.Tensor) -> torch.Tensor:
        """Softmax logits (N, classes) of images (N, pixels) from the pass up, without a label."""
        return self.softmax(h for h, _ in self.start(images)[2])

    def label_goodness(self, images: torch.Tensor) -> torch.Tensor:
        """Goodness of every label in every layer, summed over time steps `first` to `last`:
        images (N, pixels) -> (layers, N, classes)."""
        count = len(images)
        _, drive, states = self.start(images)
        tried = torch.arange(self.classes, device=drive.device)
        label = self._label(tried.repeat_interleave(count))
        for number, (h, divisor) in enumerate(states):
            states[number] = h.repeat(self.classes, 1), divisor.repeat(self.classes)
        total = 0
        for moment in range(1, self.counted.stop):
            found = self.advance(drive, states, label)
            total = total + found if moment in self.counted else 0
        return total.view(-1, self.classes, count).transpose(1, 2)

    scores = ForwardForward.scores
    predict = ForwardForward.predict


def train_recurrent(
    network: RecurrentForwardForward,
    data: Dataset,
    *,
    softmax_rate: float = 1.0,
    dropout: float = 0.0,
    after_epoch: Callable[[], dict] = dict,
    **course: object,
) -> pd.DataFrame:
    """Train on `data`'s training images; returns one row an epoch.

    softmax_rate, dropout, after_epoch, and what is returned and raised: as in
    `training.train_forward_forward`. course: as in `training.fit`.
    """
    checks.number("softmax_rate", softmax_rate, 0, 1, above=True)
    checks.number("dropout", dropout, 0, 0.9)

    def step(_, images: torch.Tensor, *batch: object) -> dict[str, torch.Tensor]:
        if dropout:
            images = pairs.dropped(images, dropout, batch[-1])
        return recurrent_step(network, images, *batch, softmax_rate)

    def measure(_, epoch: int) -> dict:
        _, _, states = network.start(data.test_images[:EVALUATION_ROWS])
        refuse_silent((h for h, _ in states), epoch)
        return {"error": prediction_error(network, data, "softmax"), **after_epoch()}

    about = {"softmax_rate": softmax_rate, "dropout": dropout, "network": network.settings}
    return fit(network, data, step, measure, about=about, **course)


def recurrent_step(
    network: RecurrentForwardForward,
    images: torch.Tensor,
    labels: torch.Tensor,
    learning_rate: float,
    generator: torch.Generator,
    softmax_rate: float = 1.0,
) -> dict[str, torch.Tensor]:
    """One batch: the pass up, the softmax's guess and its training at its share of the learning
    rate, wrong labels drawn from the guess, all time steps; returns the losses by name."""
    images, drive, states = network.start(images)
    activations = [h for h, _ in states]
    logits = network.softmax(activations)
    wrong = pairs.hard_negatives(logits, labels, generator)
    rate = learning_rate * softmax_rate
    softmax_loss = network.softmax.step(activations, logits, labels, rate)
    del activations, logits
    losses = network.step(images, drive, states, labels, wrong, learning_rate)
    found = {f"loss_{k}": loss for k, loss in enumerate(losses, start=1)}
    return found | {"softmax_loss": softmax_loss}
