"""Live tensor bytes, counted by category after every operation PyTorch runs."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "temporaries",
    "inputs",
)
HOST = "host"  # bytes that rest outside the device: never part of a peak
_given: list[str] = []


def format_bytes(count: float) -> str:
    """Bytes in binary units: 716177408 -> "683.0 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


@contextmanager
def counted_as(category: str) -> Iterator[None]:
    """What is made in here counts under `category`."""
    _given.append(category)
    try:
        yield
    finally:
        _given.pop()


def _on_device(sizes: dict[str, int]) -> int:
    return sum(sizes[category] for category in CATEGORIES)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every live tensor storage, by category, after every operation.

    A storage counts once, from the operation that returns it until it is freed, whoever holds
    it. Tensors made before are counted from `add` on. New ones are what `counted_as` says, or
    else activations, temporaries while autograd or an optimizer runs, gradients once they are a
    parameter's `.grad`. The host's bytes are counted apart and are no part of a peak. Memory an
    operation takes and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = dict.fromkeys((*CATEGORIES, HOST), 0)
        self.peak = dict(self.live)
        self.most_on_host = 0
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
                parameter.register_post_accumulate_grad_hook(self._add_gradient)
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
        """Bytes live on the device at the peak."""
        return _on_device(self.peak)

    def _add_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:  # an optimizer in the backward pass has used it up
            self.add([parameter.grad], "gradients")

    def _forget(self, key: int) -> None:
        _, category, size = self._known.pop(key)
        self.live[category] -= size

    def _note(self) -> None:
        self.most_on_host = max(self.most_on_host, self.live[HOST])
        if _on_device(self.live) > self.peak_bytes:
            self.peak = dict(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation and count what it returns."""
        result = function(*args, **(kwargs or {}))
        in_backward = torch._C._current_graph_task_id() != -1
        passing = "temporaries" if in_backward or self._in_optimizer else "activations"
        category = _given[-1] if _given else passing
        new = [
            leaf
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._known
        ]
        self.add(new, category)
        self.timeline.append((str(function), dict(self.live)))
        return result
