"""Training loops: Forward-Forward in its two schedules, and backpropagation."""

import json
import math
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ff_utils import checks, files, pairs, paths, progress
from ff_utils.datasets import Dataset
from ff_utils.layers import normalise_
from ff_utils.networks import EVALUATION_ROWS, ForwardForward
from ff_utils.streaming import open_store

SCHEDULES = ("joint", "layerwise")
DECAYS = ("none", "linear")


def default_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fit(
    network: nn.Module,
    data: Dataset,
    step: Callable[..., dict[str, torch.Tensor]],
    measure: Callable[[object, int], dict],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    decay: str = "linear",
    jitter: int = 0,
    seed: int = 0,
    stages: Sequence[object] = (None,),
    optimizers: Sequence[torch.optim.Optimizer] = (),
    checkpoint: str | os.PathLike | None = None,
    quiet: bool = False,
    about: dict | None = None,
) -> pd.DataFrame:
    """The loop of every training here: `epochs` epochs for each of `stages`, one row an epoch.

    step: (stage, images, labels, learning_rate, generator) -> losses by name, each ().
    measure: (stage, epoch) -> what to note after the epoch; may refuse what it sees.
    jitter: pixels that each image is shifted by at most, anew for every batch.
    checkpoint: a file that is written after every epoch, whole or not at all. Where it is there,
        training goes on from it, to the same bits as an unbroken run. What it holds besides
        `network` and `optimizers`: generator, history, and what the run is `about`, which must be
        what this one is.
    Columns: epoch, stage, every loss (mean over batches), seconds (of training), and what
    `measure` gives. Raises FloatingPointError where a loss stops being finite, ValueError for a
    setting out of range or a checkpoint of another run; the last good checkpoint stays.
    """
    _check_training(data, epochs, batch_size, learning_rate, decay)
    checks.number("jitter", jitter, 0, min(data.shape[-2:]) - 1, whole=True)
    generator = torch.Generator().manual_seed(seed)
    course = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    course |= {"decay": decay, "jitter": jitter, "seed": seed, "stages": len(stages)}
    course |= {"data": data.checksum, "images": len(data.train_labels)} | (about or {})
    saved = Checkpoint(checkpoint, network, optimizers, generator, course)
    rows, total = saved.load(), len(stages) * epochs
    steps = epochs * -(-len(data.train_labels) // batch_size)
    numbers = range(len(rows), total)
    for number in numbers if quiet else progress.track(numbers, "epoch", len(rows), total):
        stage, epoch = stages[number // epochs], number % epochs + 1
        start, losses, made = time.perf_counter(), {}, Counter()
        done = (epoch - 1) * (steps // epochs)
        for count, (images, labels) in enumerate(batches(data, batch_size, generator, jitter)):
            rate = learning_rate * _decayed((done + count) / steps, decay)
            for name, loss in step(stage, images, labels, rate, generator).items():
                losses[name] = losses.get(name, 0) + loss
                made[name] += 1
        mean = {name: float(loss / made[name]) for name, loss in losses.items()}
        seconds = time.perf_counter() - start
        _refuse_non_finite(mean, epoch)
        row = {"epoch": epoch, "stage": stage, **mean, "seconds": seconds}
        rows.append(row | measure(stage, epoch))
        saved.save(rows)
    return pd.DataFrame(rows)


class Checkpoint:
    """A training run in one file: the network, its optimizers, the generator, the history."""

    def __init__(
        self,
        path: str | os.PathLike | None,
        network: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        generator: torch.Generator,
        course: dict,
    ) -> None:
        self.path = Path(path) if path else None
        self.parts = [network, *optimizers]
        self.generator, self.course = generator, json.dumps(course, sort_keys=True)

    def load(self) -> list[dict]:
        """Take up the run that is in the file; its history, empty where there is no file."""
        if self.path is None or not self.path.exists():
            return []
        place = paths.relative(self.path)
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            course, rows = kept["course"], json.loads(kept["rows"])
        except OSError as error:
            raise ValueError(f"{place} can't be read: {error.strerror}.") from error
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{place} is not a whole checkpoint: delete it.") from error
        if course != self.course:
            then, now = json.loads(course), json.loads(self.course)
            name = next(n for n in {**now, **then} if then.get(n) != now.get(n))
            raise ValueError(
                f"{place} is of a run whose {name} is {then.get(name)!r}, not {now.get(name)!r}: "
                "delete it or give another checkpoint."
            )
        for part, state in zip(self.parts, kept["states"], strict=True):
            part.load_state_dict(state)
        self.generator.set_state(kept["generator"])
        return rows

    def save(self, rows: list[dict]) -> None:
        """Write the run as it stands."""
        if self.path is None:
            return
        state = {
            "course": self.course,
            "rows": json.dumps(rows),
            "states": [part.state_dict() for part in self.parts],
            "generator": self.generator.get_state(),
        }
        try:
            files.replace(self.path, lambda temporary: torch.save(state, temporary))
        except (OSError, RuntimeError) as error:  # PyTorch's own writer raises the latter
            raise OSError(
                f"{paths.relative(self.path)} could not be written ({error}): make room on its "
                "disk or give another place; the last whole checkpoint is still there."
            ) from error


def train_forward_forward(
    network: ForwardForward,
    data: Dataset,
    *,
    schedule: str = "joint",
    negatives: str = "hard",
    guess_share: float = 1.0,
    softmax_rate: float = 1.0,
    dropout: float = 0.0,
    rollout_length: int = 90,
    after_epoch: Callable[[], dict] = dict,
    **course: object,
) -> pd.DataFrame:
    """Train on `data`'s training images; returns one row an epoch.

    schedule: "joint" updates every layer on every batch (Hinton); "layerwise" trains each
        layer for `epochs` epochs before the next (the seed), recomputing its input from the
        layers below, so that no layer's activations of the data set are ever kept.
    negatives: "random" wrong labels, or "hard" ones drawn from the softmax's own guesses; for
        text also "rollout", whole rows of what the network writes by itself, `rollout_length`
        characters at a stretch.
    guess_share: share of the batches for which the softmax guesses and learns. For the others,
        whose forward pass with a neutral label is saved, hard negatives are drawn from what it
        has lately guessed for images of the same class.
    softmax_rate: the softmax's learning rate, as a share of the layers'. It learns faster than
        they do and, in long trainings, too much by heart.
    dropout: share of the pixels set to zero, others for every batch.
    after_epoch: gives more to note of each epoch.
    course: as in `fit`. Of batch_size images, each gives one positive and one negative row.
    Columns: epoch, stage (the layer trained, from 0; None for all), loss_1 ... (each layer's
    local loss), softmax_loss, error (on `data`'s test part, by softmax), seconds.
    Raises FloatingPointError where a loss stops being finite or a layer falls silent.
    """
    checks.one_of("schedule", schedule, SCHEDULES)
    checks.one_of("negatives", negatives, (*pairs.NEGATIVES, "rollout"))
    checks.number("guess_share", guess_share, 0, 1, above=True)
    checks.number("softmax_rate", softmax_rate, 0, 1, above=True)
    checks.number("dropout", dropout, 0, 0.9)
    if network.softmax is None:
        raise ValueError(
            "this network was built with guesses=False: train it by train_layer_after_layer."
        )
    _refuse_unlabelled(network)
    if schedule == "layerwise" and network.softmax.unread:
        raise ValueError("schedule is 'layerwise', whose softmax reads layer 1: give first_read=1.")

    kind, streams = negatives, []
    if negatives == "rollout":
        kind = pairs.Rollouts(data, course["batch_size"], rollout_length)
        streams = [kind]

    def step(stage: int | None, *batch: object) -> dict[str, torch.Tensor]:
        *_, generator = batch
        guess = guess_share == 1 or float(torch.rand((), generator=generator)) < guess_share
        return forward_forward_step(network, stage, *batch, kind, guess, softmax_rate, dropout)

    def measure(stage: int | None, epoch: int) -> dict:
        depth = len(network.layers) if stage is None else stage + 1
        some = network.inputs(data.test_images[:EVALUATION_ROWS], None)
        refuse_silent(network.activations(some, depth), epoch)
        return {"error": softmax_error(network, data, depth), **after_epoch()}

    stages = [None] if schedule == "joint" else list(range(len(network.layers)))
    about = {"negatives": negatives, "guess_share": guess_share, "softmax_rate": softmax_rate}
    about |= {"dropout": dropout, "network": network.settings}
    if streams:
        about["rollout_length"] = rollout_length
    kept = {"optimizers": streams, "about": about}
    return fit(network, data, step, measure, stages=stages, **kept, **course)


def forward_forward_step(
    network: ForwardForward,
    stage: int | None,
    images: torch.Tensor,
    labels: torch.Tensor,
    learning_rate: float,
    generator: torch.Generator,
    negatives: str | pairs.Rollouts = "hard",
    guess: bool = True,
    softmax_rate: float = 1.0,
    dropout: float = 0.0,
) -> dict[str, torch.Tensor]:
    """One batch through the softmax and the layers; returns their losses by name.

    stage: the one layer to train, from 0; None for all of them. negatives: "random", "hard", or
    the network's own rollouts. guess: whether the softmax does, at its own rate; see
    `train_forward_forward`.
    """
    depth = len(network.layers) if stage is None else stage + 1
    rows, softmax, found = network.labelled(images), network.softmax, {}
    if dropout:
        rows.drop_pixels(dropout, generator)
    if guess:
        neutral = network.keep(rows.with_labels(None), depth)
        logits = softmax(neutral)
        found["softmax_loss"] = softmax.step(neutral, logits, labels, learning_rate * softmax_rate)
        softmax.note_guess(logits, labels)
        del neutral
    else:
        logits = softmax.confusion.log()[labels]
    if isinstance(negatives, pairs.Rollouts):
        windows, written = negatives.write(network.guess, images, generator)
        h = network.inputs(torch.cat([images, windows]), torch.cat([labels, written]))
    elif negatives == "hard":
        h = rows.with_labels(labels, pairs.hard_negatives(logits, labels, generator))
    else:
        wrong = pairs.random_negatives(labels, network.classes, generator)
        h = rows.with_labels(labels, wrong)
    del logits
    trained = range(depth)
    if stage is None:
        losses = network.step(h, len(labels), learning_rate)
    else:
        for above in network.activations(h, stage):
            h = above
        for layer in network.visit([stage], update=True):
            _, losses = layer.step(h, len(labels), learning_rate, network.gradient)
        trained = [stage]
    own = {f"loss_{k + 1}": loss for k, loss in zip(trained, losses.reshape(-1), strict=True)}
    return own | found


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
    _refuse_unlabelled(network)
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
            _refuse_non_finite({f"loss_{stage + 1}": mean}, epoch)
            rows.append({"epoch": epoch, "layer": stage + 1, "loss": mean, "seconds": seconds})
        if stage + 1 < depth:
            for number in range(len(sizes)):
                y = layer(kept(number, width))
                normalise_(y, network.normalisation)
                place.write(f"batch.{number}", y)
    place.clear()
    return pd.DataFrame(rows)


def compare(
    data: Dataset, network: dict, variants: dict[str, dict], *, seeds: int, **course: object
) -> pd.DataFrame:
    """Train a network for every variant and seed; one row a run.

    network: settings of `ForwardForward`; course: of `train_forward_forward`; a variant changes
    some of either. Columns: variant, what it changes, seed, error (by softmax), goodness_error
    (by the goodness of all layers), seconds.
    """
    rows = []
    for (name, changes), seed in progress.track(
        list(product(variants.items(), range(seeds))), "run"
    ):
        of_network = {key: changes.get(key, value) for key, value in network.items()}
        of_course = course | {k: v for k, v in changes.items() if k not in network}
        trial = ForwardForward(data.pixels, data.classes, seed=seed, **of_network)
        kept = train_forward_forward(trial, data, seed=seed, quiet=True, **of_course)
        found = {"error": kept.error.iloc[-1], "goodness_error": goodness_errors(trial, data)[-1]}
        rows.append({"variant": name, **changes, "seed": seed, **found})
        rows[-1]["seconds"] = kept.seconds.sum()
    return pd.DataFrame(rows)


def epochs_to(errors: pd.Series, levels: Sequence[float]) -> list[int | None]:
    """After how many epochs `errors`, one an epoch, first come to each of `levels`; else None."""
    reached = [(errors <= level).to_numpy().nonzero()[0] for level in levels]
    return [int(found[0]) + 1 if len(found) else None for found in reached]


def softmax_error(network: ForwardForward, data: Dataset, depth: int | None = None) -> float:
    """Share of `data`'s test images that the softmax over the first `depth` layers gets wrong."""
    depth = depth or len(network.layers)
    wrong = 0
    for images, labels in test_batches(data):
        activations = network.activations(network.labelled(images).with_labels(None), depth)
        wrong += (network.softmax(activations).argmax(1) != labels).sum()
    return float(wrong) / len(data.test_labels)


def prediction_error(network: nn.Module, data: Dataset, by: str) -> float:
    """Share of `data`'s test images that `network` gets wrong; by: as in `predict`."""
    wrong = sum(
        (network.predict(images, by) != labels).sum() for images, labels in test_batches(data)
    )
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
    dropout: float = 0.0,
    after_epoch: Callable[[], dict] = dict,
    **course: object,
) -> pd.DataFrame:
    """Train a classifier by backpropagation of the cross-entropy, with Adam.

    Gradients are freed right after each optimizer step. dropout: share of the pixels set to zero,
    others for every batch. course: as in `fit`. Columns as in `train_forward_forward`: epoch,
    loss, error, seconds, and what `after_epoch` gives.
    """
    checks.number("dropout", dropout, 0, 0.9)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)

    def step(_, images: torch.Tensor, labels: torch.Tensor, rate: float, generator) -> dict:
        optimizer.param_groups[0]["lr"] = rate
        if dropout:
            images = pairs.dropped(images, dropout, generator)
        return {"loss": backprop_step(network, optimizer, images, labels)}

    def measure(*_: object) -> dict:
        return {"error": classifier_error(network, data), **after_epoch()}

    kept = {"optimizers": [optimizer], "about": {"dropout": dropout}}
    return fit(network, data, step, measure, **kept, **course)


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
    data: Dataset, batch_size: int, generator: torch.Generator, jitter: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The training images and labels in a fresh random order, `batch_size` at a time.

    jitter: pixels that each image is shifted by at most, its edges filled with zeros.
    """
    order = torch.randperm(len(data.train_labels), generator=generator)
    for chosen in order.to(data.train_labels.device).split(batch_size):
        images = data.train_images[chosen]
        if jitter:
            images = shifted(images, data.shape, jitter, generator)
        yield images, data.train_labels[chosen]


def shifted(
    images: torch.Tensor, shape: tuple[int, ...], most: int, generator: torch.Generator
) -> torch.Tensor:
    """Images (N, pixels) each shifted by up to `most` pixels in both directions, at random.

    shape: (height, width) or (channels, height, width) of an image; what comes in is zero.
    """
    *_, height, width = shape
    planes = images.view(len(images), -1, height, width)
    padded = nn.functional.pad(planes, (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, len(images)), generator=generator).to(
        images.device
    )
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = right[:, None] + torch.arange(width, device=images.device)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).flatten(1)


def test_batches(
    data: Dataset, rows: int = EVALUATION_ROWS
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The test images and labels in order, `rows` at a time."""
    yield from zip(data.test_images.split(rows), data.test_labels.split(rows), strict=True)


def _refuse_unlabelled(network: ForwardForward) -> None:
    if network.label == "none":
        raise ValueError("label is 'none': train this network by train_unsupervised.")


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


def _refuse_non_finite(losses: dict[str, float], epoch: int) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            what = name.replace("loss_", "loss of layer ").replace("_", " ")
            raise FloatingPointError(
                f"the {what} is {loss} in epoch {epoch}; lower learning_rate or scale."
            )


def refuse_silent(activations: Iterable[torch.Tensor], epoch: int) -> None:
    """FloatingPointError for a layer whose units are zero for every image."""
    for number, h in enumerate(activations, start=1):
        if not h.any():
            raise FloatingPointError(
                f"layer {number} is dead in epoch {epoch}, no unit of it answers to any image; "
                "lower learning_rate or theta."
            )
