"""Forward-Forward without labels: images against hybrids of two, then a softmax on top."""

import pandas as pd
import torch

from ff_utils import checks, pairs
from ff_utils.datasets import Dataset
from ff_utils.networks import EVALUATION_ROWS, ForwardForward
from ff_utils.training import fit, refuse_silent, softmax_error

STAGES = ("layers", "softmax")


def train_unsupervised(
    network: ForwardForward,
    data: Dataset,
    *,
    batch_size: int,
    blurs: int = 6,
    dropout: float = 0.0,
    **course: object,
) -> pd.DataFrame:
    """Train the layers to tell images from hybrids, then the softmax on what they have become.

    The layers see no label, all of them learn from every batch, and the softmax leaves them as
    they are. network: built with label="none". blurs: of the hybrids' masks.
    dropout: share of the pixels set to zero, others for every batch.
    batch_size, course: as in `training.fit`; `epochs` for the layers and as many for the softmax.
    Columns: epoch, stage ("layers" or "softmax"), loss_1 ... or softmax_loss and error (on
    `data`'s test part), seconds. Raises as `training.train_forward_forward` does.
    Hinton, arXiv 2212.13345, section 3.2.
    """
    if network.label != "none":
        raise ValueError(f"label is {network.label!r}: build the network with label='none'.")
    checks.number("blurs", blurs, 1, whole=True)
    checks.number("dropout", dropout, 0, 0.9)
    checks.number("batch_size", batch_size, 2, len(data.train_labels), whole=True)
    if len(data.train_labels) % batch_size == 1:
        alone = "which leaves one image alone, with no other to mix it with: give another"
        raise ValueError(f"batch_size is {batch_size}, {alone}.")

    def step(stage: str, images: torch.Tensor, labels: torch.Tensor, rate: float, generator):
        if dropout:
            images = pairs.dropped(images, dropout, generator)
        if stage == "softmax":
            return {"softmax_loss": softmax_step(network, images, labels, rate)}
        losses = unsupervised_step(network, images, data.shape, rate, generator, blurs)
        return {f"loss_{k}": loss for k, loss in enumerate(losses, start=1)}

    def measure(stage: str, epoch: int) -> dict:
        some = network.inputs(data.test_images[:EVALUATION_ROWS], None)
        refuse_silent(network.activations(some, len(network.layers)), epoch)
        return {"error": softmax_error(network, data)} if stage == "softmax" else {}

    course |= {"batch_size": batch_size, "stages": STAGES}
    about = {"blurs": blurs, "dropout": dropout, "network": network.settings}
    return fit(network, data, step, measure, about=about, **course)


def unsupervised_step(
    network: ForwardForward,
    images: torch.Tensor,
    shape: tuple[int, ...],
    learning_rate: float,
    generator: torch.Generator,
    blurs: int = 6,
) -> torch.Tensor:
    """One batch of images, and as many hybrids, through all layers; their losses (layers,)."""

    def rows() -> torch.Tensor:
        return torch.cat([images, pairs.hybrid_images(images, shape, generator, blurs)])

    # The rows have no name here, so that they are freed once the first layer has used them.
    return network.step(network.inputs(rows(), None), len(images), learning_rate)


def softmax_step(
    network: ForwardForward, images: torch.Tensor, labels: torch.Tensor, learning_rate: float
) -> torch.Tensor:
    """One step of the softmax on the layers as they are; returns its loss ()."""
    rows = network.labelled(images).with_labels(None)
    activations = network.keep(rows, len(network.layers))
    logits = network.softmax(activations)
    return network.softmax.step(activations, logits, labels, learning_rate)
