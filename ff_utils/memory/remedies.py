"""Remedies for the memory of any network's training step: what each stores, and when.

All but bfloat16 autocast and the block-local losses compute the same gradients.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ff_utils.backprop import Offload
from ff_utils.ff.blocks import (
    BlockLocal,
    chunked_cross_entropy,
    find_blocks,
    split_tensors,
    task_loss,
)
from ff_utils.optimizers import TORCH_OPTIMIZERS
from ff_utils.utils import check_choice

MICRO_BATCHES = 8
LARGE_LOGITS = 8  # classes per feature from which on a loss is computed in chunks


@dataclass(frozen=True)
class Remedies:
    """What a training step does about its memory.

    checkpoint: recompute each block's activations in the backward pass. in_backward: update each
    parameter as soon as its gradient is complete, then free the gradient. offload: keep what
    autograd saves in host memory. micro_batches: parts of a batch. autocast: compute in bfloat16.
    chunked: compute the loss over large logits in chunks. local: train block by block, by
    "classifier" or "goodness". streamed: of these, only the block at work is on the device.
    """

    checkpoint: bool = False
    in_backward: bool = False
    offload: bool = False
    micro_batches: int = 1
    autocast: bool = False
    chunked: bool = False
    local: str = ""
    streamed: bool = False


PLAIN = Remedies()
# What the table compares. Where logits are large, every remedy has the loss in chunks too.
MICRO = {"micro_batches": MICRO_BATCHES}
CHOICES = {
    "as it is": PLAIN,
    "loss in chunks": Remedies(chunked=True),
    "checkpoint each block": Remedies(checkpoint=True),
    "optimizer in backward": Remedies(in_backward=True),
    "activations on the host": Remedies(offload=True),
    "8 micro-batches": Remedies(**MICRO),
    "bfloat16 autocast": Remedies(autocast=True),
    "checkpoints + optimizer in backward": Remedies(checkpoint=True, in_backward=True),
    "checkpoints + 8 micro-batches": Remedies(checkpoint=True, **MICRO),
    "checkpoints + host + in backward": Remedies(checkpoint=True, in_backward=True, offload=True),
    "all of these but bfloat16": Remedies(checkpoint=True, in_backward=True, offload=True, **MICRO),
    "block by block, classifiers": Remedies(local="classifier"),
    "block by block, classifiers, 8 micro-batches": Remedies(local="classifier", **MICRO),
    "block by block, classifiers, streamed": Remedies(local="classifier", streamed=True),
    "block by block, goodness": Remedies(local="goodness"),
    "block by block, goodness, 8 micro-batches": Remedies(local="goodness", **MICRO),
}


class TrainingStep:
    """One step of a network with an optimizer: forward, loss, backward, update.

    network_loss: as in `blocks.task_loss`; blocks: as in `blocks.find_blocks`; short: as in
    `blocks.split_tensors`. Optimizers are fused ones with PyTorch's defaults. Checkpoints and local
    losses change the network: give each step a network of its own.
    """

    def __init__(
        self,
        network: nn.Module,
        remedies: Remedies = PLAIN,
        *,
        network_loss: Callable | None = None,
        blocks: Sequence[str] | None = None,
        optimizer: str = "adam",
        short: bool = False,
    ) -> None:
        check_choice("optimizer", optimizer, TORCH_OPTIMIZERS)
        self.network, self.remedies, self.network_loss = network, remedies, network_loss
        parameters = [p for p in network.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"{type(network).__name__} has no parameter that needs a gradient.")
        self.head, self.short = None, short
        if remedies.chunked:
            self.head, self.network_loss = large_head(network), self._chunked_loss
        self.host = (
            Offload([*network.parameters(), *network.buffers()]) if remedies.offload else None
        )
        self.local = None
        if remedies.local:
            self.local = BlockLocal(
                network,
                self.head.out_features if self.head else None,
                loss=remedies.local,
                blocks=blocks,
                optimizer=optimizer,
                micro_batches=remedies.micro_batches,
                streamed=remedies.streamed,
                network_loss=self.network_loss,
                short=short,
            )
            return
        if remedies.checkpoint:
            checkpoint_blocks(network, blocks)
        groups = [[p] for p in parameters] if remedies.in_backward else [parameters]
        fused = all(p.is_floating_point() for p in parameters)  # else there is no such kernel
        self.optimizers = [TORCH_OPTIMIZERS[optimizer](group, fused=fused) for group in groups]
        if remedies.in_backward:
            for parameter, own in zip(parameters, self.optimizers, strict=True):
                parameter.register_post_accumulate_grad_hook(lambda _, own=own: self._update(own))

    def __call__(self, inputs: object, labels: torch.Tensor | None = None) -> None:
        """One update from a batch."""
        device = next(self.network.parameters()).device.type
        autocast = torch.autocast(device, torch.bfloat16, enabled=self.remedies.autocast)
        if self.head is not None:
            self.head.forward = self._keep_features
        try:
            if self.local:
                with autocast:
                    self.local.step(inputs, labels)
            else:
                self._backpropagate(inputs, labels, autocast)
        finally:
            if self.head is not None:
                del self.head.forward

    def _backpropagate(
        self, inputs: object, labels: torch.Tensor | None, autocast: AbstractContextManager
    ) -> None:
        parts = split_tensors((inputs, labels), self.remedies.micro_batches, self.short)
        for number, ((part, part_labels), share) in enumerate(parts, start=1):
            self._last_part = number == len(parts)
            saving = self.host.saving((inputs, labels)) if self.host else nullcontext()
            with saving, autocast:
                loss = task_loss(self.network, part, part_labels, self.network_loss)
            if len(parts) > 1:
                loss = loss * share
            loss.backward()
            del loss
        if not self.remedies.in_backward:
            self._update(*self.optimizers)

    def _keep_features(self, features: torch.Tensor) -> torch.Tensor:
        self._features = weakref.ref(features)
        return features

    def _chunked_loss(self, output: object, labels: torch.Tensor) -> torch.Tensor:
        if self._features() is not output:
            raise ValueError(
                f"the loss can't be computed in chunks: {type(self.network).__name__} does not "
                "return the output of its last linear layer."
            )
        return chunked_cross_entropy(output, labels, self.head)

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        if self._last_part:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def checkpoint_blocks(network: nn.Module, names: Sequence[str] | None = None) -> None:
    """Make each block of `network` recompute its activations in the backward pass."""
    for block in find_blocks(network, names):
        first, *others = block.modules
        if others:  # modules in a row of an nn.Sequential become one
            keys = {id(module): key for key, module in block.parent._modules.items()}
            run = nn.Sequential(*block.modules)
            block.parent._modules[keys[id(first)]] = run
            for module in others:
                del block.parent._modules[keys[id(module)]]
            first = run
        first.forward = partial(checkpoint, first.forward, use_reentrant=False)


def large_head(network: nn.Module) -> nn.Linear | None:
    """The last linear layer, if it has so many classes that its logits are worth chunks."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if linear and linear[-1].out_features >= LARGE_LOGITS * linear[-1].in_features:
        return linear[-1]
    return None
