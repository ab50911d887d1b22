"""Recurrent Forward-Forward: a still image over time, layers that read from above and below.

Each time step trains every weight by the goodness at that step alone. The layer's inputs are
constants to it, so learning is local in space and in time, and memory does not grow with time.
Hinton, arXiv 2212.13345, section 3.4.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from ff_utils.config import Batch, RecurrentConfig, TrainConfig
from ff_utils.data import Dataset
from ff_utils.ff.layers import EPSILON, FFLayer, SoftmaxClassifier, normalise_, split_batch
from ff_utils.ff.negatives import drop_pixels, hard_negatives, one_hot
from ff_utils.ff.network import FFNetwork, named_losses
from ff_utils.utils import check_choice, check_number

# A layer's activations, normalised, and what each row was divided by: (rows, width) and (rows,).
State = tuple[torch.Tensor, torch.Tensor]


class RecurrentForwardForward(FFNetwork):
    """Hidden layers between an image that stays and a label on top of them.

    At every time step all layers at once read what their neighbours were at the step before, each
    row normalised (n) to mean square 1. With h_0 the image and h_L+1 the label,
        y_l = relu(U_l n(h_l-1) + D_l n(h_l+1) + b_l),   h_l <- damping h_l + (1 - damping) y_l.
    Step 0 is one pass from the image up, without D. The label is one-hot times `label_scale`.
    A layer's weight (width, below + above) is U and D side by side.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        hidden: list[int],
        config: RecurrentConfig = RecurrentConfig(),
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(pixels, classes, hidden, config)
        check_number("steps", config.steps, len(hidden), whole=True)
        check_choice("normalisation", config.normalisation, ("mean_square",))
        self.widths = [pixels, *hidden, classes]
        kind = {"device": device, "dtype": dtype}
        generator = torch.Generator().manual_seed(config.seed)
        self.layers = nn.ModuleList(
            FFLayer(below + above, width, config, generator=generator, **kind)
            for below, width, above in zip(self.widths, hidden, self.widths[2:], strict=False)
        )
        # Gradients of a batch's time steps are added up here: one of every weight and bias.
        size = sum(p.numel() for p in self.layers.parameters())
        self.register_buffer("grad_buffer", torch.zeros(size, **kind), persistent=False)
        self.softmax = SoftmaxClassifier(self.hidden, classes, config, **kind)

    def sides(self, number: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of layer `number`'s weight that reads the layer below, and the one above."""
        return weight.split([self.widths[number], self.widths[number + 2]], dim=1)

    def start(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[State]]:
        """Step 0, from the image up, of images (N, pixels).

        Returns the images normalised; what they add to the first layer at every time step, bias
        included (N, width); and every layer's state.
        """
        images = images.to(self.grad_buffer.dtype, copy=True)
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
        learn: called for every layer with its number, below, above, y, state, goodness; it may
            overwrite y.
        """
        result, waiting, damping = [], None, self.config.damping
        for number, layer in enumerate(self.layers):
            below = states[number - 1][0] if number else None
            above = states[number + 1][0] if number + 1 < len(states) else label
            up, down = self.sides(number, layer.weight)
            if number:
                y = torch.addmm(layer.bias, below, up.t())
            else:
                y = drive.repeat(len(label) // len(drive), 1)
            y.addmm_(above, down.t()).relu_()
            h, divisor = states[number]
            h = (h * (damping * divisor)[:, None]).add_(y, alpha=1 - damping)
            state = h, normalise_(h, "mean_square")
            result.append((state[1] - EPSILON).square_())
            if learn is not None:
                learn(number, below, above, y, state, result[-1])
            del y
            if waiting is not None:
                states[number - 1] = waiting
            waiting = state
        states[-1] = waiting
        return torch.stack(result)

    def step(
        self,
        images: torch.Tensor,
        drive: torch.Tensor,
        states: list[State],
        labels: torch.Tensor,
        wrong: torch.Tensor,
        learning_rate: float,
    ) -> torch.Tensor:
        """Train every layer through all time steps; returns their losses (layers,), means over
        the steps that they learn at. images, drive, states: from `start`; the states are used up.

        Of layer l's goodness g = mean_j h_j^2, where h = damping h_old + (1 - damping) relu(z) and
        h_old is a constant,
            dL/dz = (dL/dg) (2 / width) (1 - damping) h    where z > 0, and 0 elsewhere,
            dU += (dL/dz)^T n(h_below),   dD += (dL/dz)^T n(h_above),   db += sum of dL/dz,
        with one update at the end of the batch. A layer learns from the first step that the label
        has come down to it at: before, its positive and its negative rows are the same.
        """
        count, depth, steps = len(images), len(self.layers), self.config.steps
        label = self._label(torch.cat([labels, wrong]))
        for number, (h, divisor) in enumerate(states):
            states[number] = h.repeat(2, 1), divisor.repeat(2)
        del h, divisor
        gradients = self._gradients()
        # The gradient of the weights that read the image is computed once: the images stay.
        mixed, losses = torch.zeros_like(drive), drive.new_zeros(depth)
        (pairs,) = split_batch(2 * count, count)

        def learn(moment, number, below, above, y, state, g) -> None:
            if moment + number < depth:
                return
            layer, (dw, db) = self.layers[number], gradients[number]
            loss, slope = layer.local_loss(g, pairs)
            losses[number] += loss / (steps - depth + number + 1)
            h, divisor = state
            by_row = slope.mul_(divisor).mul_(2 * (1 - self.config.damping) / h.shape[1])
            dz = y.sign_().mul_(h).mul_(by_row[:, None])
            up, down = self.sides(number, dw)
            down.addmm_(dz.t(), above)
            if below is None:
                for block in dz.split(count):
                    mixed.add_(block)
            else:
                up.addmm_(dz.t(), below)
                db.add_(dz.sum(dim=0))

        for moment in range(1, steps + 1):
            self.advance(drive, states, label, partial(learn, moment))
        dw, db = gradients[0]
        self.sides(0, dw)[0].addmm_(mixed.t(), images)
        db.add_(mixed.sum(dim=0))
        for layer, pair in zip(self.layers, gradients, strict=True):
            layer.optimizer.update(list(pair), learning_rate)
        return losses

    def start_training(self, data: Dataset, config: TrainConfig) -> list[None]:
        """The stages of a training: one, of all layers."""
        return [None]

    def train_batch(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One step of all layers and the classifier; returns the losses () by name."""
        config, labels = batch.config, batch.labels
        images = drop_pixels(batch.images, config.dropout, batch.generator)
        images, drive, states = self.start(images)
        activations = [h for h, _ in states]
        logits = self.softmax(activations)
        wrong = hard_negatives(logits, labels, batch.generator)
        rate = batch.learning_rate * config.classifier_rate
        softmax_loss = self.softmax.step(activations, logits, labels, rate)
        del activations, logits
        losses = self.step(images, drive, states, labels, wrong, batch.learning_rate)
        return named_losses(losses) | {"softmax_loss": softmax_loss}

    def neutral_activations(
        self, images: torch.Tensor, depth: None = None
    ) -> Iterator[torch.Tensor]:
        """Normalised activations (N, width) of all layers at step 0, which no label enters."""
        return (h for h, _ in self.start(images)[2])

    def label_goodness(self, images: torch.Tensor) -> torch.Tensor:
        """Goodness of every label in every layer, summed over time steps `config.first` to
        `config.last`: images (N, pixels) -> (layers, N, classes)."""
        count = len(images)
        _, drive, states = self.start(images)
        tried = torch.arange(self.classes, device=drive.device)
        label = self._label(tried.repeat_interleave(count))
        for number, (h, divisor) in enumerate(states):
            states[number] = h.repeat(self.classes, 1), divisor.repeat(self.classes)
        total = 0
        for moment in range(1, self.config.last + 1):
            g = self.advance(drive, states, label)
            total = total + g if moment >= self.config.first else 0
        return total.view(-1, self.classes, count).transpose(1, 2)

    def _label(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (rows,) as the top layer reads them (rows, classes)."""
        scale = self.config.label_scale
        return one_hot(labels, len(labels), self.classes, scale, self.grad_buffer)

    def _gradients(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The gradient buffer, cleared, as one of each layer's weight and bias."""
        parameters = list(self.layers.parameters())
        parts = self.grad_buffer.zero_().split([p.numel() for p in parameters])
        shaped = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        return list(zip(shaped[::2], shaped[1::2], strict=True))
