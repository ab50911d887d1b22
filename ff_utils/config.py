"""Settings of networks and of training: frozen, checked when they are made, written down once.

A wrong value is a ValueError that names the field. What depends on the data or on a network's
sizes is checked where they meet.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ff_utils.utils import check_choice, check_number

if TYPE_CHECKING:  # sweeps and command lines read settings without PyTorch
    import torch

LOSSES = ("softplus", "probabilistic", "linear", "pairwise")
NORMALISATIONS = ("length", "mean_square")
OPTIMIZERS = ("adam", "adam_8bit", "sgd")
LABELS = ("joined", "pixels", "none")
SCHEDULES = ("joint", "layerwise")
NEGATIVES = ("random", "hard", "rollout")
DECAYS = ("none", "linear")


@dataclass(frozen=True)
class LayerConfig:
    """How one FF layer learns.

    normalisation: of each row: "length" divides by the Euclidean norm (the original package),
        "mean_square" by the root mean square (Hinton).
    loss: one of LOSSES; `ff.layers` has their formulas.
    threshold: the goodness theta that separates positive from negative; not used by "pairwise".
    sharpness: what goodness is multiplied by before the loss.
    optimizer: "adam", "sgd", or "adam_8bit", whose moments have 8 bits (not offloaded).
    weight_decay: share of the learning rate by which weights shrink in a step (AdamW).
    """

    normalisation: str = "mean_square"
    loss: str = "softplus"
    threshold: float = 2.0
    sharpness: float = 1.0
    optimizer: str = "adam"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """ValueError for a value out of range."""
        check_choice("normalisation", self.normalisation, NORMALISATIONS)
        check_choice("loss", self.loss, LOSSES)
        check_number("threshold", self.threshold, 0, above=True)
        check_number("sharpness", self.sharpness, 0, above=True)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_number("weight_decay", self.weight_decay, 0, 1)


@dataclass(frozen=True)
class FFConfig(LayerConfig):
    """A Forward-Forward network.

    label: "pixels" writes the label over the first pixels (Hinton), "joined" after the last (the
        original package), "none" leaves it out: the network then trains unsupervised.
    label_scale: value of the pixel that marks the label.
    classifier: have a softmax that reads the layers, predicts from the neutral label and draws
        hard negatives. Without one the network predicts by goodness.
    first_read: first layer that the softmax reads, from 1; Hinton's reads from 2.
    recompute: compute the softmax's activations twice instead of storing them: less memory for
        one more forward pass, bit-identical result.
    seed: of the initial weights.
    """

    label: str = "pixels"
    label_scale: float = 1.0
    classifier: bool = True
    first_read: int = 1
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for a value out of range, or a network that could not predict."""
        super().__post_init__()
        check_choice("label", self.label, LABELS)
        check_number("label_scale", self.label_scale, 0, above=True)
        check_number("first_read", self.first_read, 1, whole=True)
        if self.label == "none" and not self.classifier:
            raise ValueError("label is 'none': only a softmax can predict, give classifier=True.")


@dataclass(frozen=True)
class LocalConfig(FFConfig):
    """A Forward-Forward network with local receptive fields.

    padded: fields reach beyond the image's edge, where there is nothing to see.
    local_goodness: each position has a goodness, a loss and a normalisation of its own.
    """

    label: str = "joined"
    padded: bool = False
    local_goodness: bool = False


@dataclass(frozen=True)
class RecurrentConfig(LayerConfig):
    """A recurrent Forward-Forward network.

    label_scale: value of the label's unit on top of the network.
    damping: share of a layer's old activations in its new ones.
    steps: time steps of training, at least one a layer.
    first: first of the time steps, from 1, whose goodness is summed to predict.
    last: last of them.
    seed: of the initial weights.
    """

    label_scale: float = 1.0
    damping: float = 0.3
    steps: int = 8
    first: int = 3
    last: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for a value out of range."""
        super().__post_init__()
        check_number("label_scale", self.label_scale, 0, above=True)
        check_number("damping", self.damping, 0, 0.99)
        check_number("steps", self.steps, 1, whole=True)
        check_number("last", self.last, 1, self.steps, whole=True)
        check_number("first", self.first, 1, self.last, whole=True)


@dataclass(frozen=True)
class TrainConfig:
    """A training run of any network here; what a network has no use for, it refuses or ignores.

    epochs: passes over the training images, for each stage of a training.
    batch_size: images in a step; FF makes a positive and a negative row of each.
    learning_rate: of the layers, above 0 and at most 1.
    decay: "linear" lowers the learning rate to 0 in the second half, "none" leaves it.
    random_shift: most pixels by which each image is shifted, anew in every batch.
    dropout: share of the pixels set to zero, others in every batch, at most 0.9.
    seed: of the batches' order, the negatives and all else that is drawn.
    schedule: "joint" trains every layer on every batch (Hinton), "layerwise" each layer for
        `epochs` epochs before the next (the original package).
    negatives: "random" wrong labels, "hard" ones drawn from the softmax's predictions, or, for
        text, "rollout": rows that the network writes by itself.
    classifier_update_prob: share of the batches on which the softmax predicts and learns; for the
        others, hard negatives are drawn from what it has lately predicted for the same class.
    classifier_rate: the softmax's learning rate, as a share of the layers'.
    rollout_length: characters that a rollout writes at a stretch.
    mask_blurs: times the mask of a hybrid image is blurred (label="none").
    """

    epochs: int = 10
    batch_size: int = 100
    learning_rate: float = 0.001
    decay: str = "linear"
    random_shift: int = 0
    dropout: float = 0.0
    seed: int = 0
    schedule: str = "joint"
    negatives: str = "hard"
    classifier_update_prob: float = 1.0
    classifier_rate: float = 1.0
    rollout_length: int = 90
    mask_blurs: int = 6

    def __post_init__(self) -> None:
        """ValueError for a value out of range."""
        check_number("epochs", self.epochs, 1, whole=True)
        check_number("batch_size", self.batch_size, 1, whole=True)
        check_number("learning_rate", self.learning_rate, 0, 1, above=True)
        check_choice("decay", self.decay, DECAYS)
        check_number("random_shift", self.random_shift, 0, whole=True)
        check_number("dropout", self.dropout, 0, 0.9)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("negatives", self.negatives, NEGATIVES)
        check_number("classifier_update_prob", self.classifier_update_prob, 0, 1, above=True)
        check_number("classifier_rate", self.classifier_rate, 0, 1, above=True)
        check_number("rollout_length", self.rollout_length, 1, whole=True)
        check_number("mask_blurs", self.mask_blurs, 1, whole=True)


@dataclass(frozen=True)
class Batch:
    """What `train_batch` of any network gets from `training.fit`.

    images: (N, pixels).
    labels: (N,), the true classes.
    learning_rate: now, after its decay.
    generator: draws negatives, dropout and all else that is drawn.
    config: of the whole training.
    stage: what is trained now, one of the stages that the network's `start_training` gave.
    """

    images: "torch.Tensor"
    labels: "torch.Tensor"
    learning_rate: float
    generator: "torch.Generator"
    config: TrainConfig = TrainConfig()
    stage: int | str | None = None
