"""Backpropagation: the multilayer perceptron, and its training step with remedies for memory.

A remedy changes what is stored and when, never what is learned.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.checkpoint import checkpoint_sequential

from ff_utils.config import Batch, TrainConfig
from ff_utils.data import Dataset
from ff_utils.ff.local import Fields, fields_of
from ff_utils.ff.negatives import drop_pixels
from ff_utils.ff.network import classification_error
from ff_utils.optimizers import TORCH_OPTIMIZERS
from ff_utils.utils import HOST, allocation_category, check_choice, check_ints, check_number

CHECKPOINTS = ("none", "segments", "halves", "all")
AUTOGRAD = {"use_reentrant": False, "preserve_rng_state": False}


def mlp(
    pixels: int,
    classes: int,
    hidden: list[int],
    *,
    seed: int = 0,
    normalised: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Linear and ReLU layers of widths `hidden`, then a linear classifier.

    normalised: each row gets length 1 between the hidden layers, as in the first study.
    """
    check_ints("hidden", hidden, 1)
    kind = {"device": device, "dtype": dtype}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for number, (below, above) in enumerate(pairwise([pixels, *hidden])):
            if normalised and number > 0:
                modules.append(RowNormalisation())
            modules += [nn.Linear(below, above, **kind), nn.ReLU()]
        modules.append(nn.Linear(hidden[-1], classes, **kind))
    return nn.Sequential(*modules)


def cnn(
    shape: tuple[int, int, int],
    classes: int,
    channels: list[int],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> nn.Sequential:
    """Blocks of a 3x3 convolution, ReLU and 2x2 max-pooling, then a linear classifier.

    It reads flat images of `shape` (channels, height, width). channels: outputs of each block.
    """
    check_ints("channels", channels, 1)
    inner, *sides = shape
    if len(shape) != 3 or min(sides) < 2 ** len(channels):
        raise ValueError(
            f"images of shape {shape} do not fit {len(channels)} blocks, each of which halves "
            "them: give images (channels, height, width) that are large enough, or fewer channels."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: list[nn.Module] = [nn.Unflatten(1, shape)]
        for below, above in pairwise([inner, *channels]):
            convolution = nn.Conv2d(below, above, 3, padding=1, device=device)
            modules.append(nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2)))
        outputs = channels[-1] * math.prod(side // 2 ** len(channels) for side in sides)
        classifier = nn.Linear(outputs, classes, device=device)
        modules.append(nn.Sequential(nn.Flatten(), classifier))
    return nn.Sequential(*modules)


def local_mlp(
    shape: tuple[int, ...],
    classes: int,
    fields: list[list[int]],
    *,
    padded: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> nn.Sequential:
    """Layers of local receptive fields and ReLU, as `LocalForwardForward` has them but without
    the label, then a linear classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for seen, channels in fields_of(shape, fields, 0, padded=padded):
            modules += [LocalLinear(seen, channels).to(device), nn.ReLU()]
        outputs = modules[-2].bias.numel()
        modules.append(nn.Linear(outputs, classes, device=device))
    return nn.Sequential(*modules)


class LocalLinear(nn.Module):
    """Locally connected: (rows, in_features) -> (rows, positions * channels), no shared weights."""

    def __init__(self, fields: Fields, channels: int) -> None:
        super().__init__()
        positions, seen = fields.shape
        self.fields, bound = fields, 1 / math.sqrt(seen)
        self.weight = nn.Parameter(torch.empty(positions, channels, seen).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(positions * channels).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weights of what lies beyond the edge count as zero."""
        weight, beyond = self.weight, self.fields.beyond
        weight = weight if beyond is None else weight.masked_fill(beyond, 0)
        return self.fields.product(weight, self.bias, self.fields.inputs(x)).t()


class RowNormalisation(nn.Module):
    """Each row divided by its length: (rows, width) -> (rows, width)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Divide by the norm."""
        return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)


class Backprop(nn.Module):
    """A classifier and its training step by backpropagation of the cross-entropy.

    network: as `mlp` makes it. Gradients are freed right after each update.
    checkpoint: which activations are kept; the backward pass recomputes the others (Chen et al.,
        arXiv 1604.06174). "none": all are kept. "segments": one for each run of about sqrt(layers)
        layers, for one more forward pass. "halves": checkpoints within checkpoints keep about
        log2(layers), for as many more forward passes at most (section 4 there). "all": every one
        is recomputed from the images, for about layers / 2 more forward passes.
    optimizer_in_backward: update each tensor as soon as its gradient is complete, then free the
        gradient, so that all gradients never live at once.
    offload: keep what autograd saves on the host, except weights and the batch's images.
    micro_batches: parts of a batch, whose gradients are added up before the update.
    """

    def __init__(
        self,
        network: nn.Sequential,
        *,
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
        checkpoint: str = "none",
        optimizer_in_backward: bool = False,
        offload: bool = False,
        micro_batches: int = 1,
    ) -> None:
        super().__init__()
        check_choice("optimizer", optimizer, TORCH_OPTIMIZERS)
        check_choice("checkpoint", checkpoint, CHECKPOINTS)
        check_number("micro_batches", micro_batches, 1, whole=True)
        self.network, self.micro_batches = network, micro_batches
        self.in_backward, self.last_part = optimizer_in_backward, True
        self.checkpoint, self.segments = checkpoint, [network]
        if checkpoint != "none":
            self.segments = split_segments(network, None if checkpoint == "segments" else 1)
        parameters = list(network.parameters())
        self.host = Offload(parameters) if offload else None
        groups = [[p] for p in parameters] if optimizer_in_backward else [parameters]
        make = TORCH_OPTIMIZERS[optimizer]
        self.optimizers = [make(group, lr=learning_rate, fused=True) for group in groups]
        if optimizer_in_backward:
            for parameter, own in zip(parameters, self.optimizers, strict=True):
                parameter.register_post_accumulate_grad_hook(lambda _, own=own: self._update(own))
        self.settings = {"parameters": [list(p.shape) for p in parameters], "optimizer": optimizer}
        self.settings |= {"checkpoint": checkpoint, "offload": offload}
        self.settings["optimizer_in_backward"] = optimizer_in_backward
        self.settings["micro_batches"] = micro_batches

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits: (rows, pixels) -> (rows, classes)."""
        if self.checkpoint in ("halves", "all"):
            return _recomputed(self.segments, images, self.checkpoint == "halves")
        return checkpoint_sequential(self.segments, len(self.segments), images, **AUTOGRAD)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One update from images (rows, pixels) and labels (rows,); returns the mean loss ()."""
        total, size = 0, -(-len(images) // self.micro_batches)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        for number, (part, part_labels) in enumerate(parts, start=1):
            self.last_part = number == len(parts)
            with self.host.saving(images) if self.host else nullcontext():
                loss = nn.functional.cross_entropy(self(part), part_labels, reduction="sum")
            loss = loss / len(images)
            loss.backward()
            total = total + loss.detach()
            del loss
        if not self.in_backward:
            self._update(*self.optimizers)
        return total

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        if self.last_part:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def start_training(self, data: Dataset, config: TrainConfig) -> list[None]:
        """The stages of a training: one, of all layers."""
        return [None]

    def train_batch(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One batch, dropout included; returns {"loss": ()}."""
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = batch.learning_rate
        images = drop_pixels(batch.images, batch.config.dropout, batch.generator)
        return {"loss": self.step(images, batch.labels)}

    def after_epoch(self, data: Dataset, epoch: int, stage: None = None) -> dict[str, float]:
        """The error on `data`'s test part."""
        with torch.no_grad():
            return {"error": classification_error(self, data)}


def split_segments(network: nn.Sequential, size: int | None = None) -> list[nn.Sequential]:
    """`network` in segments of `size` layers, or the square root of all; the last has the
    classifier."""
    *layers, _ = (k for k, module in enumerate(network) if isinstance(module, nn.Linear))
    starts = layers[:: size or math.isqrt(len(layers) - 1) + 1]  # rounded up
    return [network[start:end] for start, end in pairwise([*starts, len(network)])]


def _recomputed(layers: list[nn.Module], x: torch.Tensor, halves: bool) -> torch.Tensor:
    """The output of `layers`; activations of the first half, or else of all but the last, are
    recomputed in the same way."""
    if len(layers) == 1:
        return layers[0](x)
    first = len(layers) // 2 if halves else len(layers) - 1
    x = checkpointed(_recomputed, layers[:first], x, halves, **AUTOGRAD)
    return _recomputed(layers[first:], x, halves)


class Offload:
    """Moves what autograd saves to the host, each tensor once; those of `stay` stay.

    Tensors that share memory, as a layer's output and its views, move once.

    moved: bytes moved between host and device so far, both ways.
    """

    def __init__(self, stay: Iterable[torch.Tensor]) -> None:
        self.stay, self.moved = list(stay), 0

    @contextmanager
    def saving(self, batch: object) -> Iterator[None]:
        """A context in which autograd saves to the host; the tensors of `batch` stay too."""
        tensors = [*self.stay, *tree_leaves(batch)]
        stay = {t.untyped_storage()._cdata for t in tensors if torch.is_tensor(t)}
        # Much is saved twice: a layer's output by its ReLU and as the next layer's input.
        on_host: dict[tuple, tuple[weakref.ref, torch.Tensor]] = {}  # by the place in memory

        def pack(tensor: torch.Tensor) -> object:
            storage = tensor.untyped_storage()
            if storage._cdata in stay:
                return tensor
            row = _in_a_row(tensor)
            key = (storage._cdata, row.storage_offset(), len(row))
            reference, copy = on_host.get(key, (lambda: None, None))
            if reference() is not storage:
                with allocation_category(HOST):
                    copy = torch.empty_like(row, device="cpu", pin_memory=row.is_cuda or None)
                copy.copy_(row, non_blocking=row.is_cuda)
                self.moved += copy.nbytes
                on_host[key] = weakref.ref(storage, lambda _: on_host.pop(key, None)), copy
            place = (tensor.shape, tensor.stride(), tensor.storage_offset() - row.storage_offset())
            return copy, tensor.dtype, place, tensor.device

        def unpack(packed: object) -> torch.Tensor:
            if torch.is_tensor(packed):
                return packed
            copy, dtype, place, device = packed
            self.moved += copy.nbytes
            back = torch.empty_like(copy, device=device)
            back.copy_(copy, non_blocking=copy.is_pinned())
            return back.view(dtype).as_strided(*place)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        on_host.clear()


def _in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's elements, or else all of its storage's, in one row."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((length,), (1,), 0)
