"""Arms of the memory study: what is trained, how a step of it runs, what stays between steps."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ff_utils import closed_form, seed
from ff_utils.closed_form import CLASSES, PIXELS, PRECISIONS, Setting
from ff_utils.live_bytes import HOST, LiveBytes
from ff_utils.local_fields import LocalForwardForward
from ff_utils.networks import ForwardForward, backprop_network
from ff_utils.recurrent import RecurrentForwardForward, recurrent_step
from ff_utils.remedies import OPTIMIZERS, Backprop
from ff_utils.streaming import Slots, StreamedBackprop, StreamedForwardForward
from ff_utils.training import backprop_step, forward_forward_step
from ff_utils.unsupervised import softmax_step, unsupervised_step


@dataclass
class Arm:
    """One way to train one network: a training step, an evaluation, and what stays in memory.

    kept: what steps themselves leave behind, by category.
    timed: the step whose seconds compare with other arms', where `train` is not it.
    moved: bytes moved between host and device since the arm was built.
    """

    network: nn.Module
    train: Callable[[], object]
    evaluate: Callable[[], object]
    resident: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    kept: Callable[[], dict[str, list[torch.Tensor]]] = dict
    timed: Callable[[], object] | None = None
    moved: Callable[[], int] = int

    def watch(self, live: LiveBytes) -> None:
        """Tell `live` of everything that stays from step to step."""
        live.add(self.network.parameters(), "parameters")
        for optimizer in self.optimizers:
            live.steps_of(optimizer)
        for category, tensors in [*self.resident.items(), *self.kept().items()]:
            live.add(tensors, category)
        live.gradients_of(self.network)


def backprop_arm(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> Arm:
    """Plain backprop: every activation kept, gradients freed right after the optimizer step."""
    return Arm(
        network=network,
        train=lambda: backprop_step(network, optimizer, images, labels),
        evaluate=lambda: _no_grad(network, images),
        resident={"inputs": [images, labels]},
        optimizers=[optimizer],
    )


def recurrent_arm(
    network: RecurrentForwardForward, images: torch.Tensor, labels: torch.Tensor
) -> Arm:
    """A whole step of the recurrent network: guess, negatives, softmax, all time steps."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, len(images) // 2)
    return Arm(
        network=network,
        train=lambda: recurrent_step(network, images, labels, 1e-3, generator),
        evaluate=lambda: network.predict(images[:rows], rows=rows),
        resident=_resident(network, images, labels),
    )


def _resident(network: nn.Module, *inputs: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    return {
        "optimizer_state": [b for name, b in network.named_buffers() if name != "gradient"],
        "gradients": [network.gradient],
        "inputs": list(inputs),
    }


def forward_forward_arm(
    network: ForwardForward, images: torch.Tensor, labels: torch.Tensor, negatives: str
) -> Arm:
    """A whole FF training step as `training` makes it: guess, negatives, softmax, all layers."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, len(images) // 2)
    return Arm(
        network=network,
        train=lambda: forward_forward_step(
            network, None, images, labels, 1e-3, generator, negatives
        ),
        evaluate=lambda: network.predict(images[:rows], rows=rows),
        resident=_resident(network, images, labels),
    )


def _kind(s: Setting) -> dict:
    return {"device": s.device, "dtype": PRECISIONS[s.precision]}


def _rows(s: Setting, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.zeros(rows, dtype=torch.long, device=s.device)
    return torch.rand(rows, s.pixels, **_kind(s)), labels


def _network(kind: type[nn.Module], s: Setting, **settings: object) -> nn.Module:
    hidden = [s.hidden] * s.depth
    return kind(s.pixels, s.classes, hidden, optimizer=s.optimizer, **_kind(s), **settings)


def _backprop(s: Setting) -> Arm:
    """Linear and ReLU, cross-entropy, fused Adam; gradients freed after each step."""
    network = backprop_network(s.pixels, s.classes, [s.hidden] * s.depth, **_kind(s))
    optimizer = OPTIMIZERS[s.optimizer](network.parameters(), lr=1e-3, fused=True)
    return backprop_arm(network, optimizer, *_rows(s, s.batch))


def _backprop_with(s: Setting, **remedies: object) -> Arm:
    network = backprop_network(PIXELS, CLASSES, [s.hidden] * s.depth, **_kind(s))
    backprop = Backprop(network, optimizer=s.optimizer, **remedies)
    images, labels = _rows(s, s.batch)
    size = -(-s.batch // backprop.micro_batches)
    return Arm(
        network=network,
        train=lambda: backprop.step(images, labels),
        evaluate=lambda: [_no_grad(network, part) for part in images.split(size)],
        resident={"inputs": [images, labels]},
        optimizers=backprop.optimizers,
        moved=lambda: backprop.moved,
    )


def _backprop_checkpoint(s: Setting) -> Arm:
    """Keeps activations between runs of about sqrt(depth) layers; computes the others again."""
    return _backprop_with(s, checkpoint=True)


def _backprop_optimizer_in_backward(s: Setting) -> Arm:
    """Updates each tensor as its gradient arrives, and frees it."""
    return _backprop_with(s, optimizer_in_backward=True)


def _backprop_offload(s: Setting) -> Arm:
    """Rests what the backward pass needs on the host."""
    return _backprop_with(s, offload=True)


def _backprop_micro_batches(s: Setting) -> Arm:
    """Adds up the gradients of 8 parts of a batch."""
    return _backprop_with(s, micro_batches=closed_form.MICRO_BATCHES)


def _backprop_frugal(s: Setting) -> Arm:
    """The remedies together; checkpoints and micro-batches as they make the peak smallest."""
    checkpoint, micro_batches = closed_form.frugal_choice(s)
    return _backprop_with(
        s,
        checkpoint=checkpoint,
        optimizer_in_backward=True,
        offload=True,
        micro_batches=micro_batches,
    )


def _backprop_streamed(s: Setting, ahead: int = 1, micro_batches: int = 1) -> Arm:
    """One layer on the device; weights, moments and activations wait on the host."""
    network = _network(StreamedBackprop, s, store=s.store, ahead=ahead)
    images, labels = _rows(s, s.batch)
    some = images[: -(-s.batch // micro_batches)]
    return Arm(
        network=nn.Module(),
        train=lambda: network.step(images, labels, 1e-3, micro_batches),
        evaluate=lambda: network(some),
        resident=_streamed(network.slots, network.gradient, [images, labels]),
        kept=lambda: _on_host(network.slots),
        moved=lambda: network.slots.store.moved,
    )


def _backprop_streamed_frugal(s: Setting) -> Arm:
    """Streamed, nothing fetched ahead, rows in parts that rest on the host too."""
    return _backprop_streamed(s, ahead=0, micro_batches=closed_form.MICRO_BATCHES)


def _backprop_seed(s: Setting) -> Arm:
    """Backprop as the seed has it: normalisation layers, old gradients kept in the forward."""
    hidden = [s.hidden] * s.depth
    network = backprop_network(PIXELS, CLASSES, hidden, normalised=True, **_kind(s))
    optimizer = OPTIMIZERS[s.optimizer](network.parameters(), lr=1e-3, foreach=False)
    images, labels = _rows(s, s.batch)

    def train() -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Arm(
        network=network,
        train=train,
        evaluate=lambda: _no_grad(network, images),
        resident={"inputs": [images, labels]},
        optimizers=[optimizer],
    )


def _ff(
    s: Setting,
    kind: type[ForwardForward] = ForwardForward,
    step: str = "step",
    micro_batches: int = 1,
    **settings: object,
) -> Arm:
    """FF's layers alone, all on the device, by the analytic step on positive and negative rows."""
    network = _network(kind, s, guesses=False, **settings)
    if step == "step_accumulated":  # every layer has a gradient of its own
        network.gradient = network.gradient[:0].clone()
    images, _ = _rows(s, s.batch)
    if slots := getattr(network, "slots", None):
        resident, watched = _streamed(slots, network.gradient, [images]), nn.Module()
    else:
        watched = network.layers
        resident = {
            "optimizer_state": list(watched.buffers()),
            "gradients": [network.gradient],
            "inputs": [images],
        }

    def train() -> None:
        # The plain step consumes its input, which has no name here, so that it is freed once the
        # first layer has used it: what stays is the batch it was copied from.
        getattr(network, step)(
            images.clone() if step == "step" else images, s.batch // 2, 1e-3, micro_batches
        )

    # A chunk of the batch is evaluated at a time: the next ones need no more.
    rows = max(1, s.batch // (4 * micro_batches * CLASSES))
    return Arm(
        network=watched,
        train=train,
        evaluate=lambda: network.predict(images[:rows], rows=rows * CLASSES),
        resident=resident,
        kept=lambda: _on_host(slots) if slots else {},
        moved=lambda: slots.store.moved if slots else 0,
    )


def _ff_micro_batches(s: Setting) -> Arm:
    """8 parts of a batch, each layer's output taking its input's place."""
    return _ff(s, micro_batches=closed_form.MICRO_BATCHES)


def _ff_accumulated(s: Setting) -> Arm:
    """Each part of the batch through all layers, gradients of all of them added up."""
    return _ff(s, step="step_accumulated", micro_batches=closed_form.MICRO_BATCHES)


def _ff_streamed(s: Setting) -> Arm:
    """One layer on the device, the next one's weights on their way; the others on the host."""
    return _ff(s, StreamedForwardForward, store=s.store)


def _ff_frugal(s: Setting) -> Arm:
    """Streamed, nothing fetched ahead, rows in parts that rest on the host too."""
    return _ff(
        s,
        StreamedForwardForward,
        step="step_in_parts",
        micro_batches=closed_form.MICRO_BATCHES,
        store=s.store,
        ahead=0,
    )


def _ff_layerwise(s: Setting) -> Arm:
    """`train_layer_after_layer`: a layer stays until it is trained, batches come from the host.

    Timed is a batch in every layer; what a layer's coming, going and output cost once in all its
    epochs is left out.
    """
    network = _network(StreamedForwardForward, s, store=s.store, ahead=0, guesses=False)
    store, slots = network.slots.store, network.slots
    widths = [PIXELS] + [s.hidden] * s.depth
    for name, width in {"first": PIXELS, "other": s.hidden}.items():
        store.write(name, torch.rand(s.batch, width, **_kind(s)))

    def learn(number: int, layer: nn.Module) -> None:
        h = network.gradient.new_empty(s.batch, widths[number])
        store.read("other" if number else "first", h)
        layer.step(h, s.batch // 2, 1e-3, network.gradient)

    def train() -> None:
        ends = sorted({0, s.depth - 1})
        for number, layer in zip(ends, network.visit(ends, update=True), strict=True):
            learn(number, layer)

    images, _ = _rows(s, max(1, s.batch // (4 * CLASSES)))
    return Arm(
        network=nn.Module(),
        train=train,
        evaluate=lambda: network.predict(images, rows=len(images) * CLASSES),
        resident=_streamed(slots, network.gradient, [images]),
        kept=lambda: _on_host(slots),
        timed=lambda: [learn(*numbered) for numbered in enumerate(network.layers)],
        moved=lambda: store.moved,
    )


def _streamed(slots: Slots, gradient: torch.Tensor, inputs: list[torch.Tensor]) -> dict:
    moments = slots.tensors[len(slots.weights) :]
    return {
        "parameters": slots.weights,
        "optimizer_state": moments,
        "gradients": [gradient],
        "inputs": inputs,
    }


def _on_host(slots: Slots) -> dict:
    return {HOST: list(getattr(slots.store, "tensors", {}).values())}


def _ff_hard_negatives(s: Setting) -> Arm:
    """FF as notebook 2 trains it: a guess, hard negatives drawn from it, a softmax that learns."""
    return _hard_negatives(s)


def _ff_hard_negatives_recomputed(s: Setting) -> Arm:
    """The same to the same bits: what the softmax learns from is computed again, not kept."""
    return _hard_negatives(s, recompute=True)


def _hard_negatives(s: Setting, **settings: object) -> Arm:
    network = _network(ForwardForward, s, **settings)
    return forward_forward_arm(network, *_rows(s, s.batch // 2), "hard")


def _ff_unsupervised(s: Setting) -> Arm:
    """Images and as many hybrids of them through the layers, then the images to the softmax."""
    network = _network(ForwardForward, s, label="none")
    arm = forward_forward_arm(network, *_rows(s, s.batch // 2), "none")
    images, labels = arm.resident["inputs"]
    generator = torch.Generator().manual_seed(0)

    def train() -> None:
        unsupervised_step(network, images, closed_form.IMAGE, 1e-3, generator)
        softmax_step(network, images, labels, 1e-3)

    rows = max(1, len(images) // 2)
    return replace(arm, train=train, evaluate=lambda: network.predict(images[:rows], "softmax"))


def _ff_local(s: Setting) -> Arm:
    """Local receptive fields, the label seen everywhere: the layers alone, as `ff_resident`."""
    fields = closed_form.local_fields(s)
    kind = {"padded": True, "guesses": False, "optimizer": s.optimizer} | _kind(s)
    network = LocalForwardForward(closed_form.IMAGE, CLASSES, fields, **kind)
    images, labels = _rows(s, s.batch)
    rows = max(1, s.batch // (4 * CLASSES))
    fixed = {n: b for n, b in network.layers.named_buffers() if n.endswith(("fields", "beyond"))}
    return Arm(
        network=network,
        train=lambda: network.step(network.inputs(images, labels), s.batch // 2, 1e-3),
        evaluate=lambda: network.predict(images[:rows], rows=rows * CLASSES),
        resident={
            "parameters": list(fixed.values()),
            "optimizer_state": [b for n, b in network.layers.named_buffers() if n not in fixed],
            "gradients": [network.gradient],
            "inputs": [images, labels],
        },
    )


def _ff_language(s: Setting) -> Arm:
    """FF as notebook 3 trains it: the same step on text, the next character joined."""
    s = replace(s, **closed_form.TEXT)
    network = _network(ForwardForward, s, label="joined")
    return forward_forward_arm(network, *_rows(s, s.batch // 2), "hard")


def _backprop_language(s: Setting) -> Arm:
    return _backprop(replace(s, **closed_form.TEXT))


def _ff_seed(s: Setting, cached_rows: int | None = None) -> Arm:
    """The seed's base network: autograd in each layer, the data set's activations cached."""
    network = _network(seed.ProgressiveForwardForward, s)
    rows = torch.rand(s.batch, PIXELS + CLASSES, **_kind(s))
    with_labels = rows[:, :PIXELS].contiguous()
    return Arm(
        network=network,
        train=lambda: network.last_stage(s.batch, cached_rows or seed.DATASET_ROWS),
        evaluate=lambda: network.evaluate(with_labels),
        optimizers=[layer.optimizer for layer in network.layers],
        timed=lambda: network.step(rows, s.batch // 2),
    )


def _ff_seed_uncached(s: Setting) -> Arm:
    """The seed's FF with a batch where its whole data set was."""
    return _ff_seed(s, cached_rows=s.batch)


def _ff_recurrent(s: Setting) -> Arm:
    """The seed's recurrent network: layers that listen above and below, for 8 time steps."""
    network = _network(seed.RecurrentForwardForward, s)
    images, _ = _rows(s, s.batch // 2)
    labels = torch.zeros(len(images), CLASSES, **_kind(s))
    trained = [network.projector, *network.layers]
    some = images[: max(1, len(images) // 2)]
    return Arm(
        network=network,
        train=lambda: network.step(images, labels),
        evaluate=lambda: network.evaluate(some),
        resident={"inputs": [images, labels]},
        kept=lambda: {"activations": network.returned},
        optimizers=[layer.optimizer for layer in trained],
    )


def _ff_recurrent_analytic(s: Setting) -> Arm:
    """As many time steps as the label needs to come down to the first layer, and at least 8."""
    network = _network(RecurrentForwardForward, s, steps=max(8, s.depth))
    return recurrent_arm(network, *_rows(s, s.batch // 2))


@torch.no_grad()
def _no_grad(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return network(images)


@dataclass(frozen=True)
class ArmKind:
    """How an arm is built and what to call it in a figure."""

    build: Callable[[Setting], Arm]
    title: str


ARMS = {
    "backprop": ArmKind(_backprop, "backprop"),
    "backprop_checkpoint": ArmKind(_backprop_checkpoint, "backprop, checkpoints"),
    "backprop_optimizer_in_backward": ArmKind(
        _backprop_optimizer_in_backward, "backprop, optimizer in backward"
    ),
    "backprop_offload": ArmKind(_backprop_offload, "backprop, activations on host"),
    "backprop_micro_batches": ArmKind(_backprop_micro_batches, "backprop, micro-batches"),
    "backprop_frugal": ArmKind(_backprop_frugal, "backprop, best remedies"),
    "backprop_streamed": ArmKind(_backprop_streamed, "backprop, streamed"),
    "backprop_streamed_frugal": ArmKind(_backprop_streamed_frugal, "backprop, streamed in parts"),
    "backprop_seed": ArmKind(_backprop_seed, "backprop (seed)"),
    "ff_resident": ArmKind(_ff, "FF, analytic step"),
    "ff_hard_negatives": ArmKind(_ff_hard_negatives, "FF, hard negatives"),
    "ff_hard_negatives_recomputed": ArmKind(
        _ff_hard_negatives_recomputed, "FF, hard negatives, recomputed"
    ),
    "ff_unsupervised": ArmKind(_ff_unsupervised, "FF, unsupervised"),
    "ff_local": ArmKind(_ff_local, "FF, local fields"),
    "ff_micro_batches": ArmKind(_ff_micro_batches, "FF, micro-batches"),
    "ff_accumulated": ArmKind(_ff_accumulated, "FF, accumulated"),
    "ff_streamed": ArmKind(_ff_streamed, "FF, streamed"),
    "ff_frugal": ArmKind(_ff_frugal, "FF, streamed in parts"),
    "ff_layerwise": ArmKind(_ff_layerwise, "FF, layer after layer"),
    "ff_seed": ArmKind(_ff_seed, "FF (seed)"),
    "ff_seed_uncached": ArmKind(_ff_seed_uncached, "FF (seed), no cache"),
    "ff_recurrent": ArmKind(_ff_recurrent, "recurrent FF (seed)"),
    "ff_recurrent_analytic": ArmKind(_ff_recurrent_analytic, "recurrent FF, analytic step"),
    "ff_language": ArmKind(_ff_language, "FF language model"),
    "backprop_language": ArmKind(_backprop_language, "backprop language model"),
}


def described() -> dict[str, str]:
    """What each arm is, as its builder says, or else what its closed form says it holds."""
    told = {}
    for name, kind in ARMS.items():
        text = inspect.getdoc(kind.build) or inspect.getdoc(closed_form.FORMS[name])
        told[name] = " ".join(text.split("\n\n")[0].split())
    return told
