"""Training: one loop for every network here, and Forward-Forward one layer after the other."""

import json
import math
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ff_utils.config import Batch, FFConfig, TrainConfig
from ff_utils.data import Dataset, test_batches
from ff_utils.ff.negatives import random_negatives
from ff_utils.ff.network import EVALUATION_ROWS, ForwardForward, classification_error
from ff_utils.offload import open_store
from ff_utils.utils import check_number, relative, replace_file, track, user_path


def fit(
    network: nn.Module,
    data: Dataset,
    config: TrainConfig,
    *,
    checkpoint: str | os.PathLike | None = None,
    note: Callable[[], dict] = dict,
    quiet: bool = False,
) -> pd.DataFrame:
    """Train any network here for `config.epochs` epochs of each of its stages; one row an epoch.

    checkpoint: a file written after every epoch. If it exists, training goes on from it to the
        same bits as an unbroken run.
    note: called after each epoch for more columns.
    Columns: epoch, stage (the layer trained, from 0, or "layers", "softmax"; None for all), each
    loss (mean over batches), seconds (of training), error on `data`'s test part, `note`'s.
    Raises FloatingPointError if a loss is not finite or a layer is dead, ValueError for a config
    or a checkpoint that does not fit.
    """
    check_fit(data, config)
    stages = network.start_training(data, config)
    generator = torch.Generator().manual_seed(config.seed)
    # Everything that decides a run's result, by name.
    settings = asdict(config) | {f"network.{k}": v for k, v in network.settings.items()}
    settings |= {"data": data.checksum, "images": len(data.train_labels)}
    saved = Checkpoint(checkpoint, network, generator, settings)
    rows, total = saved.load(), len(stages) * config.epochs
    steps = -(-len(data.train_labels) // config.batch_size)
    numbers = range(len(rows), total)
    for number in numbers if quiet else track(numbers, "epoch", len(rows), total):
        stage, epoch = stages[number // config.epochs], number % config.epochs + 1
        start, sums, counts = time.perf_counter(), {}, Counter()
        epoch_batches = batches(data, config.batch_size, generator, config.random_shift)
        for step, (images, labels) in enumerate(epoch_batches, start=(epoch - 1) * steps):
            rate = learning_rate(config, step, config.epochs * steps)
            batch = Batch(images, labels, rate, generator, config, stage)
            for name, loss in network.train_batch(batch).items():
                sums[name] = sums.get(name, 0) + loss
                counts[name] += 1
        means = {name: float(loss / counts[name]) for name, loss in sums.items()}
        seconds = time.perf_counter() - start
        check_finite(means, epoch)
        row = {"epoch": epoch, "stage": stage, **means, "seconds": seconds}
        rows.append(row | network.after_epoch(data, epoch, stage) | note())
        saved.save(rows)
    return pd.DataFrame(rows)


class Checkpoint:
    """A run in one file: the network, its optimizers, the generator, the history."""

    def __init__(
        self,
        path: str | os.PathLike | None,
        network: nn.Module,
        generator: torch.Generator,
        settings: dict[str, object],
    ) -> None:
        self.path = user_path(path) if path else None
        self.parts = [network, *network.optimizers]
        self.generator, self.settings = generator, json.dumps(settings)

    def load(self) -> list[dict]:
        """Take up the run that is in the file; its history, empty without a file."""
        if self.path is None or not self.path.exists():
            return []
        state = load_state(self.path, parts=("settings", "rows", "states", "generator"))
        check_same_run(self.path, json.loads(state["settings"]), json.loads(self.settings))
        for part, values in zip(self.parts, state["states"], strict=True):
            part.load_state_dict(values)
        self.generator.set_state(state["generator"])
        return json.loads(state["rows"])

    def save(self, rows: list[dict]) -> None:
        """Write the run as it is now."""
        if self.path:
            states = [part.state_dict() for part in self.parts]
            state = {"settings": self.settings, "rows": json.dumps(rows), "states": states}
            save_state(state | {"generator": self.generator.get_state()}, self.path)


def save_state(state: dict, path: Path) -> None:
    """Write `state` to a file, whole or not at all; OSError that says what to do."""
    try:
        replace_file(path, lambda temporary: torch.save(state, temporary))
    except (OSError, RuntimeError) as error:  # PyTorch's own writer raises the latter
        raise OSError(
            f"{relative(path)} could not be written ({error}): make room on its disk or give "
            "another place; the last whole checkpoint is still there."
        ) from error


def load_state(path: Path, device: torch.device | str = "cpu", parts: tuple[str, ...] = ()) -> dict:
    """What `save_state` wrote; ValueError for a file that is missing, not whole, altered, or
    without one of the `parts` named."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
            if archive.testzip():
                raise OSError("a checksum differs")
        state = torch.load(path, map_location=device, weights_only=True)
        if not state.keys() >= set(parts):
            raise KeyError(parts)
        return state
    except Exception as error:  # torch.load has many ways to say that a file is not whole
        raise ValueError(
            f"{relative(path)} is not a whole checkpoint: delete it, or empty its folder if that "
            "holds one run, to start again."
        ) from error


def check_same_run(
    path: Path, then: dict, now: dict, remedy: str = "delete it or give another checkpoint"
) -> None:
    """ValueError for the first setting of the run in `path` that is another one now."""
    for name in {**now, **then}:
        if then.get(name) != now.get(name):
            raise ValueError(
                f"{relative(path)} is of a run whose {name} is {then.get(name)!r}, not "
                f"{now.get(name)!r}: {remedy}."
            )


def fit_greedy_cached(
    network: ForwardForward,
    data: Dataset,
    config: TrainConfig,
    *,
    store: str | os.PathLike = "memory",
    quiet: bool = False,
) -> pd.DataFrame:
    """Train each layer for `config.epochs` epochs before the next, on its cached inputs.

    Device memory does not grow with depth: only one layer is at work. Its input is read from
    `store` ("memory" of the host, or an empty folder), where its output replaces it. Batches and
    their negatives (random wrong labels) are therefore drawn once; each epoch takes the batches in
    another order. The softmax is not trained. Of `config`: epochs, batch_size, learning_rate,
    decay, seed. Columns: epoch, layer, loss, seconds. FloatingPointError as in `fit`.
    """
    check_fit(data, config)
    if network.config.label == "none":
        raise ValueError("label is 'none': greedy training needs labels, train by fit.")
    if config.dropout or config.random_shift:
        raise ValueError("dropout and random_shift need new inputs in every epoch: give 0.")
    generator = torch.Generator().manual_seed(config.seed)
    cache, sizes = open_store(store, network.grad_buffer.device), []
    for number, (images, labels) in enumerate(batches(data, config.batch_size, generator)):
        wrong = random_negatives(labels, network.classes, generator)
        h = network.encode(images.repeat(2, 1), torch.cat([labels, wrong]))
        cache.write(f"batch.{number}", h)
        sizes.append(len(h))

    def cached(number: int, width: int) -> torch.Tensor:
        return cache.read(f"batch.{number}", h.new_empty(sizes[number], width))

    depth, rows = len(network.layers), []
    steps, epochs = config.epochs * len(sizes), range(1, config.epochs + 1)
    for stage, layer in enumerate(network.iter_layers(range(depth), update=True), start=1):
        width, done = layer.in_features, 0
        for epoch in epochs if quiet else track(epochs, "epoch", len(rows), depth * config.epochs):
            start, total = time.perf_counter(), 0
            for number in torch.randperm(len(sizes), generator=generator).tolist():
                rate = learning_rate(config, done, steps)
                positives = sizes[number] // 2
                _, loss = layer.step(cached(number, width), positives, rate, network.grad_buffer)
                total, done = total + loss, done + 1
            mean, seconds = float(total / len(sizes)), time.perf_counter() - start
            check_finite({f"loss_{stage}": mean}, epoch)
            rows.append({"epoch": epoch, "layer": stage, "loss": mean, "seconds": seconds})
        if stage < depth:
            for number in range(len(sizes)):
                y = layer(cached(number, width))
                layer.normalise_(y)
                cache.write(f"batch.{number}", y)
    cache.clear()
    return pd.DataFrame(rows)


def compare(
    data: Dataset,
    hidden: list[int],
    config: FFConfig,
    train_config: TrainConfig,
    variants: dict[str, dict],
    *,
    seeds: int,
) -> pd.DataFrame:
    """Train `ForwardForward` for every variant and seed; one row a run.

    variants: by name, the fields of `config`, of `train_config`, or `hidden`, that it changes.
    Columns: variant, what it changes, seed, error (by softmax), goodness_error (by the goodness
    of all layers), seconds.
    """
    rows, device = [], data.train_images.device
    runs = list(product(variants.items(), range(seeds)))
    for (name, changes), seed in track(runs, "run"):
        network_config, run_config = (
            replace(c, seed=seed, **{k: v for k, v in changes.items() if hasattr(c, k)})
            for c in (config, train_config)
        )
        sizes = (data.pixels, data.classes, changes.get("hidden", hidden))
        trial = ForwardForward(*sizes, network_config, device=device)
        history = fit(trial, data, run_config, quiet=True)
        row = {"variant": name, **changes, "seed": seed, "error": history.error.iloc[-1]}
        row["goodness_error"] = goodness_errors(trial, data)[-1]
        rows.append(row | {"seconds": history.seconds.sum()})
    return pd.DataFrame(rows)


def epochs_to(errors: pd.Series, levels: Sequence[float]) -> list[int | None]:
    """Epochs until `errors`, one an epoch, first come down to each of `levels`, else None."""
    reached = [(errors <= level).to_numpy().nonzero()[0] for level in levels]
    return [int(epochs[0]) + 1 if len(epochs) else None for epochs in reached]


@torch.no_grad()
def error_rate(network: nn.Module, data: Dataset, by: str = "softmax") -> float:
    """Share of `data`'s test images that `network`, of any kind, gets wrong.

    by: as in `predict`; a network without `predict` is a plain classifier.
    """
    if not hasattr(network, "predict"):
        return classification_error(network, data)
    parts = test_batches(data)
    wrong = sum((network.predict(images, by) != labels).sum() for images, labels in parts)
    return float(wrong) / len(data.test_labels)


def goodness_errors(network: nn.Module, data: Dataset) -> list[float]:
    """Test error by the goodness of each layer alone, then by the sum over all layers."""
    wrong = 0
    for images, labels in test_batches(data, EVALUATION_ROWS // data.classes):
        g = network.label_goodness(images)
        scores = torch.cat([g, g.sum(0, keepdim=True)])
        wrong = wrong + (scores.argmax(2) != labels).sum(1)
    return (wrong / len(data.test_labels)).tolist()


def batches(
    data: Dataset, batch_size: int, generator: torch.Generator, shift: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The training images and labels in a fresh random order, `batch_size` at a time.

    shift: pixels that each image is shifted by at most.
    """
    order = torch.randperm(len(data.train_labels), generator=generator)
    for chosen in order.to(data.train_labels.device).split(batch_size):
        images = data.train_images[chosen]
        if shift:
            images = random_shift(images, data.shape, shift, generator)
        yield images, data.train_labels[chosen]


def random_shift(
    images: torch.Tensor, shape: tuple[int, ...], most: int, generator: torch.Generator
) -> torch.Tensor:
    """Images (N, pixels) each shifted by up to `most` pixels in both directions, zeros beyond.

    shape: (height, width) or (channels, height, width) of an image.
    """
    *_, height, width = shape
    planes = images.view(len(images), -1, height, width)
    padded = nn.functional.pad(planes, (most,) * 4).permute(0, 2, 3, 1)
    shift = torch.randint(0, 2 * most + 1, (2, len(images), 1), generator=generator)
    down, right = shift.to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    shifted = padded[which, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).flatten(1)


def check_fit(data: Dataset, config: TrainConfig) -> None:
    """ValueError for a config that `data` does not allow."""
    check_number("batch_size", config.batch_size, 1, len(data.train_labels), whole=True)
    check_number("random_shift", config.random_shift, 0, min(data.shape[-2:]) - 1, whole=True)
    if len(data.train_labels.unique()) < 2:
        raise ValueError(f"{data.name} has one class only; give data with at least two.")


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step `step`, from 0, of a run of `steps`."""
    decays = config.decay == "linear"
    return config.learning_rate * (min(1.0, 2 * (1 - step / steps)) if decays else 1.0)


def check_finite(losses: dict[str, float], epoch: int) -> None:
    """FloatingPointError, which names the layer, for a mean loss that is not finite."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            what = name.replace("loss_", "loss of layer ").replace("_", " ")
            raise FloatingPointError(
                f"the {what} is {loss} in epoch {epoch}; lower learning_rate or sharpness."
            )
