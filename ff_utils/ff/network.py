"""The Forward-Forward network, and how it trains: Hinton, arXiv 2212.13345, section 3.

A training step (`ForwardForward.train_batch`) goes twice through the layers: once with the neutral
label, for the classifier and the choice of negatives, once with positive and negative rows, for
the layers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from ff_utils.config import Batch, FFConfig, RecurrentConfig, TrainConfig
from ff_utils.data import Dataset, test_batches
from ff_utils.ff import negatives
from ff_utils.ff.layers import FFLayer, SoftmaxClassifier, normalise_, split_batch
from ff_utils.ff.negatives import DenseInput, FactoredInput
from ff_utils.utils import allocation_category, check_choice, check_ints, check_number

PREDICTIONS = ("softmax", "goodness", "both")
EVALUATION_ROWS = 2000


class FFNetwork(nn.Module):
    """What every FF network has: sizes, settings, predictions, and the end of an epoch.

    A network has `layers`, a `softmax` classifier or None, `neutral_activations(images, depth)`
    and `label_goodness(images)`.
    """

    def __init__(
        self, pixels: int, classes: int, hidden: list[int], config: FFConfig | RecurrentConfig
    ) -> None:
        super().__init__()
        check_number("pixels", pixels, 1, whole=True)
        check_number("classes", classes, 2, whole=True)
        check_ints("hidden", hidden, 1)
        self.pixels, self.classes, self.hidden = pixels, classes, list(hidden)
        self.config = config
        self.settings = {"pixels": pixels, "classes": classes, "hidden": list(hidden)}
        self.settings |= asdict(config)
        self.settings.pop("recompute", None)  # the results are the same bits
        self.optimizers: list[nn.Module] = []  # what a checkpoint holds besides the network

    def classify(self, images: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """The classifier's logits (N, classes) of images (N, pixels), from `depth` layers or all.

        ValueError for a network without a classifier.
        """
        if self.softmax is None:
            raise ValueError("this network was built with classifier=False: predict by 'goodness'.")
        return self.softmax(self.neutral_activations(images, depth))

    def after_epoch(self, data: Dataset, epoch: int, stage: int | str | None = None) -> dict:
        """The classifier's test error, once it is trained; FloatingPointError for a dead layer."""
        depth = stage + 1 if isinstance(stage, int) else len(self.layers)
        some = self.neutral_activations(data.test_images[:EVALUATION_ROWS], depth)
        for number, h in enumerate(some, start=1):
            if not h.any():
                raise FloatingPointError(
                    f"layer {number} is dead in epoch {epoch}: all its units are zero for every "
                    "image; lower learning_rate or threshold."
                )
        if stage == "layers":
            return {}
        return {"error": classification_error(partial(self.classify, depth=depth), data)}

    def scores(self, images: torch.Tensor, by: str) -> torch.Tensor:
        """A score for each label: images (N, pixels) -> (N, classes), largest is best.

        by: "softmax", the logits under the neutral label; "goodness", summed over all layers;
            "both", the log probability of the softmax plus the mean over layers of goodness times
            sharpness, which is a log probability too.
        """
        check_choice("by", by, PREDICTIONS)
        if by == "softmax":
            return self.classify(images)
        g = self.label_goodness(images)
        if by == "goodness":
            return g.sum(0)
        return g.mean(0).mul_(self.config.sharpness).add_(self.classify(images).log_softmax(1))

    def predict(
        self, images: torch.Tensor, by: str = "goodness", rows: int = EVALUATION_ROWS
    ) -> torch.Tensor:
        """Class of each image (N,): the best of `scores`, from `rows` network inputs at a time."""
        size = rows if by == "softmax" else max(1, rows // self.classes)
        return torch.cat([self.scores(part, by).argmax(1) for part in images.split(size)])


class ForwardForward(FFNetwork):
    """A stack of FF layers that reads an image with a label written in.

    With label="none" it reads images alone and learns without labels. label="joined",
    normalisation="length", threshold=2, sharpness=1 is the original's.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        hidden: list[int],
        config: FFConfig = FFConfig(),
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(pixels, classes, hidden, config)
        if config.label == "pixels":
            check_number("pixels", pixels, classes, whole=True)
        self.image_shape: tuple[int, ...] = ()
        plan = self.plan(pixels + (classes if config.label == "joined" else 0))
        # One gradient buffer, as large as the largest layer, serves all of them in turn.
        largest = torch.zeros(max(size for _, size in plan), device=device, dtype=dtype)
        self.register_buffer("grad_buffer", largest, persistent=False)
        generator = torch.Generator().manual_seed(config.seed)
        kind = {"config": config, "generator": generator, "dtype": dtype}
        self.layers = nn.ModuleList(
            self.build_layer(number, partial(make, **kind)) for number, (make, _) in enumerate(plan)
        )
        self.softmax = None
        if config.classifier:
            kind = {"first": config.first_read, "device": device, "dtype": dtype}
            self.softmax = SoftmaxClassifier(self.hidden, classes, config, **kind)

    def plan(self, in_features: int) -> list[tuple[Callable[..., FFLayer], int]]:
        """What makes each layer above an input of `in_features`, and how many weights it has."""
        sizes = pairwise([in_features, *self.hidden])
        return [(partial(FFLayer, below, width), below * width) for below, width in sizes]

    def build_layer(self, number: int, make: Callable[..., FFLayer]) -> FFLayer:
        """Make a layer where it lives: here, on the device with all others."""
        return make(device=self.grad_buffer.device)

    def iter_layers(self, numbers: Sequence[int], update: bool = False) -> Iterator[FFLayer]:
        """The layers of these numbers in turn, each ready to run; update: to be trained."""
        for number in numbers:
            yield self.layers[number]

    def encode(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Images (N, pixels) with labels (N,), or the neutral label for None, normalised."""
        images, label = images.to(self.grad_buffer.dtype), self.config.label
        h = negatives.with_label(images, labels, self.classes, label, self.config.label_scale)
        normalise_(h, self.config.normalisation)
        return h

    def labelled_input(self, images: torch.Tensor) -> FactoredInput | DenseInput:
        """Images (N, pixels) as the first layer reads them, to be given labels."""
        if self.config.label == "none":
            return DenseInput(images, self.encode)
        return FactoredInput(images.to(self.grad_buffer.dtype), self.classes, self.config)

    def forward(self, h: torch.Tensor | FactoredInput) -> list[torch.Tensor]:
        """Normalised activations of every layer: (rows, inputs) -> list of (rows, width)."""
        return list(self.activations(h, len(self.layers)))

    def activations(self, h: torch.Tensor | FactoredInput, depth: int) -> Iterator[torch.Tensor]:
        """Normalised activations of the first `depth` layers, one at a time."""
        for layer in self.iter_layers(range(depth)):
            h = layer(h)
            layer.normalise_(h)
            yield h

    def neutral_activations(
        self, images: torch.Tensor, depth: int | None = None
    ) -> Iterator[torch.Tensor]:
        """`activations` of images (N, pixels) with the neutral label, of `depth` layers or all."""
        rows = self.labelled_input(images).with_labels(None)
        yield from self.activations(rows, depth or len(self.layers))

    def cache_activations(
        self, h: torch.Tensor | FactoredInput, depth: int
    ) -> Callable[[], Iterable[torch.Tensor]]:
        """What gives `activations` each time it is called: cached, or recomputed."""
        if self.config.recompute:
            return partial(self.activations, h, depth)
        kept = list(self.activations(h, depth))
        return lambda: kept

    def step(
        self,
        h: torch.Tensor | FactoredInput,
        positives: int,
        learning_rate: float,
        micro_batches: int = 1,
        numbers: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Train the layers of these numbers, or all, on one batch, as `FFLayer.step`.

        A layer is done before the next one starts: two activations live at a time. Returns the
        layers' losses (layers,).
        """
        losses = []
        for layer in self.iter_layers(numbers or range(len(self.layers)), update=True):
            h, loss = layer.step(h, positives, learning_rate, self.grad_buffer, micro_batches)
            losses.append(loss)
        return torch.stack(losses)

    def step_accumulated(
        self, h: torch.Tensor, positives: int, learning_rate: float, micro_batches: int
    ) -> torch.Tensor:
        """As `step`, but each part of the batch goes through all layers before the next part.

        Every layer's gradient is kept from part to part, and the activations of one part only.
        h: (rows, inputs), normalised; left as it is.
        """
        numbers = range(len(self.layers))
        with allocation_category("gradients"):
            gradients = [
                [torch.empty_like(layer.weight), torch.empty_like(layer.bias)]
                for layer in self.iter_layers(numbers)
            ]
        losses = 0
        pairs = self.config.loss == "pairwise"
        for part in split_batch(len(h), positives, micro_batches, pairs):
            y, of_part = h[part.rows].clone(), []
            for layer, pair in zip(self.iter_layers(numbers), gradients, strict=True):
                y, loss = layer.add_gradient(y, part, *pair)
                of_part.append(loss)
            losses = losses + torch.stack(of_part)
            del y
        layers = self.iter_layers(numbers, update=True)
        for layer, pair in zip(layers, gradients, strict=True):
            layer.optimizer.update(pair, learning_rate)
        return losses

    def start_training(self, data: Dataset, config: TrainConfig) -> list[int | str | None]:
        """Get ready to train on `data`; returns the stages, each of `config.epochs` epochs.

        None is all layers at once, a number one layer. ValueError where config does not fit.
        """
        self.optimizers, self.image_shape = [], tuple(data.shape)
        if self.config.label == "none":
            if len(data.train_labels) % config.batch_size == 1:
                raise ValueError(
                    f"batch_size is {config.batch_size}, which leaves one image alone."
                )
            return ["layers", "softmax"]
        if self.softmax is None:
            raise ValueError("built with classifier=False: train this by fit_greedy_cached.")
        if config.schedule == "layerwise" and self.config.first_read > 1:
            raise ValueError(
                "schedule is 'layerwise': its softmax reads layer 1, give first_read=1."
            )
        if config.negatives == "rollout":
            rollouts = negatives.Rollouts(data, config.batch_size, config.rollout_length)
            self.optimizers = [rollouts]
        return [None] if config.schedule == "joint" else list(range(len(self.layers)))

    def train_batch(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One step of the stage's layers and the classifier; returns the losses () by name.

        Each image gives one positive and one negative row. Without labels the negative rows are
        hybrids, and the classifier leaves the layers as they are.
        """
        labels, config, generator = batch.labels, batch.config, batch.generator
        if self.config.label == "none":
            return self._train_without_labels(batch)
        prob, losses = config.classifier_update_prob, {}
        classify = prob == 1 or float(torch.rand((), generator=generator)) < prob
        rows = self.labelled_input(batch.images)
        rows.drop_pixels(config.dropout, generator)
        numbers = [*range(len(self.layers))] if batch.stage is None else [batch.stage]
        if classify:
            neutral = rows.with_labels(None)
            logits, losses["softmax_loss"] = self._train_softmax(neutral, batch, numbers[-1] + 1)
            self.softmax.update_confusion(logits, labels)
        else:  # what the classifier lately predicted for images of the same class
            logits = self.softmax.confusion.log()[labels]
        if config.negatives == "rollout":
            windows, written = self.optimizers[0].write(self.classify, batch.images, generator)
            h = self.encode(torch.cat([batch.images, windows]), torch.cat([labels, written]))
        elif config.negatives == "hard":
            h = rows.with_labels(labels, negatives.hard_negatives(logits, labels, generator))
        else:
            wrong = negatives.random_negatives(labels, self.classes, generator)
            h = rows.with_labels(labels, wrong)
        del logits
        for below in self.activations(h, numbers[0]):
            h = below
        found = self.step(h, len(labels), batch.learning_rate, numbers=numbers)
        return named_losses(found, first=numbers[0] + 1) | losses

    def _train_softmax(
        self, h: torch.Tensor | FactoredInput, batch: Batch, depth: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train the classifier on the first `depth` layers; its logits before, and its loss."""
        activations = self.cache_activations(h, depth)
        logits = self.softmax(activations())
        rate = batch.learning_rate * batch.config.classifier_rate
        return logits, self.softmax.step(activations(), logits, batch.labels, rate)

    def _train_without_labels(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The layers on images and hybrids of them, or the classifier, as the stage says."""
        images = negatives.drop_pixels(batch.images, batch.config.dropout, batch.generator)
        if batch.stage == "softmax":
            neutral = self.encode(images, None)
            return {"softmax_loss": self._train_softmax(neutral, batch, len(self.layers))[1]}
        mixed = partial(negatives.hybrid_images, images, self.image_shape, batch.generator)
        # Rows without a name here are freed once the first layer has used them.
        return named_losses(
            self.step(
                self.encode(torch.cat([images, mixed(batch.config.mask_blurs)]), None),
                len(images),
                batch.learning_rate,
            )
        )

    def label_goodness(self, images: torch.Tensor) -> torch.Tensor:
        """Goodness of every label in every layer: images (N, pixels) -> (layers, N, classes).

        The labels go through a layer together, so that each layer is visited once.
        """
        if self.config.label == "none":
            raise ValueError("label is 'none': goodness knows no label, predict by 'softmax'.")
        count = len(images)
        tried = torch.arange(self.classes, device=images.device)[:, None].expand(-1, count)
        h = self.labelled_input(images).with_labels(*tried.contiguous())
        result = self.grad_buffer.new_empty(len(self.layers), self.classes, count)
        for number, layer in enumerate(self.iter_layers(range(len(self.layers)))):
            h = layer(h)
            g = layer.goodness_of(layer.normalise_(h))
            result[number] = g.view(self.classes, count)
        return result.transpose(1, 2)


def named_losses(losses: Iterable[torch.Tensor], first: int = 1) -> dict[str, torch.Tensor]:
    """Losses of layers by name: loss_1 and so on, or beginning with layer `first`."""
    return {f"loss_{number}": loss for number, loss in enumerate(losses, start=first)}


def classification_error(classify: Callable[[torch.Tensor], torch.Tensor], data: Dataset) -> float:
    """Share of `data`'s test images for which `classify` (images -> logits) is wrong."""
    batches = test_batches(data, EVALUATION_ROWS)
    wrong = sum((classify(images).argmax(1) != labels).sum() for images, labels in batches)
    return float(wrong) / len(data.test_labels)
