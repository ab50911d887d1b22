"""What a training step of any PyTorch program needs: its peak, by category and by module.

Simulated, it takes no data, no arithmetic and no GPU: tensors have shapes only (FakeTensorMode).
A simulation sees every tensor; it can't see what a kernel takes and frees inside itself (cuDNN's
workspaces) nor which kernels a GPU would choose.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as hooks
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from torch.utils.weak import WeakTensorKeyDictionary

from ff_utils.ff.blocks import call
from ff_utils.memory.remedies import PLAIN, Remedies, TrainingStep
from ff_utils.memory.simulation import (
    CannotSimulateError,
    active_simulation,
    build,
    explained,
    simulating,
)
from ff_utils.memory.tracker import CATEGORIES, MemoryTracker
from ff_utils.utils import HOST

BATCH = "(batch)"
STEP = "(no module)"  # of what no module holds or makes
OPTIMIZER = "(optimizer)"
aten = torch.ops.aten
FLOPS = {  # of attention on a CPU, which PyTorch's counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__,
}


@dataclass(frozen=True)
class Event:
    """A storage that came to life or (negative bytes) was freed, in the order of the step."""

    number: int  # of the storage
    bytes: int
    category: str
    module: str
    operation: str


@dataclass
class Profile:
    """One training step. Bytes, on the device unless said otherwise.

    by_module: bytes at the peak, {module: {category: bytes}}; they add up to `peak_bytes`. `where`
    is what ran at the peak, as (phase, module, operation). flops: floating-point operations of
    matrix products, convolutions and attention; None if not counted. timeline: (operation, bytes
    by category) after every operation, and `running` the module of each.
    """

    instrument: str
    peak_bytes: int
    by_category: dict[str, int]
    by_module: dict[str, dict[str, int]]
    where: tuple[str, str, str]
    host_bytes: int
    flops: int | None
    evaluation_peak_bytes: int | None = None
    timeline: list[tuple[str, dict[str, int]]] = field(default_factory=list, repr=False)
    running: list[str] = field(default_factory=list, repr=False)
    events: list[Event] = field(default_factory=list, repr=False)

    def largest(self) -> tuple[str, str, int]:
        """Module, category and bytes of the largest part of the peak."""
        parts = [(m, c, size) for m, parts in self.by_module.items() for c, size in parts.items()]
        return max(parts, key=lambda part: part[2])


class StepTracker(MemoryTracker):
    """A tracker that finds modules, optimizers and inputs by itself and knows storages' modules.

    A parameter, its gradient and its optimizer state belong to the module that holds the parameter;
    an activation to the innermost module that runs; a temporary of the backward pass to the module
    whose operation is being differentiated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.where = ("", "", "")
        self.peak_events = 0
        self.running: list[str] = []  # the module of each operation of the timeline
        self.simulated, self.trains, self._failed_module = False, False, ""
        self._operation = ""
        self._module_of: dict[int, tuple[int, str]] = {}  # a storage's number and module
        self._names: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._stack: list[tuple[str, bool]] = []
        self._differentiated: dict[int, str] = {}  # the module of each autograd node
        self._last = STEP
        self._parameters = WeakTensorKeyDictionary()  # the module of each
        self._count = 0
        self._handles: list = []
        self._kinds: Counter = Counter()

    def __enter__(self) -> "StepTracker":
        """Begin to count, and to hear of modules and optimizers."""
        self.simulated = active_simulation() is not None
        self._handles += [
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        ]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Stop counting."""
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def restart(self) -> None:
        """Begin a new peak, timeline and list of events from what is live now."""
        super().restart()
        self.peak_host_bytes = self.live[HOST]
        self.running, self.events = [], []
        for key, (_, category, size) in self._known.items():
            number, module = self._module_of[key]
            self.events.append(Event(number, size, category, module, ""))
        self.peak_events, self.where = len(self.events), (STEP, STEP, "")
        self._differentiated.clear()
        self._last = STEP
        self.trains = False

    def add(self, tensors: Iterable[torch.Tensor], category: str, module: str = "") -> None:
        """Count `tensors` under `category` and `module` (by default the one that runs)."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                if self._known[key][1:] == (category, size):
                    continue
                module = module or self._module_of[key][1]
                self._forget(key)
            self._count += 1
            owner = module or self._now()
            self._module_of[key] = self._count, owner
            self.events.append(Event(self._count, size, category, owner, self._operation))
            super().add([tensor], category)

    def hold(self, module: nn.Module, name: str = "") -> None:
        """Count a module's parameters and buffers, and its submodules'."""
        prefix = f"{name}." if name else ""
        for path, part in module.named_modules():
            label = f"{prefix}{path}".rstrip(".") or type(module).__name__
            if part in self._names:
                continue
            self._names[part] = label
            for parameter in part.parameters(recurse=False):
                if not isinstance(parameter, nn.UninitializedParameter):
                    self._add_parameter(parameter, label)
            self.add(part.buffers(recurse=False), "parameters", label)

    def _add_parameter(self, parameter: torch.Tensor, module: str) -> None:
        if parameter in self._parameters:
            return
        if self.simulated and not isinstance(parameter, FakeTensor):
            raise CannotSimulateError(
                "this step trains parameters that were made outside the simulation: give a "
                "function that builds them, or simulate=False to run the step for real."
            )
        self._parameters[parameter] = module
        self.add([parameter], "parameters", module)
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(self._add_gradient)
            self._handles.append(hook)
        if parameter.grad is not None:
            self._add_gradient(parameter)

    def _add_gradient(self, parameter: torch.Tensor) -> None:
        self.trains = True
        if parameter.grad is not None:  # an optimizer in the backward pass has used it up
            self.add([parameter.grad], "gradients", self._parameters[parameter])

    def _enter_module(self, module: nn.Module, _: object) -> None:
        if self.simulated and isinstance(module, nn.LSTM):
            raise CannotSimulateError(
                f"nn.LSTM ({self._names.get(module, 'LSTM')}) can't be simulated: on a CPU and on "
                "a GPU other kernels run than in a simulation; use simulate=False (--real)."
            )
        if module not in self._names:
            self.hold(module, "" if not self._parameters else self._new_name(module))
        in_backward = torch._C._current_autograd_node() is not None
        self._stack.append((self._names[module], in_backward))

    def _new_name(self, module: nn.Module) -> str:
        kind = type(module).__name__
        self._kinds[kind] += 1
        return kind if self._kinds[kind] == 1 else f"{kind}#{self._kinds[kind]}"

    def _leave_module(self, *_: object) -> None:
        if self._stack:
            name, _ = self._stack.pop()
            if sys.exc_info()[0] is not None:
                self._failed_module = self._failed_module or name

    def failed_in(self) -> str:
        """The module or the optimizer that an error came from, if it was one of them."""
        return self._failed_module or ("the optimizer" if self._in_optimizer else "")

    def _enter_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._add_parameter(parameter, STEP)
        self._in_optimizer = self.trains = True

    def _leave_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._in_optimizer = False
        for parameter, state in optimizer.state.items():
            module = self._parameters.get(parameter, OPTIMIZER)
            self.add(filter(torch.is_tensor, tree_leaves(state)), "optimizer_state", module)

    def _now(self) -> str:
        """The module that runs, forward or backward."""
        if self._in_optimizer:
            return OPTIMIZER
        node = torch._C._current_autograd_node()
        if node is not None and not (self._stack and self._stack[-1][1]):
            self._last = self._differentiated.get(node._sequence_nr(), self._last)
            return self._last
        return self._stack[-1][0] if self._stack else STEP

    def _forget(self, key: int) -> None:
        _, category, size = self._known[key]
        super()._forget(key)
        number, module = self._module_of.pop(key)
        self.events.append(Event(number, -size, category, module, self._operation))

    def _update_peak(self) -> None:
        before = self.peak_bytes
        super()._update_peak()
        if self.peak_bytes > before:
            in_backward = torch._C._current_graph_task_id() != -1
            phase = "optimizer" if self._in_optimizer else "backward" if in_backward else "forward"
            self.where = (phase, self._now(), self._operation)
            self.peak_events = len(self.events)

    def _run(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """Run one operation; count what it reads that was made before, and what it returns."""
        self._operation = str(function)
        if function is not aten.lift_fresh.default:  # its argument is its result
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    if leaf.untyped_storage()._cdata in self._known:
                        continue
                    if leaf.requires_grad and leaf.is_leaf:
                        self._add_parameter(leaf, STEP)
                    else:
                        self.add([leaf], "inputs", BATCH)
        if torch._C._current_autograd_node() is None or (self._stack and self._stack[-1][1]):
            # An operation's autograd node has been made just before it runs.
            node = torch.autograd._get_sequence_nr() - 1
            self._differentiated.setdefault(node, self._stack[-1][0] if self._stack else STEP)
        result = super()._run(function, args, kwargs)
        self.running.append(self._now())
        return result

    def by_module(self) -> dict[str, dict[str, int]]:
        """Bytes at the peak, by module and category, largest module first."""
        sizes: dict[str, dict[str, int]] = {}
        for event in self.events[: self.peak_events]:
            if event.category != HOST:
                of_module = sizes.setdefault(event.module, {})
                of_module[event.category] = of_module.get(event.category, 0) + event.bytes
        sizes = {m: {c: n for c, n in parts.items() if n} for m, parts in sizes.items()}
        ordered = sorted(sizes.items(), key=lambda item: -sum(item[1].values()))
        return {module: parts for module, parts in ordered if parts}


def profile(
    what: nn.Module | Callable[..., object],
    batch: object = None,
    loss: Callable | None = None,
    *,
    rows: int | None = None,
    simulate: bool = True,
    remedies: Remedies = PLAIN,
    blocks: list[str] | None = None,
    optimizer: str = "adam",
    short: bool = False,
) -> Profile:
    """The memory of one training step, its optimizer's state included.

    what: a module, with an example `batch` (inputs, labels) and perhaps a `loss(output, labels)`
        (see `blocks.task_loss` for the default); a builder, a function that returns (module,
        batch), (module, batch, loss) or a step; or a step, a function that trains once (for real
        only: a simulation must see its tensors made).
    rows: length of the batch. A builder gets it as its parameter rows, batch, batch_size or n, or
        as the first one without a default; else its batch is cut or repeated.
    simulate: False runs the step for real.
    remedies, blocks, optimizer: as in `remedies.TrainingStep`. short: only the peak; of many
        micro-batches the first two and the last are run, no arithmetic is counted, no evaluation.
    Raises CannotSimulateError or another ValueError with what to change.
    """
    with simulating() if simulate else nullcontext():
        with explained(lambda: "what builds it"):
            built = build(what, batch, loss, rows)
        if not isinstance(built, tuple):
            return watch(built)
        module, (inputs, labels), loss = built
        train = TrainingStep(
            module, remedies, network_loss=loss, blocks=blocks, optimizer=optimizer, short=short
        )

        def evaluate() -> None:
            module.eval()
            with torch.no_grad():
                call(module, inputs)

        del built, batch
        step = lambda: train(inputs, labels)  # noqa: E731
        return watch(step, None if short else evaluate, module, count=not short)


def watch(
    step: Callable[[], object],
    evaluate: Callable[[], object] | None = None,
    module: nn.Module | None = None,
    *,
    count: bool = True,
) -> Profile:
    """Run a step once (its optimizer's state appears), then once more; the second one's profile.

    count: whether to count the arithmetic too. ValueError if the step trains nothing.
    """
    tracker = StepTracker()
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    counter.mod_tracker = nullcontext()  # not by module: its hooks refuse some gradients
    counter.mod_tracker.parents = {"Global"}
    with explained(tracker.failed_in), tracker:
        if module is not None:
            tracker.hold(module)
        with counter if count else nullcontext():
            step()
        tracker.restart()
        step()
        if not tracker.trains:
            raise ValueError(
                "this step trains nothing: it makes no gradient of any parameter and has no "
                "optimizer; let it run loss.backward() and optimizer.step(). A builder returns "
                "(module, batch), (module, batch, loss) or a step."
            )
        result = Profile(
            instrument="simulated" if tracker.simulated else "tracked",
            peak_bytes=tracker.peak_bytes,
            by_category={category: tracker.peak[category] for category in CATEGORIES},
            by_module=tracker.by_module(),
            where=tracker.where,
            host_bytes=tracker.peak_host_bytes,
            flops=counter.get_total_flops() if count else None,
            timeline=tracker.timeline,
            running=tracker.running,
            events=tracker.events,
        )
        if evaluate is not None:
            tracker.restart()
            with suppress(RuntimeError) if tracker.simulated else nullcontext():
                evaluate()
                result.evaluation_peak_bytes = tracker.peak_bytes
    return result
