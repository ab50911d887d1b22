"""What the site's charts draw: two small trainings, as notebook 1 has them, and formulas."""

import torch

from ff_utils import FFConfig, ForwardForward, TrainConfig, fit, load_dataset, memory
from ff_utils.config import LayerConfig
from ff_utils.data import Dataset
from ff_utils.ff.layers import FFLayer, goodness, normalise_
from ff_utils.ff.negatives import random_negatives, with_label
from ff_utils.memory.formulas import FORMULAS

HIDDEN, THETA, SEED = 300, 2.0, 0
STEPS = [0, 2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 60, 80, 100, 130, 160, 200, 240]
BINS = 40
EXAMPLES = 10  # digits that were read rightly, one of each label
MISREAD = 2
# Sizes that the memory chart offers.
DEPTHS = [2, 3, 5, 7, 10, 15, 22, 33, 47, 70, 100]
WIDTHS = [250, 500, 1000, 2000, 4000, 8000]
IMAGES = [10, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 50000]


def chart_data() -> dict[str, object]:
    """The numbers of every chart, by its name in docs/_static/charts.js."""
    data = load_dataset("digits")
    return {"goodness": goodness_by_step(data), "digits": digits(data), "memory": memory_by_size()}


def goodness_by_step(data: Dataset) -> dict[str, object]:
    """Histograms of one layer's goodness of positive and negative inputs, at each of STEPS.

    edges: of the bins. steps. positive, negative: a list of counts for each step. theta.
    """
    generator = torch.Generator().manual_seed(SEED)
    layer = FFLayer(data.pixels, HIDDEN, LayerConfig(threshold=THETA), generator=generator)
    labels = data.train_labels
    negatives = random_negatives(labels, data.classes, generator)
    pictures = data.train_images.repeat(2, 1)
    twins = with_label(pictures, torch.cat([labels, negatives]), data.classes, scale=2.0)
    normalise_(twins, "mean_square")
    grad_buffer = torch.zeros(layer.weight.numel())
    found = []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            found.append(goodness(layer(twins)))
        layer.step(twins.clone(), len(labels), 0.01, grad_buffer)
    edges = torch.linspace(0, torch.stack(found).quantile(0.999).item(), BINS + 1)
    shown = [g.clamp(max=edges[-1]) for g in found]

    def counts(rows: slice) -> list[list[int]]:
        return [torch.histogram(g[rows], edges)[0].int().tolist() for g in shown]

    return {
        "edges": [round(edge, 3) for edge in edges.tolist()],
        "steps": STEPS,
        "positive": counts(slice(len(labels))),
        "negative": counts(slice(len(labels), None)),
        "theta": THETA,
    }


def digits(data: Dataset) -> list[dict[str, object]]:
    """Test digits with every layer's goodness of every label: one of each label that the network
    reads rightly, then some that it misreads.

    pixels: rows of numbers from 0 to 1. goodness: for each layer ten numbers.
    """
    config = FFConfig(label_scale=4.0, threshold=1.0, sharpness=30.0, seed=SEED)
    network = ForwardForward(data.pixels, data.classes, [HIDDEN, HIDDEN], config)
    settings = {"epochs": 20, "batch_size": 50, "learning_rate": 0.003, "negatives": "hard"}
    fit(network, data, TrainConfig(**settings, seed=SEED), quiet=True)
    found = network.label_goodness(data.test_images)
    predicted = found.sum(0).argmax(1)
    is_right = predicted == data.test_labels
    chosen = [
        int((is_right & (data.test_labels == label)).nonzero()[0]) for label in range(EXAMPLES)
    ]
    chosen += [int(k) for k in (~is_right).nonzero()[:MISREAD, 0]]
    return [
        {
            "label": int(data.test_labels[k]),
            "predicted": int(predicted[k]),
            "pixels": _rounded(data.test_images[k].view(data.shape)),
            "goodness": _rounded(found[:, k]),
        }
        for k in chosen
    ]


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in values.tolist()]


def memory_by_size() -> dict[str, object]:
    """MB that a step needs on the device, for every arm that has a formula.

    peaks: of an arm, for every depth, width and number of images, the last of them fastest.
    """
    arms = [memory.ARMS[name] for name in FORMULAS]
    sizes = [(d, h, images) for d in DEPTHS for h in WIDTHS for images in IMAGES]
    return {
        "depths": DEPTHS,
        "widths": WIDTHS,
        "images": IMAGES,
        "arms": [
            {
                "title": arm.title,
                "colour": arm.colour,
                "pale": arm.original,
                "peaks": [
                    round(FORMULAS[arm.name](memory.Sizes(d, h, arm.rows(images))) / 1e6, 1)
                    for d, h, images in sizes
                ],
            }
            for arm in arms
        ],
    }
