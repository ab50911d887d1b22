"""Backpropagation with the stock remedies for its memory, one by one and all together.

Each changes what is stored and when, never what is learned.
"""

import math
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ff_utils import checks
from ff_utils.live_bytes import HOST, counted_as

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class Backprop:
    """A training step of a classifier by backpropagation.

    network: blocks in a row, as `backprop_network` makes them; labels are class numbers.
    checkpoint: keep the activations between segments of about sqrt(layers) layers, and compute
        those within a segment again when the backward pass comes to it (Chen et al., arXiv
        1604.06174; `torch.utils.checkpoint`).
    optimizer_in_backward: update each tensor as soon as its gradient is there and free the
        gradient, so that all of them never live at once (`register_post_accumulate_grad_hook`).
    offload: rest what the backward pass needs on the host, weights apart
        (`torch.autograd.graph.saved_tensors_hooks`).
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
        checks.one_of("optimizer", optimizer, OPTIMIZERS)
        checks.number("micro_batches", micro_batches, 1, whole=True)
        self.network, self.micro_batches = network, micro_batches
        parameters = list(network.parameters())
        groups = [[p] for p in parameters] if optimizer_in_backward else [parameters]
        kind = {"lr": learning_rate, "fused": True}
        self.optimizers = [OPTIMIZERS[optimizer](group, **kind) for group in groups]
        self.in_backward, self.last_part = optimizer_in_backward, True
        if optimizer_in_backward:
            for parameter, own in zip(parameters, self.optimizers, strict=True):
                parameter.register_post_accumulate_grad_hook(
                    lambda p, own=own: self._update(p, own)
                )
        self.segments = _segments(network) if checkpoint else [network]
        self.host = Offload(parameters) if offload else None

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One batch, images (rows, inputs) and labels (rows,); returns the mean loss ()."""
        total = 0
        size = -(-len(images) // self.micro_batches)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        for number, (some, their_labels) in enumerate(parts, start=1):
            self.last_part = number == len(parts)
            with self.host.saving(images) if self.host else nullcontext():
                logits = self._forward(some)
                loss = nn.functional.cross_entropy(logits, their_labels, reduction="sum")
            del logits
            loss = loss / len(images)
            loss.backward()
            total = total + loss.detach()
            del loss
        if not self.in_backward:
            (optimizer,) = self.optimizers
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    @property
    def moved(self) -> int:
        """Bytes moved between host and device so far."""
        return self.host.moved if self.host else 0

    def _forward(self, h: torch.Tensor) -> torch.Tensor:
        *lower, top = self.segments
        for segment in lower:
            h = checkpoint(segment, h, use_reentrant=False, preserve_rng_state=False)
        return top(h)

    def _update(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        if self.last_part:
            optimizer.step()
            parameter.grad = None


def segment_sizes(depth: int) -> list[int]:
    """Layers in each run between checkpoints; the last run is not checkpointed."""
    size = math.isqrt(depth - 1) + 1  # the square root, rounded up
    return [min(size, depth - start) for start in range(0, depth, size)]


def _segments(network: nn.Sequential) -> list[nn.Sequential]:
    """Hidden layers in runs of about the square root of their number; the last run ends in the
    classifier. A layer is a linear module and what follows it."""
    layers: list[list[nn.Module]] = []
    for module in network:
        if isinstance(module, nn.Linear) or not layers:
            layers.append([])
        layers[-1].append(module)
    *hidden, classifier = layers
    runs = [[hidden.pop(0) for _ in range(size)] for size in segment_sizes(len(hidden))]
    runs[-1] = [*runs[-1], classifier]
    return [nn.Sequential(*(module for layer in run for module in layer)) for run in runs]


class Offload:
    """Rests what autograd saves on the host, each tensor once; `stays` are left where they are."""

    def __init__(self, stays: Iterable[torch.Tensor]) -> None:
        self.stays = {tensor.untyped_storage()._cdata for tensor in stays}
        self.moved = 0
        # A layer's output is saved twice in a row, by its ReLU and as the next one's input.
        self.last: tuple[object, torch.Tensor] | None = None

    def saving(self, images: torch.Tensor) -> AbstractContextManager:
        """Within this, autograd saves to the host; `images` stay, being there anyway."""
        stays = self.stays | {images.untyped_storage()._cdata}

        def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.device | None]:
            storage = tensor.untyped_storage()
            if storage._cdata in stays:
                return tensor, None
            if self.last is None or self.last[0]() is not storage:
                pinned = tensor.is_cuda
                with counted_as(HOST):
                    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned or None)
                self.last = weakref.ref(storage), copy.copy_(tensor, non_blocking=pinned)
                self.moved += tensor.nbytes
            return self.last[1].view_as(tensor), tensor.device

        def unpack(packed: tuple[torch.Tensor, torch.device | None]) -> torch.Tensor:
            kept, device = packed
            if device is None:
                return kept
            self.moved += kept.nbytes
            return torch.empty_like(kept, device=device).copy_(kept, non_blocking=kept.is_pinned())

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
