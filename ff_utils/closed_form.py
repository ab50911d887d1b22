"""What each arm must need, in closed form: bytes by category at the peak of a training step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch

from ff_utils import checks, seed
from ff_utils.live_bytes import CATEGORIES
from ff_utils.remedies import OPTIMIZERS, segment_sizes

CLASSES = 10
IMAGE = (28, 28)
PIXELS = 784
MICRO_BATCHES = 8
TEXT = {"pixels": 10 * 30, "classes": 30}  # ten characters of thirty, and the one that follows
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
STREAMED = (
    "backprop_streamed",
    "backprop_streamed_frugal",
    "ff_streamed",
    "ff_frugal",
    "ff_layerwise",
)
STEP = 4  # bytes of Adam's step count, a float32 for every tensor


@dataclass(frozen=True)
class Setting:
    """The sizes of an arm, and the bytes of the tensors that its step is made of.

    store: where streamed arms rest their layers, "memory" or a folder.
    pixels, classes: of the data, by default MNIST's.
    """

    depth: int
    hidden: int
    batch: int
    optimizer: str = "adam"
    precision: str = "float32"
    device: str = "cpu"
    store: str = "memory"
    pixels: int = PIXELS
    classes: int = CLASSES

    def check(self) -> None:
        """Raise ValueError unless every size and name makes sense."""
        checks.number("depth", self.depth, 1, whole=True)
        checks.number("hidden", self.hidden, 1, whole=True)
        checks.number("batch", self.batch, 2, whole=True)
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
        checks.one_of("precision", self.precision, PRECISIONS)

    @property
    def element(self) -> int:
        """One number."""
        return PRECISIONS[self.precision].itemsize

    @property
    def activation(self) -> int:
        """One hidden layer's activations: batch x hidden."""
        return self.element * self.batch * self.hidden

    @property
    def row_vector(self) -> int:
        """One number a row."""
        return self.element * self.batch

    @property
    def logits(self) -> int:
        """One number a row and class."""
        return self.element * self.batch * self.classes

    @property
    def images(self) -> int:
        """The input: batch x pixels."""
        return self.element * self.batch * self.pixels

    @property
    def labels(self) -> int:
        """One int64 a row."""
        return 8 * self.batch

    @property
    def classifier(self) -> int:
        """Weights and biases of the last linear layer."""
        return self.element * (self.hidden * self.classes + self.classes)

    def layer(self, number: int, more_inputs: int = 0) -> int:
        """Weights and biases of hidden layer `number`, from 1."""
        below = self.pixels + more_inputs if number == 1 else self.hidden
        return self.element * (below * self.hidden + self.hidden)

    def layers(self, first: int = 1, more_inputs: int = 0) -> int:
        """Weights and biases of hidden layers `first` to `depth`."""
        if first > self.depth:
            return 0
        return self.layer(first, more_inputs) + (self.depth - first) * self.layer(2)

    @property
    def largest(self) -> int:
        """Weights and biases of the largest hidden layer."""
        return max(self.layer(1), self.layer(min(self.depth, 2)))

    @property
    def bias(self) -> int:
        """Biases of one hidden layer."""
        return self.element * self.hidden

    def state(self, weights: int, layers: int) -> int:
        """What the optimizer keeps for `weights` bytes: Adam's two moments, two step counts a
        layer."""
        return 2 * weights + 2 * STEP * layers if self.optimizer == "adam" else 0


Moment = dict[str, int]


def predict(arm: str, s: Setting) -> Moment:
    """Bytes by category at the training peak."""
    checks.one_of("arm", arm, FORMS)
    return FORMS[arm](s)


def peak(arm: str, s: Setting) -> int:
    """Bytes on the device at the training peak."""
    return sum(predict(arm, s).values())


def host(arm: str, s: Setting) -> int:
    """Bytes that rest on the host during a step."""
    if arm == "backprop_offload":
        return s.depth * s.activation + 2 * s.logits
    if arm == "backprop_frugal":
        checkpoint, micro_batches = frugal_choice(s)
        part = replace(s, batch=-(-s.batch // micro_batches))
        runs = segment_sizes(s.depth) if checkpoint else [s.depth]
        return (len(runs) - 1 + runs[-1]) * part.activation + 2 * part.logits
    if arm not in STREAMED:
        return 0
    backprop = arm.startswith("backprop")
    weights = s.layers() + (s.classifier if backprop else 0)
    if arm == "ff_layerwise":  # a batch for the first layer and one for any other
        rows = s.images + s.activation
    elif arm == "ff_frugal":  # one layer's output, the next one's input
        rows = s.activation
    else:  # all of them, and in parts also the gradient on its way down
        gradient = s.activation if arm == "backprop_streamed_frugal" else 0
        rows = s.depth * s.activation + gradient if backprop else 0
    return weights + s.state(weights, 0) + rows


def host_in_memory(arm: str, s: Setting) -> int:
    """Of these, the bytes that stay in memory even where there are files to rest in."""
    return host(arm, s) if arm in ("backprop_offload", "backprop_frugal") else 0


def _largest(moments: Iterable[Moment]) -> Moment:
    """The moment with the most bytes, every category present."""
    moment = max(moments, key=lambda m: sum(m.values()))
    return {category: moment.get(category, 0) for category in CATEGORIES}


# --- Backprop -------------------------------------------------------------------------------


def _backprop(s: Setting) -> Moment:
    """The peak is the start of the backward pass (all activations, two gradients of one) or,
    where layers weigh more than activations, its end (all gradients)."""
    return _largest(_backprop_moments(s))


def _backprop_moments(
    s: Setting,
    *,
    checkpoint: bool = False,
    optimizer_in_backward: bool = False,
    offload: bool = False,
    micro_batches: int = 1,
) -> list[Moment]:
    """Every moment of a backprop step that can be its peak, by layer and kind of work."""
    part = replace(s, batch=-(-s.batch // micro_batches))
    a = part.activation
    weights = s.layers() + s.classifier
    stays = {
        "parameters": weights,
        "optimizer_state": s.state(weights, s.depth + 1),
        "inputs": s.images + s.labels,
    }
    runs = segment_sizes(s.depth) if checkpoint else [s.depth]
    # Hidden activations held at the end of the forward pass: within the last run, and between.
    held = 0 if offload else (runs[-1] + len(runs) - 1) * a
    small = 0 if offload else part.logits
    parts = _accumulated(s, weights, micro_batches, optimizer_in_backward)
    moments = []
    for gradients in parts:
        start = stays | {"gradients": gradients(s.depth + 1)}
        moments.append(start | {"activations": held + small, "temporaries": 2 * part.logits})
        # Forward: a layer's input, its output before ReLU, and after; the input may be held.
        free = 2 if s.depth == 1 else 3
        if offload:
            moments.append(start | {"activations": free * a})
        else:
            moments.append(start | {"activations": held + a})
        layer = 0
        for number, run in enumerate(runs):
            last = number == len(runs) - 1
            below = 0 if offload else number * a
            # The run's own input comes back from the host for as long as the run lasts.
            fetched = a if offload and number > 0 and not last else 0
            for inside in range(1, run + 1):
                layer += 1
                here = stays | {"gradients": gradients(layer)}
                inward = a if layer > 1 else 0
                kept = 0 if offload and last else inside * a
                relu = kept + 2 * a + (a if offload and last else 0)
                linear = (kept - a if kept else 0) + a + inward + s.layer(layer)
                linear += inward if offload and last else 0
                moments += [
                    here | {"activations": below, "temporaries": relu + fetched},
                    here | {"activations": below, "temporaries": linear + fetched},
                ]
                if not last and inside == run:
                    # Computing the run again: its outputs, and the gradient that waits.
                    again = (run + 2) * a if run > 1 or number > 0 else 3 * a
                    moments.append(here | {"activations": below, "temporaries": again + fetched})
    return moments


def _accumulated(
    s: Setting, weights: int, micro_batches: int, optimizer_in_backward: bool
) -> list[Callable[[int], int]]:
    """Gradients held while the backward pass is at a layer, for each kind of micro-batch."""

    def above(layer: int) -> int:
        return s.layers(layer + 1) + (s.classifier if layer <= s.depth else 0)

    def below(layer: int) -> int:
        return weights - above(layer)

    if micro_batches == 1:
        return [(lambda layer: 0) if optimizer_in_backward else above]
    if optimizer_in_backward and micro_batches == 2:
        return [above, below]
    return [lambda layer: weights]


def _backprop_checkpoint(s: Setting) -> Moment:
    """The activations between runs of sqrt(depth) layers, and one run computed again."""
    return _largest(_backprop_moments(s, checkpoint=True))


def _backprop_optimizer_in_backward(s: Setting) -> Moment:
    """No gradient outlives its layer's backward pass."""
    return _largest(_backprop_moments(s, optimizer_in_backward=True))


def _backprop_offload(s: Setting) -> Moment:
    """No activation outlives its layer's forward pass."""
    return _largest(_backprop_moments(s, offload=True))


def _backprop_micro_batches(s: Setting) -> Moment:
    """Activations of a part of the batch; gradients of all layers from part to part."""
    return _largest(_backprop_moments(s, micro_batches=MICRO_BATCHES))


def _backprop_frugal(s: Setting, choice: tuple[bool, int] | None = None) -> Moment:
    """Activations on the host and the optimizer in the backward pass; checkpoints and
    micro-batches where they help."""
    checkpoint, micro_batches = choice or frugal_choice(s)
    moments = _backprop_moments(
        s,
        checkpoint=checkpoint,
        optimizer_in_backward=True,
        offload=True,
        micro_batches=micro_batches,
    )
    return _largest(moments)


@cache
def frugal_choice(s: Setting) -> tuple[bool, int]:
    """Whether to checkpoint, and in how many micro-batches up to 16, for the smallest peak."""
    counts = [m for m in (1, 2, 4, 8, 16) if m <= s.batch]
    choices = [(checkpoint, m) for checkpoint in (False, True) for m in counts]
    return min(choices, key=lambda choice: sum(_backprop_frugal(s, choice).values()))


def _backprop_streamed(s: Setting) -> Moment:
    """One layer, the next one's weights, and two activations: an input and an output on the way
    up, two gradients or a gradient and what it is masked with on the way down."""
    room = max(s.largest, s.classifier)
    stays = {
        "parameters": 2 * room,
        "optimizer_state": s.state(room, s.depth + 1),
        "gradients": max(s.largest - s.bias, s.element * s.hidden * CLASSES),
        "inputs": s.images + s.labels,
    }
    moments = [{"activations": 2 * s.activation + s.row_vector // s.batch * s.hidden}]
    if s.depth == 1:
        moments = [{"activations": 2 * s.activation + s.bias + s.logits}]
    moments.append({"activations": max(s.activation + s.logits, 4 * s.logits)})
    return _largest(stays | moment for moment in moments)


def _backprop_streamed_frugal(s: Setting) -> Moment:
    """One layer, and rows in parts: a gradient, what it is masked with, the gradient below."""
    part = replace(s, batch=-(-s.batch // MICRO_BATCHES))
    room = max(s.largest, s.classifier)
    stays = {
        "parameters": room,
        "optimizer_state": s.state(room, s.depth + 1),
        "gradients": max(s.largest - s.bias, s.element * s.hidden * CLASSES),
        "inputs": s.images + s.labels,
    }
    logits = s.logits + part.logits
    moments = [{"activations": 3 * part.activation + s.bias}] if s.depth > 1 else []
    moments.append({"activations": 2 * part.activation + logits + s.bias})
    return _largest(stays | moment for moment in moments)


def _backprop_seed(s: Setting) -> Moment:
    """As plain backprop, with a second activation a layer (the normalised one), the last step's
    gradients alive through the forward pass, and the normalisation's own backward pass."""
    weights = s.layers() + s.classifier
    stays = {
        "parameters": weights,
        "optimizer_state": s.state(weights, s.depth + 1),
        "inputs": s.images + s.labels,
    }
    norms = 2 * s.row_vector
    forward_end = {
        "activations": 2 * s.depth * s.activation + (s.depth - 1) * norms,
        "gradients": weights,
    }
    moments = [stays | forward_end, stays | {"gradients": weights} | _unfused(s, s.largest)]
    for layer in {1, s.depth}:
        kept = (2 * layer - 1) * s.activation + (layer - 1) * norms
        above = {"gradients": s.layers(layer + 1) + s.classifier}
        moments.append(stays | above | {"activations": kept, "temporaries": 2 * s.activation})
        if layer == 1:
            moments.append(stays | above | {"temporaries": s.activation + s.layer(1)})
    for layer in {1, s.depth - 1} if s.depth > 1 else ():
        # Backward through the normalisation above `layer`.
        moments.append(
            stays
            | {
                "activations": (2 * layer - 1) * s.activation + layer * norms,
                "temporaries": 5 * s.activation,
                "gradients": s.layers(layer + 1) + s.classifier,
            }
        )
    return _largest(moments)


def _unfused(s: Setting, layer: int) -> Moment:
    """Adam's unfused update makes two temporaries of the weight it is at."""
    return {"temporaries": 2 * (layer - s.bias) if s.optimizer == "adam" else 0}


# --- Forward-Forward ------------------------------------------------------------------------


def _ff_resident(s: Setting) -> Moment:
    """Weights and optimizer state of every layer, one gradient, one layer's input and output."""
    stays = {
        "parameters": s.layers(),
        "optimizer_state": s.state(s.layers(), s.depth),
        "gradients": s.largest - s.bias,
        "inputs": s.images,
    }
    return _largest(stays | moment for moment in _ff_moments(s))


def _ff_moments(s: Setting, micro_batches: int = 1) -> list[Moment]:
    """A layer's input and its output, a few numbers a row; with micro-batches, the output takes
    the input's place, but for a part of it."""
    part = replace(s, batch=-(-s.batch // micro_batches))
    rows = 4 * part.row_vector + s.bias
    output = part.activation
    first = s.images + output + (s.activation if micro_batches > 1 else 0)
    if micro_batches > 1 and s.hidden == PIXELS:
        first = s.images + output
    moments = [{"activations": first + rows}]
    if s.depth > 1:
        moments.append({"activations": s.activation + output + rows})
    return moments


def _ff_micro_batches(s: Setting) -> Moment:
    """As resident FF, one activation and a part of one."""
    return _largest(_ff_resident(s) | moment for moment in _ff_moments(s, MICRO_BATCHES))


def _ff_accumulated(s: Setting) -> Moment:
    """Four copies of the weights, activations of a part of the batch."""
    part = replace(s, batch=-(-s.batch // MICRO_BATCHES))
    stays = {
        "parameters": s.layers(),
        "optimizer_state": s.state(s.layers(), s.depth),
        "gradients": s.layers(),
        "inputs": s.images,
    }
    return _largest(stays | moment for moment in _ff_moments(part))


def _ff_streamed(s: Setting) -> Moment:
    """One layer, the next one's weights, one gradient, one layer's input and output."""
    stays = {
        "parameters": min(2, s.depth) * s.largest,
        "optimizer_state": s.state(s.largest, s.depth),
        "gradients": s.largest - s.bias,
        "inputs": s.images,
    }
    return _largest(stays | moment for moment in _ff_moments(s))


def _ff_frugal(s: Setting) -> Moment:
    """One layer, and rows in parts: those of its input and its output."""
    part = replace(s, batch=-(-s.batch // MICRO_BATCHES))
    stays = {
        "parameters": s.largest,
        "optimizer_state": s.state(s.largest, s.depth),
        "gradients": s.largest - s.bias,
        "inputs": s.images,
    }
    return _largest(stays | moment for moment in _ff_moments(part))


def _ff_layerwise(s: Setting) -> Moment:
    """One layer, one gradient, the layer's input and output; the batch itself is on the host."""
    few = replace(s, batch=max(1, s.batch // (4 * CLASSES)))
    stays = {
        "parameters": s.largest,
        "optimizer_state": s.state(s.largest, s.depth),
        "gradients": s.largest - s.bias,
        "inputs": few.images,  # what it is evaluated on
    }
    return _largest(stays | moment for moment in _ff_moments(s))


def _ff_hard_negatives(s: Setting, joined: int = 0, kept: int | None = None) -> Moment:
    """As resident FF, or the guess's activations of all layers, for half as many rows; what the
    image alone adds to the first layer's output is kept from the guess to that layer's step.

    joined: inputs that the label adds to the image's. kept: activations at once, all unless given.
    """
    half = replace(s, batch=s.batch // 2)
    read = replace(s, pixels=s.pixels + joined)
    softmax = s.element * (s.classes * s.depth * s.hidden + s.classes)
    confusion = s.element * s.classes**2
    weights = read.layers() + softmax
    stays = {
        "parameters": weights,
        "optimizer_state": s.state(weights, s.depth + 1) + confusion,
        "gradients": read.largest - s.bias,
        "inputs": half.images + half.labels,
    }
    guess = (kept or s.depth + 1) * half.activation + half.row_vector
    # Every row's goodness, what the loss makes of it, and its squares; the wrong labels.
    rows = 6 * s.row_vector + s.bias + half.row_vector + half.labels
    moments = [
        guess + half.row_vector,
        guess + 2 * half.logits + max(softmax, half.labels + half.row_vector),
        s.activation + half.activation + rows,
        s.activation + s.logits + s.labels + rows - s.row_vector,
    ]
    if s.depth > 1:
        moments.append(2 * s.activation + rows)
    return _largest(stays | {"activations": moment} for moment in moments)


def _ff_hard_negatives_recomputed(s: Setting) -> Moment:
    """As with hard negatives, but of the guess a layer's input and its output at a time."""
    return _ff_hard_negatives(s, kept=min(3, s.depth + 1))


def _ff_unsupervised(s: Setting) -> Moment:
    """As resident FF, or the making of hybrids, or the softmax's activations of all layers, for
    the images, which are half of the rows."""
    half = replace(s, batch=s.batch // 2)
    rows = replace(s, batch=s.batch // 2 * 2)
    softmax = s.element * (CLASSES * s.depth * s.hidden + CLASSES)
    weights = s.layers() + softmax
    stays = {
        "parameters": weights,
        "optimizer_state": s.state(weights, s.depth + 1),
        "gradients": s.largest - s.bias,
        "inputs": half.images + half.labels,
    }
    kept = s.depth * half.activation
    moments = [
        *_ff_moments(rows),
        {"activations": 2 * rows.images},
        {"activations": kept + half.row_vector + half.images},
        {"activations": kept + half.images + 3 * half.logits + softmax},
    ]
    return _largest(stays | moment for moment in moments)


GRID = 25  # positions of the local arm's layers


def local_fields(s: Setting) -> list[tuple[int, int, int]]:
    """The local arm's layers, each of `hidden` units, or up to 24 more: on the image 5 x 5 fields
    of 10 x 10 pixels, 6 apart, and above them 3 x 3 of these 25 positions for each of them."""
    channels = -(-s.hidden // GRID)
    return [(10, 6, channels)] + [(3, 1, channels)] * (s.depth - 1)


def _ff_local(s: Setting) -> Moment:
    """As resident FF with fewer weights, what each position sees of the input, and the gradient
    of a layer's output."""
    channels = -(-s.hidden // GRID)
    units = GRID * channels
    inputs = [PIXELS + CLASSES] + [units] * (s.depth - 1)
    seen = [GRID * (100 + CLASSES)] + [GRID * 9 * channels] * (s.depth - 1)
    numbers = sum(n * channels + units for n in seen)
    weights = s.element * numbers
    stays = {
        "parameters": weights + 9 * sum(seen),  # an int64 and a bool for each input of a field
        "optimizer_state": s.state(weights, s.depth),
        "gradients": s.element * max(seen) * channels,
        "inputs": s.images + s.labels,
    }
    reads = max(i + n for i, n in zip(inputs, seen, strict=True))
    return _largest([stays | {"activations": s.row_vector * (reads + 2 * units + 4)}])


def _ff_language(s: Setting) -> Moment:
    """As FF with hard negatives, on text, the label joined."""
    return _ff_hard_negatives(replace(s, **TEXT), joined=TEXT["classes"])


def _backprop_language(s: Setting) -> Moment:
    """As backprop, on text."""
    return _backprop(replace(s, **TEXT))


def _ff_seed(s: Setting, cached_rows: int | None = None) -> Moment:
    """Four copies of the weights, and the data set's activations twice: in and out of a layer."""
    below = s.hidden if s.depth > 1 else PIXELS + CLASSES
    rows = cached_rows or seed.DATASET_ROWS
    last_part = rows % s.batch or min(s.batch, rows)
    weights = s.layers(more_inputs=CLASSES)
    stays = {
        "parameters": weights,
        "gradients": weights,
        "optimizer_state": s.state(weights, s.depth),
    }
    layer = s.element * (below * s.hidden + s.hidden)
    cached, batch = s.element * rows * below, min(s.batch, rows)
    read = s.element * batch * below
    moments = [
        # The last layer's training step: its backward pass, its update.
        {
            "activations": read + 2 * s.activation,
            "temporaries": 3 * s.activation,
            "gradients": weights - layer,
            "inputs": cached,
        },
        {"activations": 2 * s.activation, "inputs": cached} | _unfused(s, layer),
    ]
    # Its output: the last part of the data set, which may be short, or the whole one before.
    for part, done in ((last_part, 0), (batch, last_part)):
        made = s.element * (rows - done) * s.hidden
        moments.append(
            {"activations": s.element * part * max(s.hidden, below), "inputs": cached + made}
        )
    return _largest(stays | moment for moment in moments[: 3 if last_part == rows else 4])


def _ff_seed_uncached(s: Setting) -> Moment:
    """As the seed's, with one batch in place of the data set."""
    return _ff_seed(s, s.batch)


def _ff_recurrent(s: Setting) -> Moment:
    """Layers with two inputs, and of every layer the states of this time step and the next, of
    the last batch, and half of those that the negatives began with."""
    wide = s.element * (2 * s.hidden * s.hidden + s.hidden)
    trained = s.layer(1) + s.depth * wide
    from_label = s.element * (CLASSES * s.hidden + s.hidden)
    rows = replace(s, batch=s.batch // 2 * 2)
    half = replace(s, batch=s.batch // 2)
    stays = {
        "parameters": trained + from_label + s.classifier,
        "gradients": trained,
        "optimizer_state": s.state(trained, s.depth + 1),
        "inputs": half.images + half.logits,
    }
    a = rows.activation
    labels = 3 * rows.logits + half.logits
    kept = (7 * s.depth + 7) * a // 2 + rows.images + labels
    before = 5 * (s.depth + 1) * a // 2 + labels
    moments = [
        # The first layer, which reads the images: those, normalised, and its backward pass.
        stays
        | {
            "activations": before + 2 * rows.images + 2 * a,
            "temporaries": max(3 * a, a + s.layer(1)),
            "gradients": trained - s.layer(1),
        },
        # The last layer: what its state is made of, eight activations' worth.
        stays | {"activations": kept + 8 * a + 4 * rows.row_vector},
        stays | {"activations": kept + a} | _unfused(s, wide),
        # The first layer's update.
        stays | {"activations": before + rows.images + 2 * a} | _unfused(s, s.layer(1)),
    ]
    return _largest(moments)


def _ff_recurrent_analytic(s: Setting) -> Moment:
    """Two weights and a gradient of both for every layer; its state, whatever the number of time
    steps, and at the layer being worked on its output, its next state and that of the one below.
    What the images add to the first layer, and what their weights are to learn, for half the
    rows."""
    half = replace(s, batch=s.batch // 2)
    rows = replace(s, batch=2 * half.batch)
    depth, a = s.depth, rows.activation
    top = s.element * CLASSES * s.hidden
    layers = s.layers() + (depth - 1) * s.element * s.hidden * s.hidden + top
    softmax = s.element * (CLASSES * depth * s.hidden + CLASSES)
    stays = {
        "parameters": layers + softmax,
        "optimizer_state": s.state(layers + softmax, depth + 1),
        "gradients": layers,
        "inputs": half.images + half.labels,
    }
    numbers = (2 * depth + min(depth, 2) + 5) * rows.row_vector
    working = (depth + min(depth, 2) + 2) * a + half.images + rows.logits + half.labels
    return _largest([stays | {"activations": working + numbers}])


FORMS = {
    "backprop": _backprop,
    "backprop_checkpoint": _backprop_checkpoint,
    "backprop_optimizer_in_backward": _backprop_optimizer_in_backward,
    "backprop_offload": _backprop_offload,
    "backprop_micro_batches": _backprop_micro_batches,
    "backprop_frugal": _backprop_frugal,
    "backprop_streamed": _backprop_streamed,
    "backprop_streamed_frugal": _backprop_streamed_frugal,
    "backprop_seed": _backprop_seed,
    "ff_resident": _ff_resident,
    "ff_hard_negatives": _ff_hard_negatives,
    "ff_hard_negatives_recomputed": _ff_hard_negatives_recomputed,
    "ff_unsupervised": _ff_unsupervised,
    "ff_local": _ff_local,
    "ff_micro_batches": _ff_micro_batches,
    "ff_accumulated": _ff_accumulated,
    "ff_streamed": _ff_streamed,
    "ff_frugal": _ff_frugal,
    "ff_layerwise": _ff_layerwise,
    "ff_seed": _ff_seed,
    "ff_seed_uncached": _ff_seed_uncached,
    "ff_recurrent": _ff_recurrent,
    "ff_recurrent_analytic": _ff_recurrent_analytic,
    "ff_language": _ff_language,
    "backprop_language": _backprop_language,
}
