"""How much memory a training step needs: four instruments, one report.

simulated  live tensor bytes under FakeTensorMode: no data, no arithmetic, any size
tracked    live tensor bytes of the real step: proof that simulated is exact
rss        peak resident memory of a fresh process, less its own baseline (Linux, macOS)
cuda       peak of PyTorch's CUDA allocator in a fresh process

`python -m ff_utils.memory --arm backprop --depth 7` prints a report.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ff_utils import checks, paths, progress
from ff_utils.networks import ForwardForward, backprop_network
from ff_utils.training import backprop_step, forward_forward_step

INSTRUMENTS = ("simulated", "tracked", "rss", "cuda")
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "temporaries",
    "inputs",
)
CLASSES = 10
PIXELS = 784
FLOAT = 4  # bytes
# Have the C library give freed blocks back to the system at once, so that a process's peak is
# what it needed and not what its allocator kept.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# The seed keeps a positive and a negative copy of MNIST's training set on the device.
SEED_DATASET_ROWS = 120_000


def format_bytes(count: float) -> str:
    """Bytes in binary units: 716177408 -> "683.0 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


# --- Live bytes -----------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every live tensor storage, by category, after every operation.

    A storage counts once, from the operation that returns it until it is freed, whoever holds
    it. Tensors made before are counted from `add` on. New ones are activations, or temporaries
    while autograd or an optimizer runs, or gradients once they are a parameter's `.grad`.
    Memory an operation takes and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.peak = dict(self.live)
        self.timeline: list[tuple[str, dict[str, int]]] = []
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}
        self._in_optimizer = False

    def add(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count `tensors` (again) under `category`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                self._forget(key)
            size = storage.nbytes()
            # The storage's Python object lives as long as its memory does.
            reference = weakref.ref(storage, lambda _, key=key: self._forget(key))
            self._known[key] = (reference, category, size)
            self.live[category] += size
        self._note()

    def gradients_of(self, network: nn.Module) -> None:
        """Count `network`'s gradients as such from the moment they are accumulated."""
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.add([p.grad], "gradients")
                )
            if parameter.grad is not None:
                self.add([parameter.grad], "gradients")

    def steps_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Count `optimizer`'s state, and what its step makes as temporaries."""
        for state in optimizer.state.values():
            self.add((t for t in state.values() if torch.is_tensor(t)), "optimizer_state")
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "_in_optimizer", True))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "_in_optimizer", False))

    def restart(self) -> None:
        """Begin a new peak and timeline from what is live now."""
        self.peak = dict(self.live)
        self.timeline = []

    @property
    def peak_bytes(self) -> int:
        """Bytes live at the peak."""
        return sum(self.peak.values())

    def _forget(self, key: int) -> None:
        _, category, size = self._known.pop(key)
        self.live[category] -= size

    def _note(self) -> None:
        if sum(self.live.values()) > self.peak_bytes:
            self.peak = dict(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation and count what it returns."""
        result = function(*args, **(kwargs or {}))
        in_backward = torch._C._current_graph_task_id() != -1
        category = "temporaries" if in_backward or self._in_optimizer else "activations"
        new = [
            leaf
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._known
        ]
        self.add(new, category)
        self.timeline.append((str(function), dict(self.live)))
        return result


# --- Arms: what is trained ------------------------------------------------------------------


Mark = Callable[[list[torch.Tensor], str], None]


@dataclass
class Arm:
    """One way to train one network: a training step, an evaluation, and what stays in memory.

    `train` takes a function that counts the tensors it is given under another category.
    """

    network: nn.Module
    train: Callable[[Mark], object]
    evaluate: Callable[[], object]
    resident: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)

    def watch(self, live: LiveBytes) -> None:
        """Tell `live` of everything that stays from step to step."""
        live.add(self.network.parameters(), "parameters")
        for optimizer in self.optimizers:
            live.steps_of(optimizer)
        for category, tensors in self.resident.items():
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
        train=lambda mark: backprop_step(network, optimizer, images, labels),
        evaluate=lambda: _no_grad(network, images),
        resident={"inputs": [images, labels]},
        optimizers=[optimizer],
    )


def forward_forward_arm(
    network: ForwardForward, images: torch.Tensor, labels: torch.Tensor, negatives: str
) -> Arm:
    """A whole FF training step as `training` makes it: guess, negatives, softmax, all layers."""
    generator = torch.Generator().manual_seed(0)
    return Arm(
        network=network,
        train=lambda mark: forward_forward_step(
            network, images, labels, None, negatives, 1e-3, generator
        ),
        evaluate=lambda: network.predict(images),
        resident={
            "optimizer_state": [b for name, b in network.named_buffers() if name != "gradient"],
            "gradients": [network.gradient],
            "inputs": [images, labels],
        },
    )


def _backprop(depth: int, hidden: int, batch: int, device: str) -> Arm:
    network = backprop_network(PIXELS, CLASSES, [hidden] * depth, device=device)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    return backprop_arm(network, optimizer, *_batch(batch, device))


def _backprop_seed(depth: int, hidden: int, batch: int, device: str) -> Arm:
    """Backprop as the seed has it: normalisation layers, old gradients kept in the forward."""
    network = backprop_network(PIXELS, CLASSES, [hidden] * depth, normalised=True, device=device)
    optimizer = torch.optim.Adam(network.parameters())
    images, labels = _batch(batch, device)

    def train(mark: Mark) -> None:
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


def _ff_resident(depth: int, hidden: int, batch: int, device: str) -> Arm:
    """FF with all layers on the device, each trained analytically before the next one runs."""
    network = ForwardForward(PIXELS, CLASSES, [hidden] * depth, device=device)
    images, _ = _batch(batch, device)
    moments = [b for name, b in network.layers.named_buffers()]
    # FF consumes its input: what stays between steps is the batch it was copied from.
    return Arm(
        network=network.layers,
        train=lambda mark: network.step(images.clone(), batch // 2, 1e-3),
        # One chunk of the batch: the next ones need no more.
        evaluate=lambda: network.predict(images[: min(1000, max(1, batch // 4))]),
        resident={
            "optimizer_state": moments,
            "gradients": [network.gradient],
            "inputs": [images],
        },
    )


def _ff_hard_negatives(depth: int, hidden: int, batch: int, device: str) -> Arm:
    """FF as notebook 2 trains it: a guess, hard negatives drawn from it, a softmax that learns."""
    network = ForwardForward(PIXELS, CLASSES, [hidden] * depth, device=device)
    images, labels = _batch(batch // 2, device)
    return forward_forward_arm(network, images, labels, "hard")


def _ff_seed(depth: int, hidden: int, batch: int, device: str) -> Arm:
    """FF as the seed has it: autograd in each layer, gradients kept, the data set's activations
    cached on the device, old and new together while the next layer's are made."""
    widths = [PIXELS + CLASSES] + [hidden] * depth
    layers = nn.ModuleList(nn.Linear(widths[k], widths[k + 1], device=device) for k in range(depth))
    optimizers = [torch.optim.Adam(layer.parameters()) for layer in layers]
    signs = torch.ones(batch, device=device)
    signs[batch // 2 :] = -1

    def layer_step(layer: nn.Linear, optimizer: torch.optim.Optimizer, h: torch.Tensor) -> None:
        y = layer(h).relu()
        logits = -(y.pow(2).mean(dim=1) - 2.0) * signs[: len(h)]
        loss = torch.log(1 + torch.nan_to_num(torch.exp(logits))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def train(mark: Mark) -> None:
        # The last layer's stage: its cached input, its training, and its cached output.
        cached = torch.rand(SEED_DATASET_ROWS, layers[-1].in_features, device=device)
        mark([cached], "inputs")
        parts = cached.split(batch)
        layer_step(layers[-1], optimizers[-1], parts[0])
        with torch.no_grad():
            outputs = []
            for part in parts:
                outputs.append(layers[-1](part).relu())
                mark(outputs[-1:], "inputs")

    # Gradients and Adam's state of the layers below are still there at that stage.
    for layer, optimizer in zip(layers[:-1], optimizers[:-1], strict=True):
        layer_step(layer, optimizer, torch.rand(2, layer.in_features, device=device))

    def evaluate() -> torch.Tensor:
        images = torch.rand(batch, PIXELS, device=device)
        with torch.no_grad():
            for label in range(CLASSES):
                one_hot = torch.zeros(batch, CLASSES, device=device)
                one_hot[:, label] = 1
                h = torch.cat([images, one_hot], dim=1)
                total = torch.zeros(batch, device=device)
                for layer in layers:
                    h = layer(h).relu()
                    total += h.pow(2).mean(dim=1)
                    h = h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-8)
        return total

    return Arm(
        network=layers,
        train=train,
        evaluate=evaluate,
        resident={"inputs": [signs]},
        optimizers=optimizers,
    )


def _batch(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, PIXELS, device=device), torch.zeros(
        rows, dtype=torch.long, device=device
    )


@torch.no_grad()
def _no_grad(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return network(images)


# --- Closed form: what each arm must need ----------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors that a step of (depth, hidden, batch) is made of, float32."""

    depth: int
    hidden: int
    batch: int
    label_inputs: int = 0

    @property
    def activation(self) -> int:
        """One hidden layer's activities: batch x hidden."""
        return FLOAT * self.batch * self.hidden

    @property
    def row_vector(self) -> int:
        """One number a row."""
        return FLOAT * self.batch

    @property
    def logits(self) -> int:
        """One number a row and class."""
        return FLOAT * self.batch * CLASSES

    @property
    def images(self) -> int:
        """The input: batch x pixels."""
        return FLOAT * self.batch * PIXELS

    @property
    def labels(self) -> int:
        """One int64 a row."""
        return 8 * self.batch

    def layer(self, number: int) -> int:
        """Weights and biases of hidden layer `number`, from 1."""
        below = PIXELS + self.label_inputs if number == 1 else self.hidden
        return FLOAT * (below * self.hidden + self.hidden)

    def layers(self, first: int = 1) -> int:
        """Weights and biases of hidden layers `first` to `depth`."""
        if first > self.depth:
            return 0
        return self.layer(first) + (self.depth - first) * self.layer(2)

    @property
    def classifier(self) -> int:
        """Weights and biases of the last linear layer."""
        return FLOAT * (self.hidden * CLASSES + CLASSES)

    def stays_in_backprop(self) -> dict[str, int]:
        """What a backprop step holds throughout: weights, Adam's state, the batch."""
        weights = self.layers() + self.classifier
        return {
            "parameters": weights,
            "optimizer_state": 2 * weights + FLOAT * 2 * (self.depth + 1),
            "inputs": self.images + self.labels,
        }


def _largest(moments: list[dict[str, int]]) -> dict[str, int]:
    """The moment with the most bytes, every category present."""
    moment = max(moments, key=lambda m: sum(m.values()))
    return {category: moment.get(category, 0) for category in CATEGORIES}


def _predict_backprop(depth: int, hidden: int, batch: int) -> dict[str, int]:
    """The peak is the start of the backward pass (all activations, two gradients of one) or,
    where layers weigh more than activations, its end (all gradients)."""
    s = Sizes(depth, hidden, batch)
    stays = s.stays_in_backprop()
    loss = {"activations": depth * s.activation + s.logits, "temporaries": 2 * s.logits}
    moments = [stays | loss]
    for layer in {1, depth}:
        above = s.layers(layer + 1) + s.classifier
        inward = s.activation if layer > 1 else 0
        # ReLU's gradient, then the linear layer's.
        moments.append(
            stays
            | {
                "activations": layer * s.activation,
                "temporaries": 2 * s.activation,
                "gradients": above,
            }
        )
        moments.append(
            stays
            | {
                "activations": (layer - 1) * s.activation,
                "temporaries": s.activation + inward + s.layer(layer),
                "gradients": above,
            }
        )
    return _largest(moments)


def _predict_backprop_seed(depth: int, hidden: int, batch: int) -> dict[str, int]:
    """As plain backprop, with a second activation a layer (the normalised one), the last step's
    gradients alive through the forward pass, and the normalisation's own backward pass."""
    s = Sizes(depth, hidden, batch)
    stays = s.stays_in_backprop()
    weights = stays["parameters"]
    norms = 2 * s.row_vector
    forward_end = {
        "activations": 2 * depth * s.activation + (depth - 1) * norms,
        "gradients": weights,
    }
    # Adam's unfused update makes two temporaries of the layer it is at.
    update = {
        "gradients": weights,
        "temporaries": 2 * (max(s.layer(1), s.layer(min(depth, 2))) - FLOAT * hidden),
    }
    moments = [stays | forward_end, stays | update]
    for layer in {1, depth}:
        kept = (2 * layer - 1) * s.activation + (layer - 1) * norms
        above = {"gradients": s.layers(layer + 1) + s.classifier}
        moments.append(stays | above | {"activations": kept, "temporaries": 2 * s.activation})
        if layer == 1:
            whole = {"temporaries": s.activation + s.layer(1)}
            moments.append(stays | above | whole)
    for layer in {1, depth - 1} if depth > 1 else ():
        # Backward through the normalisation above `layer`.
        moments.append(
            stays
            | {
                "activations": (2 * layer - 1) * s.activation + layer * norms,
                "temporaries": 5 * s.activation,
                "gradients": s.layers(layer + 1) + s.classifier,
            }
        )
    return _largest(moments)


def _predict_ff_resident(depth: int, hidden: int, batch: int) -> dict[str, int]:
    """Weights and Adam of every layer, one gradient, and one layer's input and output."""
    s = Sizes(depth, hidden, batch)
    stays = {
        "parameters": s.layers(),
        "optimizer_state": 2 * s.layers() + FLOAT * 2 * depth,
        "gradients": max(s.layer(1), s.layer(min(depth, 2))) - FLOAT * hidden,
        "inputs": s.images,
    }
    rows = 4 * s.row_vector
    moments = [stays | {"activations": s.images + s.activation + rows}]
    if depth > 1:
        moments.append(stays | {"activations": 2 * s.activation + rows})
    return _largest(moments)


def _predict_ff_hard_negatives(depth: int, hidden: int, batch: int) -> dict[str, int]:
    """As resident FF, or the guess's activities of all layers, for half as many rows."""
    s = Sizes(depth, hidden, batch)
    half = Sizes(depth, hidden, batch // 2)
    softmax = FLOAT * (CLASSES * depth * hidden + CLASSES)
    weights = s.layers() + softmax
    stays = {
        "parameters": weights,
        "optimizer_state": 2 * weights + FLOAT * 2 * (depth + 1),
        "gradients": max(s.layer(1), s.layer(min(depth, 2))) - FLOAT * hidden,
        "inputs": half.images + half.labels,
    }
    labels = s.labels + half.labels
    guess = depth * half.activation
    moments = [
        guess + half.row_vector + (half.images if depth == 1 else 0),
        guess + 4 * half.logits + softmax + half.labels,
        2 * s.images + 2 * s.logits + labels,
        s.images + s.activation + 4 * s.row_vector + labels,
    ]
    if depth > 1:
        moments.append(2 * s.activation + 4 * s.row_vector + labels)
    return _largest([stays | {"activations": moment} for moment in moments])


def _predict_ff_seed(depth: int, hidden: int, batch: int) -> dict[str, int]:
    """Four copies of the weights, and the data set's activations twice: in and out of a layer."""
    s = Sizes(depth, hidden, batch, label_inputs=CLASSES)
    below = hidden if depth > 1 else PIXELS + CLASSES
    last_part = SEED_DATASET_ROWS % batch or min(batch, SEED_DATASET_ROWS)
    stays = {
        "parameters": s.layers(),
        "gradients": s.layers(),
        "optimizer_state": 2 * s.layers() + FLOAT * 2 * depth,
    }
    moments = []
    # The last part of the data set, which may be short, or the whole one before it.
    for part, done in ((last_part, 0), (min(batch, SEED_DATASET_ROWS), last_part)):
        cached = SEED_DATASET_ROWS * below + (SEED_DATASET_ROWS - done - part) * hidden
        moments.append(
            stays
            | {"activations": 2 * FLOAT * part * hidden, "inputs": FLOAT * cached + s.row_vector}
        )
    return _largest(moments[: 1 if last_part == SEED_DATASET_ROWS else 2])


@dataclass(frozen=True)
class ArmKind:
    """How an arm is built, what it must need, and what to call it in a figure."""

    build: Callable[[int, int, int, str], Arm]
    predict: Callable[[int, int, int], dict[str, int]]
    title: str


ARMS = {
    "backprop": ArmKind(_backprop, _predict_backprop, "backprop"),
    "backprop_seed": ArmKind(_backprop_seed, _predict_backprop_seed, "backprop (seed)"),
    "ff_resident": ArmKind(_ff_resident, _predict_ff_resident, "FF, analytic step"),
    "ff_hard_negatives": ArmKind(
        _ff_hard_negatives, _predict_ff_hard_negatives, "FF, hard negatives"
    ),
    "ff_seed": ArmKind(_ff_seed, _predict_ff_seed, "FF (seed)"),
}


def predict(arm: str, depth: int, hidden: int, batch: int) -> dict[str, int]:
    """Closed-form bytes by category at the training peak, float32 and Adam."""
    checks.one_of("arm", arm, ARMS)
    return ARMS[arm].predict(depth, hidden, batch)


def crossing(lean: str, other: str, deepest: int, *, hidden: int, batch: int) -> int | None:
    """The first depth from 2 on at which `lean` needs less than `other`, by the closed form."""
    for depth in range(2, deepest + 1):
        needs = [sum(predict(arm, depth, hidden, batch).values()) for arm in (lean, other)]
        if needs[0] < needs[1]:
            return depth
    return None


# --- Instruments ----------------------------------------------------------------------------


@dataclass
class Report:
    """Peak bytes of one arm's training step and evaluation under one instrument.

    `breakdown` and the evaluation peak are None where the instrument cannot tell; `error`
    says why a run that died gave no number.
    """

    arm: str
    depth: int
    hidden: int
    batch: int
    instrument: str
    peak_bytes: int | None
    predicted_bytes: int
    breakdown: dict[str, int] | None = None
    evaluation_peak_bytes: int | None = None
    step_seconds: float | None = None
    error: str = ""


def measure(
    arm: str, *, depth: int, hidden: int, batch: int, instrument: str = "simulated"
) -> Report:
    """Measure one arm. `rss` and `cuda` run in a fresh process of their own.

    A process that dies (out of memory, killed) gives a report with `error`, not an exception.
    """
    predicted = _check(arm, depth, hidden, batch, instrument)
    report = Report(arm, depth, hidden, batch, instrument, None, sum(predicted.values()))
    if instrument in ("simulated", "tracked"):
        return _count(report)
    command = [sys.executable, "-m", "ff_utils.memory", "--here", "--json"]
    command += ["--instrument", instrument]
    command += ["--arm", arm, "--depth", str(depth), "--hidden", str(hidden)]
    command += ["--batch", str(batch)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=paths.ROOT,
        env=os.environ | RETURN_FREED_MEMORY,
        check=False,
    )
    if done.returncode == 0:
        return Report(**json.loads(done.stdout))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    report.error = f"ended with status {done.returncode}: {last}"
    return report


def sweep(
    arms: Sequence[str],
    depths: Sequence[int],
    *,
    hidden: int,
    batch: int,
    instruments: Sequence[str] = ("simulated",),
) -> pd.DataFrame:
    """Measure every arm at every depth with every instrument; one row a report.

    The breakdown's categories are columns, in bytes.
    """
    points = [(i, arm, depth) for i in instruments for arm in arms for depth in depths]
    rows = []
    for instrument, arm, depth in progress.track(points, "point"):
        report = asdict(
            measure(arm, depth=depth, hidden=hidden, batch=batch, instrument=instrument)
        )
        rows.append(report | (report.pop("breakdown") or {}))
    return pd.DataFrame(rows)


def timeline(arm: str, *, depth: int, hidden: int, batch: int) -> list[tuple[str, dict[str, int]]]:
    """Live bytes by category after every operation of one training step, simulated."""
    _check(arm, depth, hidden, batch, "simulated")
    with FakeTensorMode():
        live = watch_step(ARMS[arm].build(depth, hidden, batch, "cpu"))
    return live.timeline


def _check(arm: str, depth: int, hidden: int, batch: int, instrument: str) -> dict[str, int]:
    checks.one_of("instrument", instrument, INSTRUMENTS)
    checks.one_of("arm", arm, ARMS)
    checks.number("depth", depth, 1, whole=True)
    checks.number("hidden", hidden, 1, whole=True)
    checks.number("batch", batch, 2, whole=True)
    if instrument == "cuda" and not torch.cuda.is_available():
        raise ValueError("instrument is 'cuda', but there is no CUDA device; use 'simulated'.")
    return predict(arm, depth, hidden, batch)


def watch_step(arm: Arm) -> LiveBytes:
    """Run one step unwatched (it makes the optimizer's state), then one watched.

    The result's `peak`, `peak_bytes` and `timeline` tell of the second.
    """
    arm.train(lambda tensors, category: None)
    live = LiveBytes()
    arm.watch(live)
    with live:
        live.restart()
        arm.train(live.add)
    return live


def _count(report: Report) -> Report:
    simulated = report.instrument == "simulated"
    with FakeTensorMode() if simulated else nullcontext():
        arm = ARMS[report.arm].build(report.depth, report.hidden, report.batch, "cpu")
        live = watch_step(arm)
        report.peak_bytes, report.breakdown = live.peak_bytes, live.peak
        with live:
            live.restart()
            arm.evaluate()
        report.evaluation_peak_bytes = live.peak_bytes
    return report


def _run_here(report: Report) -> Report:
    """Measure this process: the one number an outsider sees."""
    cuda = report.instrument == "cuda"
    device = "cuda" if cuda else "cpu"
    # Load what any program loads (thread pools, kernels) before the baseline is read.
    small = ARMS["backprop"].build(2, 64, 64, device)
    small.train(lambda tensors, category: None)
    baseline = 0 if cuda else _resident_bytes()
    arm = ARMS[report.arm].build(report.depth, report.hidden, report.batch, device)
    arm.train(lambda tensors, category: None)
    evaluation_is_apart = _reset_peak(cuda)
    start = time.perf_counter()
    arm.train(lambda tensors, category: None)
    report.peak_bytes = _peak_bytes(cuda) - baseline
    report.step_seconds = time.perf_counter() - start
    if evaluation_is_apart:
        _reset_peak(cuda)
        arm.evaluate()
        report.evaluation_peak_bytes = _peak_bytes(cuda) - baseline
    return report


def _reset_peak(cuda: bool) -> bool:
    """Start a new peak; False where the system cannot."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes(cuda: bool) -> int:
    if cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if (found := _proc_status("VmHWM")) is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _resident_bytes() -> int:
    """Resident memory now; where only its peak is told, the peak so far."""
    return _proc_status("VmRSS") or _peak_bytes(cuda=False)


def _proc_status(key: str) -> int | None:
    """A size from Linux's /proc/self/status in bytes. It counts this process alone, where
    getrusage's peak is inherited from whoever started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    return None


# --- Command line ---------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Print one arm's report as a table, or as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.memory", description=main.__doc__)
    parser.add_argument("--arm", default="backprop", help=", ".join(ARMS))
    parser.add_argument("--depth", type=int, default=7, help="hidden layers")
    parser.add_argument("--hidden", type=int, default=2000, help="units in each")
    parser.add_argument("--batch", type=int, default=5000, help="rows in a step")
    parser.add_argument("--instrument", default="simulated", help=", ".join(INSTRUMENTS))
    parser.add_argument("--json", action="store_true", help="one JSON object, in bytes")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = {"depth": options.depth, "hidden": options.hidden, "batch": options.batch}
    try:
        predicted = _check(options.arm, **sizes, instrument=options.instrument)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if options.here:  # the fresh process that `measure` started
        report = Report(
            options.arm,
            **sizes,
            instrument=options.instrument,
            peak_bytes=None,
            predicted_bytes=sum(predicted.values()),
        )
        report = _run_here(report)
    else:
        report = measure(options.arm, **sizes, instrument=options.instrument)
    if options.json:
        print(json.dumps(asdict(report)))
        return
    if report.error:
        parser.exit(1, f"error: {options.arm} gave no number: {report.error}\n")
    print(f"{options.arm}: {sizes} ({options.instrument}, float32, Adam)\n")
    print(f"{'':24}{'measured':>14}{'closed form':>14}")
    for category in CATEGORIES:
        found = format_bytes(report.breakdown[category]) if report.breakdown else "-"
        name = category.replace("_", " ")
        print(f"{name:24}{found:>14}{format_bytes(predicted[category]):>14}")
    peak = format_bytes(report.peak_bytes)
    print(f"{'training peak':24}{peak:>14}{format_bytes(report.predicted_bytes):>14}")
    if report.evaluation_peak_bytes is not None:
        print(f"{'evaluation peak':24}{format_bytes(report.evaluation_peak_bytes):>14}")


if __name__ == "__main__":
    main()
