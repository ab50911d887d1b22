"""Training steps of the arms, ready to run: networks built from an arm's choices."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from math import ceil

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ff_utils import original
from ff_utils.backprop import CHECKPOINTS, Backprop, mlp
from ff_utils.config import Batch, FFConfig, LocalConfig, RecurrentConfig, TrainConfig
from ff_utils.ff.blocks import BlockLocal
from ff_utils.ff.local import LocalForwardForward
from ff_utils.ff.network import ForwardForward
from ff_utils.ff.recurrent import RecurrentForwardForward
from ff_utils.memory.arms import ARMS, IMAGE, TEXT, Arm, Sizes
from ff_utils.memory.tracker import MemoryTracker, track_step
from ff_utils.offload import OffloadedBackprop, OffloadedForwardForward
from ff_utils.optimizers import TORCH_OPTIMIZERS
from ff_utils.utils import HOST

RATE = 1e-3
MOST_PARTS = 16  # micro-batches of the best remedies, where they help


@dataclass
class Step:
    """One arm's training step and evaluation, and what stays in memory between steps.

    store: of what is offloaded, with the bytes `moved` so far. returned: activations that a step
    leaves behind. timed: the step whose seconds compare with other arms', where `train` is not it.
    """

    network: nn.Module
    train: Callable[[], object]
    evaluate: Callable[[], object]
    inputs: list[torch.Tensor] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    store: object = None
    returned: Callable[[], list[torch.Tensor]] = list
    timed: Callable[[], object] | None = None

    def moved(self) -> int:
        """Bytes moved between host and device so far."""
        return self.store.moved if self.store else 0

    def track(self) -> MemoryTracker:
        """One step counted, after one that is not."""
        on_host = getattr(self.store, "tensors", {})
        return track_step(
            self.train,
            self.network,
            inputs=self.inputs,
            optimizers=self.optimizers,
            kept=lambda: {HOST: on_host.values(), "activations": self.returned()},
        )


def build(name: str, sizes: Sizes) -> Step:
    """The step of arm `name` at these sizes."""
    arm = ARMS[name]
    if arm.text:
        sizes = replace(sizes, **TEXT)
    if arm.original:
        make = _ORIGINALS[arm.network]
    elif arm.network == "backprop":
        make = _offloaded_backprop if arm.offloaded else _backprop
    elif arm.negatives != "given":
        make = _network_with_softmax
    else:
        make = {"greedy_cached": _greedy_cached, "autograd": _by_autograd}.get(arm.step, _layers)
    return make(arm, sizes)


@cache
def best_micro_batches(sizes: Sizes) -> int:
    """Parts of a batch for the smallest peak of backprop with activations on the host and the
    optimizer in the backward pass: 1 or 16.

    Parts make activations small, but gradients of all layers are then kept from part to part, so
    that what lies between is never best, and checkpoints never help (activations are on the host).
    """
    if sizes.batch < MOST_PARTS:
        return 1
    # All parts but the last need the same, so that three stand for all of them.
    part = ceil(sizes.batch / MOST_PARTS)
    peaks = {}
    for count, parts, batch in ((1, 1, sizes.batch), (MOST_PARTS, 3, 3 * part)):
        s = replace(sizes, batch=batch, device="cpu")
        with unset_fake_temporarily(), FakeTensorMode():
            step = _backprop(ARMS["backprop_frugal"], s, parts)
            peaks[count] = step.track().peak_bytes - sum(tensor.nbytes for tensor in step.inputs)
    return min(peaks, key=peaks.get)


def _factory(s: Sizes) -> dict:
    return {"device": s.device, "dtype": getattr(torch, s.precision)}


def _batch(s: Sizes, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.zeros(rows, dtype=torch.long, device=s.device)
    return torch.rand(rows, s.pixels, **_factory(s)), labels


@torch.no_grad()
def _outputs(network: nn.Module, parts: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [network(part) for part in parts]


def _backprop(arm: Arm, s: Sizes, micro_batches: int | None = None) -> Step:
    network = mlp(s.pixels, s.classes, [s.hidden] * s.depth, **_factory(s))
    if micro_batches is None:
        micro_batches = best_micro_batches(s) if "best" in arm.remedies else arm.micro_batches
    backprop = Backprop(
        network,
        optimizer=s.optimizer,
        checkpoint=next((kind for kind in CHECKPOINTS if kind in arm.remedies), "none"),
        optimizer_in_backward="optimizer_in_backward" in arm.remedies,
        offload="offload" in arm.remedies,
        micro_batches=micro_batches,
    )
    images, labels = _batch(s, s.batch)
    parts = images.split(ceil(s.batch / micro_batches))
    return Step(
        network=network,
        train=lambda: backprop.step(images, labels),
        evaluate=lambda: _outputs(network, parts),
        inputs=[images, labels],
        optimizers=backprop.optimizers,
        store=backprop.host,
    )


def _offloaded_backprop(arm: Arm, s: Sizes) -> Step:
    choices = {"store": s.store, "ahead": int(arm.micro_batches == 1), "optimizer": s.optimizer}
    hidden = [s.hidden] * s.depth
    network = OffloadedBackprop(s.pixels, s.classes, hidden, **choices, **_factory(s))
    images, labels = _batch(s, s.batch)
    part = images[: ceil(s.batch / arm.micro_batches)]
    return Step(
        network=network,
        train=lambda: network.step(images, labels, RATE, arm.micro_batches),
        evaluate=lambda: network(part),
        inputs=[images, labels],
        store=network.slots.store,
    )


def _layers(arm: Arm, s: Sizes) -> Step:
    """FF's layers alone; a batch is given as positive and negative rows."""
    if arm.network == "ff_local":
        config = LocalConfig(optimizer=s.optimizer, classifier=False, padded=True)
        network = LocalForwardForward(IMAGE, s.classes, s.local_fields(), config, **_factory(s))
    else:
        network = _forward_forward(arm, s, FFConfig(optimizer=s.optimizer, classifier=False))
    images, labels = _batch(s, s.batch)
    inputs, positives = [images], s.batch // 2
    if arm.network == "ff_local":
        inputs.append(labels)
    if arm.step == "accumulated":  # every layer has a gradient of its own
        network.grad_buffer = network.grad_buffer[:0].clone()

    # The whole step overwrites its input, which has no name here, so that it is freed once the
    # first layer has used it: what stays is the batch that it was copied from.
    def train() -> torch.Tensor:
        if arm.network == "ff_local":
            return network.step(network.encode(*inputs), positives, RATE)
        if arm.step == "accumulated":
            return network.step_accumulated(images, positives, RATE, arm.micro_batches)
        if arm.offloaded and arm.micro_batches > 1:
            return network.step_in_parts(images, positives, RATE, arm.micro_batches)
        return network.step(images.clone(), positives, RATE, arm.micro_batches)

    # A chunk of the batch is evaluated at a time: the next ones need no more.
    rows = max(1, s.batch // (4 * arm.micro_batches * s.classes))
    return Step(
        network=network,
        train=train,
        evaluate=lambda: network.predict(images[:rows], rows=rows * s.classes),
        inputs=inputs,
        store=network.slots.store if arm.offloaded else None,
    )


def _forward_forward(arm: Arm, s: Sizes, config: FFConfig) -> ForwardForward:
    hidden = [s.hidden] * s.depth
    if not arm.offloaded:
        return ForwardForward(s.pixels, s.classes, hidden, config, **_factory(s))
    ahead = int(arm.micro_batches == 1 and arm.step == "whole")
    return OffloadedForwardForward(
        s.pixels, s.classes, hidden, config, store=s.store, ahead=ahead, **_factory(s)
    )


def _network_with_softmax(arm: Arm, s: Sizes) -> Step:
    """A whole step of a network as it is trained: softmax, negatives, all layers."""
    hidden = [s.hidden] * s.depth
    if arm.network == "ff_recurrent":
        config = RecurrentConfig(optimizer=s.optimizer, steps=max(8, s.depth))
        network = RecurrentForwardForward(s.pixels, s.classes, hidden, config, **_factory(s))
    else:
        label = "none" if arm.negatives == "hybrids" else "joined" if arm.text else "pixels"
        recompute = "recompute" in arm.remedies
        config = FFConfig(optimizer=s.optimizer, label=label, recompute=recompute)
        network = _forward_forward(arm, s, config)
    images, labels = _batch(s, arm.images(s.batch))
    generator, config = torch.Generator().manual_seed(0), TrainConfig()
    stages = [None]
    if arm.negatives == "hybrids":
        stages = ["layers", "softmax"]
        network.image_shape = IMAGE

    def train() -> None:
        for stage in stages:
            network.train_batch(Batch(images, labels, RATE, generator, config, stage))

    # A chunk of the batch is evaluated: the next ones need no more.
    rows = max(1, len(images) // 2)
    some, choices = images[: max(1, rows // s.classes)], {"rows": rows}
    if arm.negatives == "hybrids":
        some, choices = images[:rows], {"by": "softmax"}
    return Step(
        network=network,
        train=train,
        evaluate=lambda: network.predict(some, **choices),
        inputs=[images, labels],
    )


def _by_autograd(arm: Arm, s: Sizes) -> Step:
    """The same layers trained by autograd, each one's graph and gradients freed before the next."""
    modules = mlp(s.pixels, s.classes, [s.hidden] * s.depth, **_factory(s))
    layers = nn.Sequential(*(modules[k : k + 2] for k in range(0, 2 * s.depth, 2)))
    names = [str(number) for number in range(s.depth)]
    network = BlockLocal(layers, s.classes, loss="goodness", blocks=names, optimizer=s.optimizer)
    images, labels = _batch(s, arm.images(s.batch))
    return Step(
        network=network,
        train=lambda: network.step(images, labels),
        evaluate=lambda: network.predict(images[: max(1, len(images) // 2)]),
        inputs=[images, labels],
        optimizers=network.optimizers,
    )


def _greedy_cached(arm: Arm, s: Sizes) -> Step:
    """A batch of `training.fit_greedy_cached` in the first and in the last layer.

    Timed is a batch in every layer; what fetching a layer and writing its output cost once in all
    its epochs is left out.
    """
    network = _forward_forward(arm, s, FFConfig(optimizer=s.optimizer, classifier=False))
    store = network.slots.store
    widths = [s.pixels] + [s.hidden] * s.depth
    for name, width in {"first": s.pixels, "other": s.hidden}.items():
        store.write(name, torch.rand(s.batch, width, **_factory(s)))

    def learn(number: int, layer: nn.Module) -> None:
        h = network.grad_buffer.new_empty(s.batch, widths[number])
        store.read("other" if number else "first", h)
        layer.step(h, s.batch // 2, RATE, network.grad_buffer)

    def train() -> None:
        ends = sorted({0, s.depth - 1})
        for number, layer in zip(ends, network.iter_layers(ends, update=True), strict=True):
            learn(number, layer)

    images, _ = _batch(s, max(1, s.batch // (4 * s.classes)))
    return Step(
        network=network,
        train=train,
        evaluate=lambda: network.predict(images, rows=len(images) * s.classes),
        inputs=[images],
        store=store,
        timed=lambda: [learn(*numbered) for numbered in enumerate(network.layers)],
    )


def _original_backprop(arm: Arm, s: Sizes) -> Step:
    hidden = [s.hidden] * s.depth
    network = mlp(s.pixels, s.classes, hidden, normalised=True, **_factory(s))
    optimizer = TORCH_OPTIMIZERS[s.optimizer](network.parameters(), lr=RATE, foreach=False)
    images, labels = _batch(s, s.batch)

    def train() -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Step(
        network=network,
        train=train,
        evaluate=lambda: _outputs(network, (images,)),
        inputs=[images, labels],
        optimizers=[optimizer],
    )


def _original_ff(arm: Arm, s: Sizes) -> Step:
    choices = {"optimizer": s.optimizer} | _factory(s)
    network = original.OriginalForwardForward(s.pixels, s.classes, [s.hidden] * s.depth, **choices)
    rows = torch.rand(s.batch, s.pixels + s.classes, **_factory(s))
    images = rows[:, : s.pixels].contiguous()
    cached_rows = original.DATASET_ROWS if arm.cached else s.batch
    return Step(
        network=network,
        train=lambda: network.last_stage(s.batch, cached_rows),
        evaluate=lambda: network.evaluate(images),
        optimizers=[layer.optimizer for layer in network.layers],
        timed=lambda: network.step(rows, s.batch // 2),
    )


def _original_recurrent(arm: Arm, s: Sizes) -> Step:
    choices = {"optimizer": s.optimizer} | _factory(s)
    network = original.OriginalRecurrent(s.pixels, s.classes, [s.hidden] * s.depth, **choices)
    images, _ = _batch(s, arm.images(s.batch))
    labels = torch.zeros(len(images), s.classes, **_factory(s))
    some = images[: max(1, len(images) // 2)]
    return Step(
        network=network,
        train=lambda: network.step(images, labels),
        evaluate=lambda: network.evaluate(some),
        inputs=[images, labels],
        returned=lambda: network.returned,
        optimizers=[layer.optimizer for layer in (network.projector, *network.layers)],
    )


_ORIGINALS = {
    "backprop": _original_backprop,
    "ff": _original_ff,
    "ff_recurrent": _original_recurrent,
}
