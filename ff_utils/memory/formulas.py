"""What a step's peak must be, for the arms whose formula a reader can derive.

With W the bytes of all weights and biases, w those of a hidden layer, A one hidden activation, I
the images, L the depth, and 3 W for weights and Adam's two moments (1 W with SGD, about 1.5 W with
moments of 8 bits and weights of 32). Row vectors, logits and step counts are left out: where
activations and weights matter a formula is within 1 %. It is an oracle for the simulation, which
knows every arm exactly.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from ff_utils.memory.arms import Sizes
from ff_utils.memory.steps import MOST_PARTS
from ff_utils.optimizers import BLOCK, CHUNK
from ff_utils.original import DATASET_ROWS


def _terms(s: Sizes, more_inputs: int = 0) -> SimpleNamespace:
    """The terms of the formulas, in bytes, and how often weights are there with their moments.

    layers: all hidden layers' weights and biases; first, layer, largest: one's. unpacked: what
    8-bit Adam holds of a chunk of a layer's weights while it updates them.
    """
    element = getattr(torch, s.precision).itemsize
    packed = (1 + 4 / BLOCK) / element  # a byte a number, and a scale for each block
    moments = {"adam": 2, "adam_8bit": 2 * packed, "sgd": 0}[s.optimizer]
    first = element * (s.pixels + more_inputs + 1) * s.hidden
    layer = element * (s.hidden + 1) * s.hidden
    return SimpleNamespace(
        copies=1 + moments,
        first=first,
        layer=layer,
        layers=first + (s.depth - 1) * layer,
        largest=max(first, layer) if s.depth > 1 else first,
        classifier=element * (s.hidden + 1) * s.classes,
        activation=element * s.batch * s.hidden,
        images=element * s.batch * s.pixels,
        unpacked=3 * element * min(CHUNK, s.hidden**2) if s.optimizer == "adam_8bit" else 0,
        depth=s.depth,
    )


def backprop(s: Sizes) -> float:
    """Where the backward pass starts: every activation, and two gradients of one or one and a
    layer's. Where it ends: the gradients of all weights."""
    t = _terms(s)
    weights = t.layers + t.classifier
    inner = t.layer if t.depth > 1 else t.first
    start = t.classifier + (t.depth + 1) * t.activation + max(t.activation, inner)
    end = weights + max(t.activation, 3 * t.activation - t.first)
    return t.copies * weights + t.images + max(start, end)


def best_remedies(s: Sizes) -> float:
    """One layer's gradient and three activations; or the same of a sixteenth of the batch, and
    the gradients of all layers, which are added up from part to part."""
    t = _terms(s)
    weights = t.layers + t.classifier
    inner = t.layer if t.depth > 1 else 0

    def one_layer(activation: int) -> int:
        return max(3 * activation + inner, activation + t.first)

    in_parts = weights + one_layer(t.activation // MOST_PARTS)
    return t.copies * weights + t.images + min(one_layer(t.activation), in_parts)


def ff(s: Sizes) -> float:
    """One layer's gradient, its input and its output."""
    t = _terms(s)
    return t.copies * t.layers + t.largest + t.images + _input_and_output(t)


def _input_and_output(t: SimpleNamespace) -> int:
    inner = 2 * t.activation if t.depth > 1 else 0
    return max(t.images + t.activation, inner) + t.unpacked


def ff_hard_negatives(s: Sizes) -> float:
    """As FF, or the forward pass that predicts the class: an activation of every layer and what
    the image adds to the first layer, for the images, which are half of the rows."""
    t = _terms(s)
    softmax = s.depth * (t.classifier - t.classifier // (s.hidden + 1))
    predicted = (t.depth + 1) * t.activation // 2
    update = (2 if t.depth > 1 else 1) * t.activation + t.unpacked
    step = max(update, t.activation * 3 // 2)
    stays = t.copies * (t.layers + softmax) + t.largest + t.images // 2
    return stays + max(predicted + softmax, step)


def ff_streamed(s: Sizes) -> float:
    """Weights of two layers, moments and gradient of one, its input and its output."""
    t = _terms(s)
    copies = min(2, t.depth) + t.copies  # weights twice, moments, one gradient
    return copies * t.largest + t.images + _input_and_output(t)


def ff_layerwise(s: Sizes) -> float:
    """Weights, moments and gradient of one layer, its input and its output; of the images, only
    the fortieth that it is evaluated on."""
    t = _terms(s)
    return (t.copies + 1) * t.largest + _input_and_output(t) + t.images // 40


def backprop_seed(s: Sizes) -> float:
    """Two activations a layer, and every gradient through the forward pass; or what the backward
    pass of the last or the first normalisation takes; or two temporaries of Adam's update."""
    t = _terms(s)
    weights = t.layers + t.classifier
    moments = [weights + 2 * t.depth * t.activation, t.classifier + 3 * t.activation]
    if t.depth > 1:
        moments.append(t.classifier + t.layer + (2 * t.depth + 2) * t.activation)
        moments.append(weights - t.first + 6 * t.activation)
    if t.copies == 3:
        moments.append(weights + 2 * t.largest)
    return t.copies * weights + t.images + max(moments)


def ff_seed(s: Sizes) -> float:
    """Weights, their moments and gradients, the data set's activations into the last layer, and
    those out of it as far as they are made; the output of a batch on top. The last batch is what
    remains of the data set."""
    t = _terms(s, more_inputs=s.classes)
    below = s.hidden if t.depth > 1 else s.pixels + s.classes
    batch = min(s.batch, DATASET_ROWS)
    last = DATASET_ROWS % batch or batch
    made = [(DATASET_ROWS - last, batch), (DATASET_ROWS, last)]
    outputs = max(rows * s.hidden + more * max(below, s.hidden) for rows, more in made)
    numbers = DATASET_ROWS * below + outputs
    return (t.copies + 1) * t.layers + numbers * t.activation // (s.batch * s.hidden)


FORMULAS: dict[str, Callable[[Sizes], float]] = {
    "backprop": backprop,
    "backprop_frugal": best_remedies,
    "backprop_seed": backprop_seed,
    "ff_resident": ff,
    "ff_hard_negatives": ff_hard_negatives,
    "ff_streamed": ff_streamed,
    "ff_layerwise": ff_layerwise,
    "ff_seed": ff_seed,
}


def predict(arm: str, s: Sizes) -> int | None:
    """Peak bytes of a training step on the device; None for an arm without a formula."""
    return round(FORMULAS[arm](s)) if arm in FORMULAS else None
