"""The arms of the memory study, as data: a network, a step, a few choices that combine."""

from dataclasses import dataclass
from math import ceil

from ff_utils.config import OPTIMIZERS
from ff_utils.utils import check_choice, check_number

CLASSES = 10
IMAGE = (28, 28)
PIXELS = 784
TEXT = {"pixels": 10 * 30, "classes": 30}  # ten characters of thirty, and the one that follows
PRECISIONS = ("float32", "bfloat16", "float64")  # PyTorch's names
GRID = 25  # positions of each layer of local fields
PARTS = 8


@dataclass(frozen=True)
class Sizes:
    """What a step is measured at; ValueError for a size or a name that makes no sense.

    depth: hidden layers. hidden: units in each. batch: rows of a step. store: where offloaded
    arms keep their layers, "memory" or a folder. pixels, classes: of the data, here MNIST's.
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

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        check_number("depth", self.depth, 1, whole=True)
        check_number("hidden", self.hidden, 1, whole=True)
        check_number("batch", self.batch, 2, whole=True)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("precision", self.precision, PRECISIONS)

    def local_fields(self) -> list[tuple[int, int, int]]:
        """Layers of local fields with `hidden` units each, or up to 24 more: on the image 5 x 5
        fields of 10 x 10 pixels, 6 apart; above, 3 x 3 of these 25 positions for each of them."""
        channels = ceil(self.hidden / GRID)
        return [(10, 6, channels)] + [(3, 1, channels)] * (self.depth - 1)


@dataclass(frozen=True)
class Arm:
    """One way to train one network.

    network: "backprop" (a perceptron), "ff", "ff_local" or "ff_recurrent".
    original: the network and the step are the first study's, as it wrote them.
    remedies: of "segments", "halves", "all" (checkpoints), "offload" (activations on the host),
        "optimizer_in_backward", "best" (as many micro-batches as make the peak smallest), and for
        FF "recompute".
    micro_batches: parts that a batch is split into.
    step: "whole" trains a layer on all parts before the next one; "accumulated" takes each part
        through all layers; "greedy_cached" is a batch of `training.fit_greedy_cached`; "autograd"
        computes each layer's gradient by autograd.
    offloaded: one layer on the device, the others on the host.
    negatives: "given" trains FF's layers alone; "hard" and "hybrids" train a softmax too.
    text: reads ten characters instead of an image. cached: the first study's FF with its cache.
    """

    name: str
    title: str
    colour: str
    description: str
    network: str
    original: bool = False
    remedies: tuple[str, ...] = ()
    micro_batches: int = 1
    step: str = "whole"
    offloaded: bool = False
    negatives: str = "given"
    text: bool = False
    cached: bool = True

    def images(self, rows: int) -> int:
        """Images in a step of `rows` rows: half of FF's rows are negative."""
        return rows if self.network == "backprop" else rows // 2

    def rows(self, images: int) -> int:
        """Rows in a step of `images` images."""
        return images if self.network == "backprop" else 2 * images


_TABLE = (
    Arm(
        "backprop",
        "backprop",
        "#1a6faf",
        "Linear and ReLU layers, cross-entropy, fused Adam; gradients are freed after each step.",
        "backprop",
    ),
    Arm(
        "backprop_checkpoint",
        "backprop, checkpoints",
        "#3f97c9",
        "Activations are kept between runs of about sqrt(depth) layers, the others recomputed.",
        "backprop",
        remedies=("segments",),
    ),
    Arm(
        "backprop_optimizer_in_backward",
        "backprop, optimizer in backward",
        "#2b4f81",
        "Each tensor is updated as soon as its gradient is complete, which is then freed.",
        "backprop",
        remedies=("optimizer_in_backward",),
    ),
    Arm(
        "backprop_offload",
        "backprop, activations on host",
        "#5f8fb5",
        "What the backward pass needs is offloaded to host memory.",
        "backprop",
        remedies=("offload",),
    ),
    Arm(
        "backprop_micro_batches",
        "backprop, micro-batches",
        "#1f9aa8",
        f"The gradients of {PARTS} parts of a batch are added up.",
        "backprop",
        micro_batches=PARTS,
    ),
    Arm(
        "backprop_checkpoint_in_backward",
        "backprop, leaner checkpoints",
        "#155a8a",
        "Checkpoints of about sqrt(depth) layers, and the optimizer in the backward pass.",
        "backprop",
        remedies=("segments", "optimizer_in_backward"),
    ),
    Arm(
        "backprop_recursive",
        "backprop, recursive",
        "#0b7fab",
        "Checkpoints within checkpoints, by halves, and the optimizer in the backward pass.",
        "backprop",
        remedies=("halves", "optimizer_in_backward"),
    ),
    Arm(
        "backprop_recompute_all",
        "backprop, all recomputed",
        "#62b0c9",
        "Each activation is recomputed from the images, and the optimizer in the backward pass.",
        "backprop",
        remedies=("all", "optimizer_in_backward"),
    ),
    Arm(
        "backprop_micro_batches_checkpoint",
        "backprop, parts recomputed",
        "#2a7f8f",
        f"The gradients of {PARTS} parts of a batch are added up, each with checkpoints.",
        "backprop",
        remedies=("segments",),
        micro_batches=PARTS,
    ),
    Arm(
        "backprop_frugal",
        "backprop, offloaded",
        "#0a3161",
        "Activations on the host, the optimizer in the backward pass, and micro-batches where "
        "they make the peak smaller.",
        "backprop",
        remedies=("offload", "optimizer_in_backward", "best"),
    ),
    Arm(
        "backprop_streamed",
        "backprop, streamed",
        "#4f4aa6",
        "One layer is on the device; weights, moments and activations are on the host.",
        "backprop",
        offloaded=True,
    ),
    Arm(
        "backprop_streamed_frugal",
        "backprop, streamed in parts",
        "#8a86cf",
        f"Streamed, nothing fetched ahead, rows in {PARTS} parts that are kept on the host too.",
        "backprop",
        offloaded=True,
        micro_batches=PARTS,
    ),
    Arm(
        "backprop_seed",
        "first study's backprop",
        "#9fc0dc",
        "The first study's backprop: normalisation layers, old gradients kept in the forward pass.",
        "backprop",
        original=True,
    ),
    Arm(
        "ff_resident",
        "FF, random negatives",
        "#d1541d",
        "FF's layers alone, all on the device, by the analytic step, on negatives chosen before.",
        "ff",
    ),
    Arm(
        "ff_autograd",
        "FF, autograd",
        "#dd7a4f",
        "FF's layers by autograd, each layer's graph and gradient freed before the next layer.",
        "ff",
        step="autograd",
    ),
    Arm(
        "ff_hard_negatives",
        "FF, hard negatives",
        "#8f2f0a",
        "FF as notebook 2 trains it: a softmax predicts the class, learns, and the hard negatives "
        "are drawn from what it predicts.",
        "ff",
        negatives="hard",
    ),
    Arm(
        "ff_hard_negatives_recomputed",
        "FF, hard negatives, recomputed",
        "#8a5a2b",
        "The same weights, bit for bit: what the softmax learns from is recomputed, not kept.",
        "ff",
        negatives="hard",
        remedies=("recompute",),
    ),
    Arm(
        "ff_unsupervised",
        "FF, unsupervised",
        "#f0703a",
        "Images and as many hybrids of them train the layers, then the images train the softmax.",
        "ff",
        negatives="hybrids",
    ),
    Arm(
        "ff_local",
        "FF, local fields",
        "#a8501a",
        "Local receptive fields, the label seen everywhere: the layers alone, negatives chosen "
        "before.",
        "ff_local",
    ),
    Arm(
        "ff_micro_batches",
        "FF, micro-batches",
        "#e58a1f",
        f"{PARTS} parts of a batch, each layer's output replacing its input.",
        "ff",
        micro_batches=PARTS,
    ),
    Arm(
        "ff_accumulated",
        "FF, accumulated",
        "#c98a5e",
        f"Each of {PARTS} parts of the batch goes through all layers; the gradients of all "
        "layers are added up.",
        "ff",
        micro_batches=PARTS,
        step="accumulated",
    ),
    Arm(
        "ff_streamed",
        "FF, streamed",
        "#b81f24",
        "One layer is on the device, the next one's weights are being fetched, the others are on "
        "the host.",
        "ff",
        offloaded=True,
    ),
    Arm(
        "ff_frugal",
        "FF, streamed in parts",
        "#7d1533",
        f"Streamed, nothing fetched ahead, rows in {PARTS} parts that are kept on the host too.",
        "ff",
        offloaded=True,
        micro_batches=PARTS,
    ),
    Arm(
        "ff_layerwise",
        "FF, layer after layer",
        "#e0457b",
        "A layer stays on the device until it is trained; its batches come from the host.",
        "ff",
        offloaded=True,
        step="greedy_cached",
    ),
    Arm(
        "ff_seed",
        "first study's FF",
        "#ecb795",
        "The first study's network: autograd in each layer, the data set's activations cached.",
        "ff",
        original=True,
    ),
    Arm(
        "ff_seed_uncached",
        "first study's FF, no cache",
        "#dba183",
        "The first study's FF with a batch where its whole data set was.",
        "ff",
        original=True,
        cached=False,
    ),
    Arm(
        "ff_recurrent",
        "first study's recurrent FF",
        "#d8c08c",
        "The first study's recurrent network: layers that read above and below, for 8 time steps.",
        "ff_recurrent",
        original=True,
    ),
    Arm(
        "ff_recurrent_analytic",
        "recurrent FF, analytic step",
        "#b5761b",
        "As many time steps as the label needs to come down to the first layer, and at least 8.",
        "ff_recurrent",
        negatives="hard",
    ),
    Arm(
        "ff_language",
        "FF language model",
        "#f2a35e",
        "FF as notebook 7 trains it: hard negatives on text, the next character as the label.",
        "ff",
        negatives="hard",
        text=True,
    ),
    Arm(
        "backprop_language",
        "backprop language model",
        "#7fb2d9",
        "Plain backprop on text, the next character as the class.",
        "backprop",
        text=True,
    ),
)
ARMS = {arm.name: arm for arm in _TABLE}
# The arms of either side of which one is the leanest, with nothing on the host.
LEANEST = {
    "ff": ("ff_resident", "ff_hard_negatives_recomputed", "ff_micro_batches", "ff_accumulated"),
    "backprop": (
        "backprop_optimizer_in_backward",
        "backprop_checkpoint_in_backward",
        "backprop_recursive",
        "backprop_recompute_all",
        "backprop_micro_batches_checkpoint",
    ),
}
# The arms of either side with one layer on the device, and the others on the host.
ONE_LAYER = {
    "ff": ("ff_streamed", "ff_frugal", "ff_layerwise"),
    "backprop": ("backprop_streamed", "backprop_streamed_frugal"),
}
