"""Simulated tensors: networks and batches that have shapes but no data."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves, tree_map_only

# An error of the step is raised; PyTorch would log it too.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)

READS_DATA = {"_local_scalar_dense": ".item()", "nonzero": "nonzero (a mask as an index)"}
aten = torch.ops.aten
# Losses whose result keeps the storage of the elements it was reduced from.
REDUCED_IN_PLACE = {
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.binary_cross_entropy.default,
}
# Their statistics have the weights' precision, not the input's.
BATCH_NORMS = {aten.native_batch_norm.default, aten._native_batch_norm_legit.default}

# Its gradient lies in order, whatever the order of the one that comes in.
LAYER_NORM_BACKWARD = aten.native_layer_norm_backward.default
# Their kernels want one precision, which simulations do not check.
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# Products of experts, which run in any precision, but are simulated in bfloat16 only.
GROUPED_PRODUCT = aten._grouped_mm.default


class CannotSimulateError(ValueError):
    """A step does what can't be simulated: it reads data, or its kernels differ."""


class Simulation(FakeTensorMode):
    """Tensors without data. Networks built in it may be copied and read constants made outside.

    Where PyTorch's own simulation gives a result another size than the kernels do, it is set right.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo: dict) -> "Simulation":
        """Itself, so that copies of its tensors are its own too."""
        return self

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Simulate one operation."""
        if function in PRODUCTS and len({t.dtype for t in args if torch.is_tensor(t)}) > 1:
            kinds = " and ".join(sorted({str(t.dtype) for t in args if torch.is_tensor(t)}))
            raise RuntimeError(f"a product of {kinds}: give tensors of one dtype")
        if function is GROUPED_PRODUCT and args[0].dtype != torch.bfloat16:
            halves = [t.to(torch.bfloat16) for t in args[:2]]
            result = super().__torch_dispatch__(function, types, (*halves, *args[2:]), kwargs)
            return result.to(args[0].dtype)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function in REDUCED_IN_PLACE and result.dim() == 0:
            elements = torch.broadcast_shapes(args[0].shape, args[1].shape).numel()
            whole = torch.empty(elements, dtype=result.dtype, device="meta").resize_(())
            return FakeTensor(self, whole, result.device)
        if function in BATCH_NORMS and args[1] is not None and args[1].dtype != args[0].dtype:
            return (result[0], *(statistic.to(args[1].dtype) for statistic in result[1:]))
        if function is LAYER_NORM_BACKWARD and result[0] is not None:
            return (result[0].contiguous(), *result[1:])
        return result


def active_simulation() -> FakeTensorMode | None:
    """The simulation that is on, if one is."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def build(
    what: object, batch: object = None, loss: Callable | None = None, rows: int | None = None
) -> tuple[nn.Module, tuple, Callable | None] | Callable[[], object]:
    """(module, (inputs, labels), loss), or a step, of what `profile` accepts."""
    simulation = active_simulation()
    if isinstance(what, nn.Module):
        built: object = (_copied(what, simulation) if simulation else what, batch, loss)
    else:
        built = _call_builder(what, rows, simulation)
        if isinstance(built, (nn.Module, Iterator)):
            built = (built,)
        if not isinstance(built, (tuple, list)):
            return built if callable(built) else what
    if not (2 <= len(built) <= 3 and isinstance(built[0], nn.Module)) or built[1] is None:
        raise ValueError(
            f"{getattr(what, '__name__', type(what).__name__)} gives {_kinds(built)}: a builder "
            "returns (module, batch), (module, batch, loss) or a step."
        )
    module, batch, loss = (*built, None)[:3]
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError("the network is on the device meta: build it on the CPU or a GPU.")
    if simulation:
        batch = tree_map_only(torch.Tensor, _fake(simulation), batch)
    return module.train(), resized(_inputs_and_labels(batch), rows), loss


def _kinds(built: Iterable) -> str:
    return "(" + ", ".join(type(part).__name__ for part in built) + ")"


def _inputs_and_labels(batch: object) -> tuple[object, torch.Tensor | None]:
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        batch = dict(batch)
        return batch, batch.get("labels")
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return batch[0], None
        *inputs, labels = batch
        return inputs[0] if len(inputs) == 1 else tuple(inputs), labels
    return batch, None


def resized(batch: tuple, rows: int | None) -> tuple:
    """The batch with `rows` rows: every tensor as long as the first one becomes so long."""
    first = next((leaf for leaf in tree_leaves(batch) if torch.is_tensor(leaf)), None)
    if first is not None and first.dim() and not len(first):
        raise ValueError("the batch has no rows: give at least one.")
    if rows is None or first is None or len(first) == rows:
        return batch
    now = len(first)
    return tree_map_only(
        torch.Tensor,
        lambda t: t[torch.arange(rows) % now] if t.dim() and len(t) == now else t,
        batch,
    )


def _call_builder(builder: Callable, rows: int | None, simulation: Simulation | None) -> object:
    """Call a builder; in a simulation that it can't be called in, make only its parameters there.

    Networks that compute with real numbers when built (a schedule of dropout rates) are such.
    """
    try:
        takes_rows = bool(inspect.signature(builder).parameters)
    except (TypeError, ValueError):
        takes_rows = False
    arguments = (rows,) if takes_rows and rows is not None else ()
    if simulation is None:
        return builder(*arguments)
    try:
        with _building():
            return builder(*arguments)
    except (DataDependentOutputException, DynamicOutputShapeException, RuntimeError) as error:
        if isinstance(error, UnsupportedOperatorException):
            raise
        fake = _fake(simulation)
        handle = hooks.register_module_parameter_registration_hook(
            lambda module, name, parameter: fake(parameter) if parameter is not None else None
        )
        try:
            with _paused(simulation), _building():
                built = builder(*arguments)
        except Exception:
            raise error from None
        finally:
            handle.remove()
        for part in built[0].modules() if isinstance(built, (tuple, list)) else ():
            for store in (part._buffers, part.__dict__):
                for name, value in store.items():
                    if torch.is_tensor(value):
                        store[name] = fake(value)
        return built


@contextmanager
def _building() -> Iterator[None]:
    """Let networks be built that have no data.

    Initial values drawn from a truncated normal distribution are not drawn: PyTorch looks at what
    it has drawn, to draw again what lies beyond the bounds. Where a network is converted, as by
    `.half()`, its tensors are replaced: PyTorch would swap their content, which simulated ones
    refuse.
    """
    draw, apply = nn.init._no_grad_trunc_normal_, nn.Module._apply
    converted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: the old one, the new one

    def draw_numbers(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else draw(tensor, *args, **kwargs)

    def convert(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(function)
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in converted:
                    new = function(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    converted[id(tensor)] = tensor, new
                if tensor is not None:
                    store[name] = converted[id(tensor)][1]
        return module

    nn.init._no_grad_trunc_normal_, nn.Module._apply = draw_numbers, convert
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_, nn.Module._apply = draw, apply


@contextmanager
def _paused(simulation: Simulation) -> Iterator[None]:
    simulation.__exit__(None, None, None)
    try:
        yield
    finally:
        simulation.__enter__()


def _fake(simulation: Simulation) -> Callable[[torch.Tensor], torch.Tensor]:
    """Turns a tensor into one of the simulation, the same one each time."""
    return lambda t: t if isinstance(t, FakeTensor) else simulation.from_tensor(t)


def _copied(module: nn.Module, simulation: Simulation) -> nn.Module:
    """A copy of `module` whose tensors are of the simulation; what is shared stays shared."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): _fake(simulation)(t) for t in tensors})


@contextmanager
def explained(place: Callable[[], str] = str) -> Iterator[None]:
    """Turn PyTorch's errors about simulation into one sentence; `place` names the module."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        name = error.func.name().removeprefix("aten::").partition(".")[0]
        reads = READS_DATA.get(name, name)
    except UnsupportedOperatorException as error:
        reads = str(error.func)
    except NotImplementedError as error:
        if "storage" not in str(error):
            raise
        raise ValueError("this step makes sparse tensors, whose bytes can't be counted.") from error
    except RuntimeError as error:
        if "UninitializedParameter" in str(error):
            raise CannotSimulateError(
                "lazy modules can't be simulated: give their sizes, or use simulate=False (--real)."
            ) from error
        if "numpy() is not supported for tensor subclasses" not in str(error):
            raise
        reads = ".numpy()"
    else:
        return
    where = place() or "the step, outside its modules,"
    raise CannotSimulateError(
        f"{reads} in {where} needs data, which a simulation has not: use simulate=False "
        "(--real), or take it out of the step."
    )
