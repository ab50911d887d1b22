"""Training loops: Forward-Forward in its two schedules, and backpropagation."""

import os
import time
from collections.abc import Callable, Iterator
from itertools import product

import pandas as pd
import torch
from torch import nn

from ff_utils import checks, pairs, progress
from ff_utils.datasets import Dataset
from ff_utils.layers import normalise_
from ff_utils.networks import EVALUATION_ROWS, ForwardForward
from ff_utils.streaming import open_store

SCHEDULES = ("joint", "layerwise")
DECAYS = ("none", "linear")


def default_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def train_forward_forward(
    network: ForwardForward,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    schedule: str = "joint",
    negatives: str = "hard",
    decay: str = "linear",
    seed: int = 0,
    quiet: bool = False,
    after_epoch: Callable[[dict], None] | None = None,
) -> pd.DataFrame:
    """Train on `data`'s training images; returns one row an epoch.

    schedule: "joint" updates every layer on every batch (Hinton); "layerwise" trains each
        layer for `epochs` epochs before the next (the seed), recomputing its input from the
        layers below, so that no layer's activations of the data set are ever kept.
    negatives: "random" wrong labels, or "hard" ones drawn from the softmax's own guesses.
    decay: "linear" lowers the learning rate to zero over the second half of each run.
    batch_size: images a step; each gives one positive and one negative row.
    Columns: epoch, layer (trained; None for all), loss_1 ... (each layer's local loss),
    softmax_loss, error (on `data`'s test part, by softmax), seconds (training alone).
    Raises FloatingPointError where a loss stops being finite.
    """
    checks.one_of("schedule", schedule, SCHEDULES)
    checks.one_of("negatives", negatives, pairs.NEGATIVES)
    if network.softmax is None:
        raise ValueError(
            "this network was built with guesses=False: train it by train_layer_after_layer."
        )
    _check_training(data, epochs, batch_size, learning_rate, decay)
    generator = torch.Generator().manual_seed(seed)
    stages = [None] if schedule == "joint" else list(range(len(network.layers)))
    steps = epochs * -(-len(data.train_labels) // batch_size)
    rows = []
    for stage in stages:
        done = 0
        numbers = range(1, epochs + 1)
        if not quiet:
            numbers = progress.track(numbers, "epoch", len(rows), len(stages) * epochs)
        for epoch in numbers:
            start, losses, count = time.perf_counter(), 0, 0
            for images, labels in batches(data, batch_size, generator):
                rate = learning_rate * _decayed(done / steps, decay)
                losses = losses + forward_forward_step(
                    network, images, labels, stage, negatives, rate, generator
                )
                done, count = done + 1, count + 1
            mean = (losses / count).tolist()
            seconds = time.perf_counter() - start
            _refuse_non_finite(mean, epoch, stage)
            trained = range(len(network.layers)) if stage is None else [stage]
            row = {"epoch": epoch, "layer": None if stage is None else stage + 1}
            row |= {f"loss_{layer + 1}": mean[k] for k, layer in enumerate(trained)}
            depth = None if stage is None else stage + 1
            row |= {
                "softmax_loss": mean[-1],
                "error": softmax_error(network, data, depth),
                "seconds": seconds,
            }
            rows.append(row)
            if after_epoch:
                after_epoch(row)
    return pd.DataFrame(rows)


def forward_forward_step(
    network: ForwardForward,
    images: torch.Tensor,
    labels: torch.Tensor,
    stage: int | None,
    negatives: str,
    learning_rate: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """One batch through the softmax and the layers; returns their losses (trained + 1,).

    stage: the one layer to train, from 0; None for all of them.
    """
    depth = len(network.layers) if stage is None else stage + 1
    neutral = network.keep(network.activities(network.inputs(images, None), depth))
    logits = network.softmax(neutral)
    if negatives == "hard":
        wrong = pairs.hard_negatives(logits, labels, generator)
    else:
        wrong = pairs.random_negatives(labels, network.classes, generator)
    softmax_loss = network.softmax.step(neutral, logits, labels, learning_rate)
    del neutral
    both = torch.cat([labels, wrong])
    # The rows have no name here, so that they are freed once the first layer has used them.
    if stage is None:
        losses = network.step(network.inputs(images.repeat(2, 1), both), len(labels), learning_rate)
    else:
        h = network.inputs(images.repeat(2, 1), both)
        for above in network.activities(h, stage):
            h = above
        for layer in network.visit([stage], update=True):
            _, losses = layer.step(h, len(labels), learning_rate, network.gradient)
    return torch.cat([losses.reshape(-1), softmax_loss[None]])


def train_layer_after_layer(
    network: ForwardForward,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    store: str | os.PathLike = "memory",
    decay: str = "linear",
    seed: int = 0,
    quiet: bool = False,
) -> pd.DataFrame:
    """Train each layer for `epochs` before the next, on inputs kept from the layer below.

    The leanest schedule where layers are many: a layer is fetched once and its input is never
    computed again. To that end the batches and their negatives (random wrong labels) are drawn
    once; each epoch takes the batches in another order. One input of the data set's two copies
    is kept, the layer's output taking its place, until training ends.
    store: "memory" of the host, or an empty folder that it is kept in, one file a batch.
    Returns one row an epoch: epoch, layer, loss, seconds. The softmax is not trained: predict
    by goodness. Raises FloatingPointError where a loss stops being finite.
    """
    _check_training(data, epochs, batch_size, learning_rate, decay)
    generator = torch.Generator().manual_seed(seed)
    place = open_store(store, network.gradient.device)
    sizes = []
    for number, (images, labels) in enumerate(batches(data, batch_size, generator)):
        wrong = pairs.random_negatives(labels, network.classes, generator)
        h = network.inputs(images.repeat(2, 1), torch.cat([labels, wrong]))
        place.write(f"batch.{number}", h)
        sizes.append(len(h))

    def kept(number: int, width: int) -> torch.Tensor:
        return place.read(f"batch.{number}", h.new_empty(sizes[number], width))

    depth, steps, rows = len(network.layers), epochs * len(sizes), []
    for stage, layer in enumerate(network.visit(range(depth), update=True)):
        width, done = layer.weight.shape[1], 0
        numbers = range(1, epochs + 1)
        if not quiet:
            numbers = progress.track(numbers, "epoch", len(rows), depth * epochs)
        for epoch in numbers:
            start, total = time.perf_counter(), 0
            for number in torch.randperm(len(sizes), generator=generator).tolist():
                rate = learning_rate * _decayed(done / steps, decay)
                rows_in = kept(number, width)
                _, loss = layer.step(rows_in, sizes[number] // 2, rate, network.gradient)
                total, done = total + loss, done + 1
            mean = float(total / len(sizes))
            seconds = time.perf_counter() - start
            _refuse_non_finite([mean], epoch, stage)
            rows.append({"epoch": epoch, "layer": stage + 1, "loss": mean, "seconds": seconds})
        if stage + 1 < depth:
            for number in range(len(sizes)):
                y = layer(kept(number, width))
                normalise_(y, network.normalisation)
                place.write(f"batch.{number}", y)
    place.clear()
    return pd.DataFrame(rows)


def compare_choices(
    data: Dataset, hidden: list[int], network: dict, *, seeds: int, **settings: object
) -> pd.DataFrame:
    """Train one network for every schedule, kind of negatives and seed; one row a run.

    network: settings of `ForwardForward`; settings: of `train_forward_forward`.
    Columns: schedule, negatives, seed, error, seconds.
    """
    runs = list(product(SCHEDULES, pairs.NEGATIVES, range(seeds)))
    rows = []
    for schedule, negatives, seed in progress.track(runs, "run"):
        trial = ForwardForward(data.pixels, data.classes, hidden, seed=seed, **network)
        kept = train_forward_forward(
            trial,
            data,
            schedule=schedule,
            negatives=negatives,
            seed=seed,
            quiet=True,
            **settings,
        )
        rows.append(
            {
                "schedule": schedule,
                "negatives": negatives,
                "seed": seed,
                "error": kept.error.iloc[-1],
                "seconds": kept.seconds.sum(),
            }
        )
    return pd.DataFrame(rows)


def softmax_error(network: ForwardForward, data: Dataset, depth: int | None = None) -> float:
    """Share of `data`'s test images that the softmax over the first `depth` layers gets wrong."""
    depth = depth or len(network.layers)
    wrong = 0
    for images, labels in test_batches(data):
        activities = network.activities(network.inputs(images, None), depth)
        wrong += (network.softmax(activities).argmax(1) != labels).sum()
    return float(wrong) / len(data.test_labels)


def goodness_errors(network: ForwardForward, data: Dataset) -> list[float]:
    """Test error by the goodness of each layer alone, then by the sum over all layers."""
    wrong = 0
    for images, labels in test_batches(data, EVALUATION_ROWS // data.classes):
        found = network.label_goodness(images)
        both = torch.cat([found, found.sum(0, keepdim=True)])
        wrong = wrong + (both.argmax(2) != labels).sum(1)
    return (wrong / len(data.test_labels)).tolist()


def train_backprop(
    network: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    decay: str = "linear",
    seed: int = 0,
    quiet: bool = False,
) -> pd.DataFrame:
    """Train a classifier by backpropagation of the cross-entropy, with Adam.

    Gradients are freed right after each optimizer step. Columns as in
    `train_forward_forward`: epoch, loss, error, seconds.
    """
    _check_training(data, epochs, batch_size, learning_rate, decay)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    steps = epochs * -(-len(data.train_labels) // batch_size)
    rows, done = [], 0
    numbers = range(1, epochs + 1)
    for epoch in numbers if quiet else progress.track(numbers):
        start, total, count = time.perf_counter(), 0, 0
        for images, labels in batches(data, batch_size, generator):
            optimizer.param_groups[0]["lr"] = learning_rate * _decayed(done / steps, decay)
            total = total + backprop_step(network, optimizer, images, labels)
            done, count = done + 1, count + 1
        mean = float(total / count)
        seconds = time.perf_counter() - start
        _refuse_non_finite([mean], epoch, None)
        error = classifier_error(network, data)
        rows.append({"epoch": epoch, "loss": mean, "error": error, "seconds": seconds})
    return pd.DataFrame(rows)


def backprop_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """One step of plain backpropagation; returns the loss ()."""
    loss = nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.no_grad()
def classifier_error(network: nn.Module, data: Dataset) -> float:
    """Share of `data`'s test images that `network` gets wrong."""
    wrong = sum(
        (network(images).argmax(1) != labels).sum() for images, labels in test_batches(data)
    )
    return float(wrong) / len(data.test_labels)


def batches(
    data: Dataset, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The training images and labels in a fresh random order, `batch_size` at a time."""
    order = torch.randperm(len(data.train_labels), generator=generator)
    for chosen in order.to(data.train_labels.device).split(batch_size):
        yield data.train_images[chosen], data.train_labels[chosen]


def test_batches(
    data: Dataset, rows: int = EVALUATION_ROWS
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The test images and labels in order, `rows` at a time."""
    yield from zip(data.test_images.split(rows), data.test_labels.split(rows), strict=True)


def _check_training(
    data: Dataset, epochs: int, batch_size: int, learning_rate: float, decay: str
) -> None:
    checks.number("epochs", epochs, 1, whole=True)
    checks.number("batch_size", batch_size, 1, len(data.train_labels), whole=True)
    checks.number("learning_rate", learning_rate, 0, 1, above=True)
    checks.one_of("decay", decay, DECAYS)
    if len(data.train_labels.unique()) < 2:
        raise ValueError(f"{data.name} has one class only; give data with at least two.")


def _decayed(progress: float, decay: str) -> float:
    """Factor on the learning rate after `progress` (0 to 1) of the run."""
    return min(1.0, 2 * (1 - progress)) if decay == "linear" else 1.0


def _refuse_non_finite(losses: list[float], epoch: int, stage: int | None) -> None:
    for position, loss in enumerate(losses):
        if loss != loss or abs(loss) == float("inf"):
            layer = position if stage is None else stage
            raise FloatingPointError(
                f"the loss of layer {layer + 1} is {loss} in epoch {epoch}; "
                "lower learning_rate or scale."
            )
