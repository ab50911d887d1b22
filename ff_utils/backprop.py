"""Backpropagation: the multilayer perceptron, and its training step with remedies for memory.

A remedy changes what is stored and when, never what is learned.
"""

import math
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from ff_utils.config import Batch, TrainConfig
from ff_utils.data import Dataset
from ff_utils.ff.blocks import TORCH_OPTIMIZERS
from ff_utils.ff.negatives import drop_pixels
from ff_utils.ff.network import classification_error
from ff_utils.utils import HOST, allocation_category, check_choice, check_ints, check_number

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

    normalised: each row gets length 1 between the hidden layers, as in the seed's "backprop".
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


class RowNormalisation(nn.Module):
    """Each row divided by its length: (rows, width) -> (rows, width)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Divide by the norm."""
        return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)


class Backprop(nn.Module):
    """A classifier and its training step by backpropagation of the cross-entropy.

    network: as `mlp` makes it. Gradients are freed right after each update.
    checkpoint: keep activations only between segments of about sqrt(layers) layers and recompute
        the others in the backward pass (Chen et al., arXiv 1604.06174).
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
        checkpoint: bool = False,
        optimizer_in_backward: bool = False,
        offload: bool = False,
        micro_batches: int = 1,
    ) -> None:
        super().__init__()
        check_choice("optimizer", optimizer, TORCH_OPTIMIZERS)
        check_number("micro_batches", micro_batches, 1, whole=True)
        self.network, self.micro_batches = network, micro_batches
        self.in_backward, self.last_part = optimizer_in_backward, True
        self.segments = split_segments(network) if checkpoint else [network]
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

    @property
    def moved(self) -> int:
        """Bytes moved between host and device so far."""
        return self.host.moved if self.host else 0

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


def segment_sizes(depth: int) -> list[int]:
    """Layers in each segment between checkpoints; the last segment is not checkpointed."""
    size = math.isqrt(depth - 1) + 1  # the square root, rounded up
    return [min(size, depth - start) for start in range(0, depth, size)]


def split_segments(network: nn.Sequential) -> list[nn.Sequential]:
    """`network` in segments of `segment_sizes`; the last one ends with the classifier."""
    *layers, _ = (k for k, module in enumerate(network) if isinstance(module, nn.Linear))
    starts = layers[:: segment_sizes(len(layers))[0]]
    return [network[start:end] for start, end in pairwise([*starts, len(network)])]


class Offload:
    """Moves what autograd saves to the host, each tensor once; storages of `stay` stay."""

    def __init__(self, stay: Iterable[torch.Tensor]) -> None:
        self.stay = {tensor.untyped_storage()._cdata for tensor in stay}
        self.moved = 0
        # A layer's output is saved twice in a row: by its ReLU and as the next layer's input.
        self.last: tuple[object, torch.Tensor] | None = None

    def saving(self, images: torch.Tensor) -> AbstractContextManager:
        """A context in which autograd saves to the host; `images` stay where they are."""
        stay = self.stay | {images.untyped_storage()._cdata}

        def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.device | None]:
            storage = tensor.untyped_storage()
            if storage._cdata in stay:
                return tensor, None
            if self.last is None or self.last[0]() is not storage:
                pinned = tensor.is_cuda
                with allocation_category(HOST):
                    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned or None)
                self.last = weakref.ref(storage), copy.copy_(tensor, non_blocking=pinned)
                self.moved += tensor.nbytes
            return self.last[1].view_as(tensor), tensor.device

        def unpack(packed: tuple[torch.Tensor, torch.device | None]) -> torch.Tensor:
            saved, device = packed
            if device is None:
                return saved
            self.moved += saved.nbytes
            back = torch.empty_like(saved, device=device)
            return back.copy_(saved, non_blocking=saved.is_pinned())

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
