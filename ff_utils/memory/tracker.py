"""Live tensor bytes, counted by category after every operation PyTorch runs."""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ff_utils.utils import HOST, current_category

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "temporaries",
    "inputs",
)


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of every live tensor storage, by category, after every operation.

    A storage counts once, from the operation that returns it until it is freed, whoever holds
    it. Tensors made before are counted from `add` or `track` on. New ones count under what
    `utils.allocation_category` says, or else as activations, as temporaries while autograd or an
    optimizer runs, as gradients once they are a parameter's `.grad`. Host memory is counted apart
    and is no part of a peak. Memory that an operation takes and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = dict.fromkeys((*CATEGORIES, HOST), 0)
        self.peak = dict(self.live)
        self.peak_host_bytes = 0
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
        self._update_peak()

    def track(self, network: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Count what stays from step to step: a network's parameters, buffers and gradients, its
        optimizers' state. A gradient counts as such from the moment it is accumulated."""
        self.add(network.parameters(), "parameters")
        for name, buffer in network.named_buffers():
            self.add([buffer], _buffer_category(name))
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._add_gradient)
            if parameter.grad is not None:
                self.add([parameter.grad], "gradients")
        for optimizer in optimizers:
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
        return device_bytes(self.peak)

    def _add_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:  # an optimizer in the backward pass has used it up
            self.add([parameter.grad], "gradients")

    def _forget(self, key: int) -> None:
        _, category, size = self._known.pop(key)
        self.live[category] -= size

    def _update_peak(self) -> None:
        self.peak_host_bytes = max(self.peak_host_bytes, self.live[HOST])
        if device_bytes(self.live) > self.peak_bytes:
            self.peak = dict(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation and count it."""
        if function is torch.ops.prim.device.default:  # a question that only simulations ask
            return function(*args, **(kwargs or {}))
        return self._run(function, args, kwargs or {})

    def _run(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """Run one operation and count what it returns."""
        result = function(*args, **kwargs)
        in_backward = torch._C._current_graph_task_id() != -1
        passing = "temporaries" if in_backward or self._in_optimizer else "activations"
        new = [
            leaf
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._known
        ]
        self.add(new, current_category() or passing)
        self.timeline.append((str(function), dict(self.live)))
        return result


def device_bytes(sizes: dict[str, int]) -> int:
    """Sum over the categories, without the host's bytes."""
    return sum(sizes[category] for category in CATEGORIES)


def track_step(
    step: Callable[[], object],
    network: nn.Module,
    *,
    inputs: Iterable[torch.Tensor] = (),
    optimizers: Iterable[torch.optim.Optimizer] = (),
    kept: Callable[[], dict[str, Iterable[torch.Tensor]]] = dict,
) -> MemoryTracker:
    """Run `step` once untracked (it makes the optimizer's state), then once tracked.

    inputs: the batch that `step` reads. kept: gives what else the first step leaves behind, by
    category. The result's `peak`, `peak_bytes`, `peak_host_bytes` and `timeline` are those of the
    second step.
    """
    step()
    tracker = MemoryTracker()
    tracker.track(network, optimizers)
    tracker.add(inputs, "inputs")
    for category, tensors in kept().items():
        tracker.add(tensors, category)
    with tracker:
        tracker.restart()
        step()
    return tracker


def _buffer_category(name: str) -> str:
    if name.endswith("grad_buffer"):
        return "gradients"
    is_state = name.endswith(("_moment", "_scale", "_steps", "confusion"))
    return "optimizer_state" if is_state else "parameters"
