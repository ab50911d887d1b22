"""Simulated tensors: networks and batches that have shapes but no data."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from unittest.mock import patch

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

from ff_utils.ff.blocks import batch_rows

# An error of the step is raised; PyTorch would log it too.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)

READS_DATA = {"_local_scalar_dense": ".item()", "nonzero": "nonzero (a mask as an index)"}
aten = torch.ops.aten
# Losses whose result keeps the storage of the elements it was reduced from.
REDUCED_IN_PLACE = {
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
}
# Their statistics have the weights' precision, not the input's; where the weights are among the
# arguments.
NORMS = {
    aten.native_batch_norm.default: 1,
    aten._native_batch_norm_legit.default: 1,
    aten.native_group_norm.default: 1,
    aten.native_layer_norm.default: 2,
}
GROUP_NORM_BACKWARD = aten.native_group_norm_backward.default
# Its gradient lies in order, whatever the order of the one that comes in.
LAYER_NORM_BACKWARD = aten.native_layer_norm_backward.default
# Their kernels want one precision, which simulations do not check.
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# Products of experts, which run in any precision, but are simulated in bfloat16 only.
GROUPED_PRODUCT = aten._grouped_mm.default
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
ROWS = ("rows", "batch", "batch_size", "n")  # parameters of a builder that are a batch's length


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
        if function in NORMS:
            weight = args[NORMS[function]]
            if weight is not None and weight.dtype != args[0].dtype:
                return (result[0], *(statistic.to(weight.dtype) for statistic in result[1:]))
        if function is LAYER_NORM_BACKWARD and result[0] is not None:
            return (result[0].contiguous(), *result[1:])
        if function is GROUP_NORM_BACKWARD and result[0] is not None:
            return (result[0].to(args[1].dtype), *result[1:])
        if function is aten.mse_loss_backward.default:
            return result.to(args[1].dtype)
        if function is aten._embedding_bag.default and len(result[1]):  # one element more is kept
            bags = torch.empty(len(args[1]) + 1, dtype=args[1].dtype, device="meta")[:-1]
            return (result[0], FakeTensor(self, bags, result[1].device), *result[2:])
        return result


@contextmanager
def simulating() -> Iterator[Simulation]:
    """A simulation in which networks can be built, converted and copied."""
    with Simulation() as simulation, _without_data():
        yield simulation


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
    batched = 2 <= len(built) <= 3 and isinstance(built[0], nn.Module) and built[1] is not None
    if not batched or (built[2:] and built[2] is not None and not callable(built[2])):
        raise ValueError(
            f"{getattr(what, '__name__', type(what).__name__)} gives {_kinds(built)}: a builder "
            "returns (module, batch), (module, batch, loss) or a step."
        )
    module, batch, loss = (*built, None)[:3]
    tensors = filter(torch.is_tensor, [*module.parameters(), *tree_leaves(batch)])
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("the network or batch is on the device meta: use the CPU or a GPU.")
    if simulation and any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise CannotSimulateError(
            "TorchScript can't be simulated: give the plain module, or use simulate=False (--real)."
        )
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
    now = batch_rows(batch)
    if now == 0:
        raise ValueError("the batch has no rows: give at least one.")
    if rows is None or now == rows:
        return batch
    return tree_map_only(
        torch.Tensor,
        lambda t: t[torch.arange(rows) % now] if t.dim() and len(t) == now else t,
        batch,
    )


def _call_builder(builder: Callable, rows: int | None, simulation: Simulation | None) -> object:
    """Call a builder; in a simulation that it can't be called in, make only its parameters there.

    Networks that compute with real numbers when built (a schedule of dropout rates) are such.
    """
    arguments = {} if rows is None else _rows_argument(builder, rows)
    if simulation is None:
        return builder(**arguments)
    try:
        return builder(**arguments)
    except (DataDependentOutputException, DynamicOutputShapeException, RuntimeError) as error:
        if isinstance(error, UnsupportedOperatorException):
            raise
        fake = _fake(simulation)
        handle = hooks.register_module_parameter_registration_hook(
            lambda module, name, parameter: fake(parameter) if parameter is not None else None
        )
        try:
            with _paused(simulation):
                built = builder(**arguments)
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


def _rows_argument(builder: Callable, rows: int) -> dict[str, int]:
    """`rows` by the name of the parameter that wants it, if one does."""
    try:
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):
        return {}
    named = (p.name for p in parameters if p.name in ROWS)
    needed = (p.name for p in parameters if p.default is p.empty and p.kind not in VARIADIC)
    name = next(chain(named, needed), None)
    return {name: rows} if name else {}


@contextmanager
def _without_data() -> Iterator[None]:
    """Let PyTorch do with simulated networks what it does with others.

    Initial values drawn from a truncated normal distribution are not drawn: PyTorch looks at what
    it has drawn, to draw again what lies beyond the bounds. A parameter that is converted, as by
    `.half()`, gets other data: PyTorch would swap it with another, which simulated ones refuse.
    The copy of a parameter has no gradient, as that of a real one.
    """
    draw = nn.init._no_grad_trunc_normal_

    def draw_numbers(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else draw(tensor, *args, **kwargs)

    def convert(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(function)
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = _converted(tensor, function)
        return module

    def copied(tensor: torch.Tensor, memo: dict) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return torch.Tensor.__deepcopy__(tensor, memo)
        if id(tensor) not in memo:
            memo[id(tensor)] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        return memo[id(tensor)]

    with (
        patch.object(nn.init, "_no_grad_trunc_normal_", draw_numbers),
        patch.object(nn.Module, "_apply", convert),
        patch.object(FakeTensor, "__deepcopy__", copied),
    ):
        yield


def _converted(tensor: torch.Tensor, function: Callable) -> torch.Tensor:
    """What `nn.Module._apply` makes of a parameter or buffer; parameters stay the same objects."""
    with torch.no_grad():
        new = function(tensor)
    if not isinstance(tensor, nn.Parameter):
        return new
    if new.device != tensor.device:
        return nn.Parameter(new, tensor.requires_grad)
    if new.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
        tensor.data = new
        if tensor.grad is not None:
            tensor.grad.data = function(tensor.grad)
    return tensor


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
    tensors = filter(torch.is_tensor, tree_leaves([vars(part) for part in module.modules()]))
    fake, memo = _fake(simulation), {}
    try:
        for key, tensor in {id(tensor): tensor for tensor in tensors}.items():
            made = memo[key] = fake(tensor)
            for hook in (tensor._backward_hooks or {}).values():
                made.register_hook(hook)
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise CannotSimulateError(
            f"{type(module).__name__} can't be copied into a simulation: give a function that "
            "builds it."
        ) from error


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
        raise ValueError(
            "this step makes tensors without a storage of their own (sparse ones, or those of "
            "torch.func), whose bytes can't be counted."
        ) from error
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
