"""Positive and negative samples: an image with its true label, and with a wrong one.

Hinton, "The Forward-Forward Algorithm" (arXiv 2212.13345), section 3.3.
"""

import torch

LABELS = ("joined", "pixels")
NEGATIVES = ("random", "hard")


def with_label(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    classes: int,
    label: str = "pixels",
    scale: float = 1.0,
) -> torch.Tensor:
    """Images (N, pixels) with their labels (N,) written in, as a new tensor.

    label: "pixels" overwrites the first `classes` pixels with the one-hot label (Hinton);
        "joined" appends it as `classes` more inputs (the seed).
    labels: None writes the neutral label, 1 / classes everywhere.
    """
    code = label_code(labels, len(images), classes, scale, images)
    if label == "joined":
        return torch.cat([images, code], dim=1)
    return torch.cat([code, images[:, classes:]], dim=1)


def label_code(
    labels: torch.Tensor | None, rows: int, classes: int, scale: float, like: torch.Tensor
) -> torch.Tensor:
    """One-hot labels times `scale`, (rows, classes); the neutral code where labels is None."""
    if labels is None:
        return like.new_full((rows, classes), scale / classes)
    return like.new_zeros(rows, classes).scatter_(1, labels[:, None], scale)


def random_negatives(
    labels: torch.Tensor, classes: int, generator: torch.Generator
) -> torch.Tensor:
    """A wrong label for each true one (N,), all wrong labels equally likely."""
    shift = torch.randint(1, classes, labels.shape, generator=generator, device=generator.device)
    return (labels + shift.to(labels.device)) % classes


def hard_negatives(
    logits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A wrong label for each true one (N,), drawn as the network itself would guess.

    logits: (N, classes) of the network's guess given a neutral label. The true label's
    probability is set to zero before drawing (Hinton, section 3.3: negatives the network
    finds plausible teach it most).
    """
    wrong = logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)
    # Drawn by inverting the cumulative distribution: one uniform number a row.
    draw = torch.rand(len(labels), 1, generator=generator, device=generator.device)
    cumulative = wrong.cumsum(dim=1)
    target = draw.to(wrong) * cumulative[:, -1:]
    drawn = (cumulative <= target).sum(dim=1)
    # A draw that rounds onto a boundary must not land on a class of probability zero.
    landed = wrong.gather(1, drawn.clamp(max=logits.shape[1] - 1)[:, None])[:, 0] > 0
    return torch.where(landed, drawn, wrong.argmax(dim=1))
