"""Networks of which only one layer is on the device at a time; the others are in a store.

A layer's weights and its optimizer's state are fetched when its turn comes and written back when
it has been trained, so that the device holds one layer however deep the network is. The
arithmetic is that of the network in memory: on a CPU the same seed gives the same bits.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import nn

from ff_utils.config import FFConfig, LayerConfig
from ff_utils.ff.layers import FFLayer, split_batch
from ff_utils.ff.negatives import FactoredInput
from ff_utils.ff.network import ForwardForward
from ff_utils.utils import HOST, allocation_category, check_number, user_path

ALIGNMENT = 64  # elements: tensors in a slot start where libraries take their fastest kernels
WEIGHTS = ("weight", "bias")
MOMENTS = tuple(f"{name}_{which}_moment" for name in WEIGHTS for which in ("first", "second"))


class MemoryStore:
    """Keeps tensors in the host's memory: pinned, where a GPU copies from it."""

    def __init__(self, pinned: bool = False) -> None:
        self.pinned, self.tensors, self.moved = pinned, {}, 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a copy of `tensor` under `name`."""
        if name not in self.tensors or self.tensors[name].shape != tensor.shape:
            with allocation_category(HOST):
                self.tensors[name] = torch.empty_like(
                    tensor, device="cpu", pin_memory=self.pinned or None
                )
        self.tensors[name].copy_(tensor, non_blocking=self.pinned)
        self.moved += tensor.nbytes

    def read(self, name: str, into: torch.Tensor) -> torch.Tensor:
        """Fill `into` with what was written under `name`."""
        into.copy_(self.tensors[name], non_blocking=self.pinned)
        self.moved += into.nbytes
        return into

    def clear(self) -> None:
        """Forget every tensor."""
        self.tensors.clear()


class FileStore:
    """Keeps tensors in files of an empty folder, for a CPU with little memory.

    Plain reads and writes: pages of a mapped file would count as the process's own memory.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder, self.moved = user_path(folder), 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{folder} cannot be made ({error.strerror}): give another.") from error
        if any(self.folder.iterdir()):
            raise ValueError(f"{folder} is not empty: give a new folder, or empty this one.")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write `tensor` to the file `name`; OSError with what to do where the disk is full."""
        try:
            (self.folder / name).write_bytes(_bytes(tensor.contiguous()))
        except OSError as error:
            raise OSError(
                f"{self.folder / name} could not be written ({error.strerror}): give a folder "
                "on a disk with more room."
            ) from error
        self.moved += tensor.nbytes

    def read(self, name: str, into: torch.Tensor) -> torch.Tensor:
        """Fill `into` from the file `name`; ValueError where it is missing or cut short."""
        path, view = self.folder / name, _bytes(into)
        with path.open("rb", buffering=0) if path.exists() else nullcontext() as file:
            # One read moves about 2 GiB at most, so read until the view is full.
            while file and view and (count := file.readinto(view)):
                view = view[count:]
        if view:
            raise ValueError(f"{path} is missing or not whole: start again in an empty folder.")
        self.moved += into.nbytes
        return into

    def clear(self) -> None:
        """Remove every file; the folder stays, empty."""
        for path in self.folder.iterdir():
            path.unlink()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def open_store(store: str | os.PathLike, device: torch.device) -> MemoryStore | FileStore:
    """The store "memory", or one of files in a folder; a folder needs the CPU as device."""
    if str(store) == "memory":
        return MemoryStore(pinned=device.type == "cuda")
    if device.type != "cpu":
        raise ValueError(f"store is {str(store)!r}, a folder, which needs device 'cpu'.")
    return FileStore(store)


class Slots:
    """The device's room for one layer: two slots for weights (one, with ahead=0), one for moments.

    Layer k uses weights slot k modulo their number. On a GPU, copies run on streams of their own:
    while a layer computes, the next one's weights arrive and the last one's leave; its moments
    arrive while its gradient is computed. A slot is filled only after its event in `free`, which
    tells that what was in it is whole on the host.
    """

    def __init__(
        self,
        widths: list[int],
        store: MemoryStore | FileStore,
        ahead: int,
        like: torch.Tensor,
        moments: bool,
    ) -> None:
        depth = len(widths) - 1
        room = max(_aligned(below * width) + _aligned(width) for below, width in pairwise(widths))
        self.store, self.layers = store, {}
        self.weights = [like.new_zeros(room) for _ in range(min(1 + ahead, depth))]
        self.moments = like.new_zeros(2 * room) if moments else None
        self.steps = like.new_zeros(depth, 2, dtype=torch.float32) if moments else None
        self.cuda = getattr(store, "pinned", False)  # only a GPU copies from pinned memory
        self.inward = self.outward = self._moments_arrived = None
        if self.cuda:
            self.inward, self.outward = (torch.cuda.Stream(like.device) for _ in range(2))
            self._outlive_copies()
        self.free: dict[int | str, torch.cuda.Event] = {}

    def take(self, number: int, layer: FFLayer) -> FFLayer:
        """Write a new layer's tensors to the store and let the layer read the slots instead."""
        if layer.config.optimizer == "adam_8bit":
            raise ValueError(
                "optimizer is 'adam_8bit', which can't be offloaded: take 'adam' or 'sgd'."
            )
        pieces = [("weights", self.weights[self._slot(number, "weights")], WEIGHTS)]
        if self.moments is not None:
            pieces.append(("moments", self.moments, MOMENTS))
            layer.weight_steps, layer.bias_steps = self.steps[number]
            layer.optimizer.before_update = self.await_moments
        for piece, slot, names in pieces:
            offset = 0
            for name in names:
                tensor = getattr(layer, name)
                view = slot[offset : offset + tensor.numel()].view_as(tensor)
                view.copy_(tensor)
                if name in WEIGHTS:
                    view = nn.Parameter(view, requires_grad=False)
                setattr(layer, name, view)
                offset += _aligned(tensor.numel())
            self.layers[number, piece] = slot[:offset]
            self.store.write(f"{number}.{piece}", slot[:offset])
        self.synchronize()  # what was written is whole before another stream reads it
        return layer

    def iter_layers(
        self, layers: nn.ModuleList, numbers: Sequence[int], update: bool
    ) -> Iterator[FFLayer]:
        """Fetch the layers of these numbers in turn; write each back if it was to be trained."""
        numbers, arrived = list(numbers), {}
        for number, following in pairwise([*numbers, *numbers[-1:]]):
            if number not in arrived:
                arrived[number] = self._fetch(number, "weights")
            # Moments first: they are needed sooner than the next layer's weights.
            if update and self.moments is not None:
                self._moments_arrived = self._fetch(number, "moments")
            if self._slot(following, "weights") != self._slot(number, "weights"):
                arrived[following] = self._fetch(following, "weights")
            self._await(arrived.pop(number))
            yield layers[number]
            self._write_back(number, update)

    def synchronize(self) -> None:
        """Wait for every copy that is under way."""
        if self.cuda:
            torch.cuda.synchronize()

    def await_moments(self) -> None:
        """Wait until the moments of the layer at work are there."""
        self._await(self._moments_arrived)

    def _slot(self, number: int, piece: str) -> int | str:
        return number % len(self.weights) if piece == "weights" else piece

    def _fetch(self, number: int, piece: str) -> "torch.cuda.Event | None":
        with torch.cuda.stream(self.inward):  # of no effect without a GPU, where it is None
            if slot_is_free := self.free.get(self._slot(number, piece)):
                self.inward.wait_event(slot_is_free)
            self.store.read(f"{number}.{piece}", self.layers[number, piece])
            return self.inward.record_event() if self.cuda else None

    def _await(self, event: "torch.cuda.Event | None") -> None:
        if event:
            torch.cuda.current_stream().wait_event(event)

    def _write_back(self, number: int, update: bool) -> None:
        pieces = ["weights"]
        if update and self.moments is not None:
            pieces = ["moments", "weights"]
            self.await_moments()
        if self.cuda:
            self.outward.wait_event(torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self.outward):
            for piece in pieces:
                if update:
                    self.store.write(f"{number}.{piece}", self.layers[number, piece])
                if self.cuda:
                    self.free[self._slot(number, piece)] = self.outward.record_event()

    def _outlive_copies(self) -> None:
        """Keep slots' memory from being used again before the copies from and to it are done."""
        for slot in (*self.weights, self.moments):
            for stream in (self.inward, self.outward):
                if slot is not None:
                    slot.record_stream(stream)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class _Offloaded(nn.Module):
    """What offloaded networks share: their `layers` are in `slots`, one at a time."""

    def iter_layers(self, numbers: Sequence[int], update: bool = False) -> Iterator[FFLayer]:
        """The layers of these numbers, fetched one after the other."""
        yield from self.slots.iter_layers(self.layers, numbers, update)

    def state_dict(self, *arguments: object, **keywords: object) -> dict[str, torch.Tensor]:
        """As of a network in memory, every tensor copied to the host."""
        state = super().state_dict(*arguments, **keywords)
        for prefix, layer in self._whole_layers():
            found = layer.state_dict(prefix=prefix)
            state |= {name: tensor.cpu().clone() for name, tensor in found.items()}
        return state

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Take over the weights and optimizer state of a network in memory, layer by layer."""
        found = super().load_state_dict(state_dict, strict)
        for prefix, layer in self._whole_layers():
            own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
            layer.load_state_dict(own, strict=False)
        return found

    def _whole_layers(self) -> Iterator[tuple[str, FFLayer]]:
        """Every layer with its moments, to be read or changed; and its prefix in a state."""
        for number, layer in enumerate(self.iter_layers(range(len(self.layers)), update=True)):
            self.slots.await_moments()
            yield f"layers.{number}.", layer
        self.slots.synchronize()

    def _apply(self, function, recurse: bool = True):
        raise RuntimeError("an offloaded network stays where it was built: give `device` there.")


class OffloadedForwardForward(_Offloaded, ForwardForward):
    """A `ForwardForward` network of which one layer at a time is on the device.

    store: "memory" of the host, or an empty folder (device "cpu" only), with room for three
        times the weights and, for the classifier's training, one activation a layer of a batch.
    ahead: layers whose weights are fetched in advance, 0 or 1.
    Trains and predicts by the calls of `ForwardForward`, and `state_dict` and `load_state_dict`
    exchange weights with one. A classifier stays on the device: three numbers a class and unit.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        hidden: list[int],
        config: FFConfig = FFConfig(),
        *,
        store: str | os.PathLike = "memory",
        ahead: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_number("ahead", ahead, 0, 1, whole=True)
        self._store_and_ahead = (open_store(store, torch.device(device)), ahead)
        super().__init__(pixels, classes, hidden, config, device=device, dtype=dtype)

    def build_layer(self, number: int, make: Callable[..., FFLayer]) -> FFLayer:
        """Make a layer on the host and send it to the store."""
        layer = make()
        if number == 0:
            widths = [layer.in_features, *self.hidden]
            moments = self.config.optimizer == "adam"
            self.slots = Slots(widths, *self._store_and_ahead, self.grad_buffer, moments)
        return self.slots.take(number, layer)

    def cache_activations(
        self, h: torch.Tensor | FactoredInput, depth: int
    ) -> Callable[[], Iterable[torch.Tensor]]:
        """Activations cached in the store, read one at a time; or recomputed each time."""
        if self.config.recompute:
            return super().cache_activations(h, depth)
        store, empty, rows = self.slots.store, self.grad_buffer.new_empty, len(h)
        for number, y in enumerate(self.activations(h, depth)):
            store.write(f"kept.{number}", y)
        widths = list(enumerate(self.hidden[:depth]))
        return lambda: (store.read(f"kept.{k}", empty(rows, width)) for k, width in widths)

    def step_in_parts(
        self, h: torch.Tensor, positives: int, learning_rate: float, micro_batches: int
    ) -> torch.Tensor:
        """As `step`, but rows are in the store too and come to a layer a part at a time.

        h: (rows, inputs), normalised; left as it is. Returns the layers' losses (layers,).
        """
        pairs = self.config.loss == "pairwise"
        losses, parts = [], split_batch(len(h), positives, micro_batches, pairs)
        store, last, rows = self.slots.store, len(self.layers) - 1, []
        for number, layer in enumerate(self.iter_layers(range(last + 1), update=True)):
            dw = self.grad_buffer[: layer.weight.numel()].view_as(layer.weight)
            db, total = torch.empty_like(layer.bias), 0
            for p, part in enumerate(parts):
                if number == 0:
                    x = h[part.rows].clone()
                    rows.append(len(x))
                else:
                    x = store.read(f"rows.{p}", h.new_empty(rows[p], layer.in_features))
                y, loss = layer.add_gradient(x, part, dw, db)
                if number < last:
                    store.write(f"rows.{p}", y)
                total = total + loss
                del x, y
            layer.optimizer.update([dw, db], learning_rate)
            losses.append(total)
        return torch.stack(losses)


class OffloadedBackprop(_Offloaded):
    """The backprop network with one layer at a time on the device: offloaded FF's strongest rival.

    A step goes up through the layers, leaving each one's input in the store, and down again,
    fetching them, by the chain rule written out: dz = dy where y > 0, dW = dz^T h, dh = dz W.
    Weights are fetched once more than in FF, activations are moved three times.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        hidden: list[int],
        *,
        store: str | os.PathLike = "memory",
        ahead: int = 1,
        optimizer: str = "adam",
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        widths = [pixels, *hidden, classes]
        largest = max(below * above for below, above in pairwise(widths))
        gradient = torch.zeros(largest, device=device, dtype=dtype)
        self.register_buffer("grad_buffer", gradient, persistent=False)
        store = open_store(store, torch.device(device))
        self.slots = Slots(widths, store, ahead, gradient, moments=optimizer == "adam")
        self.depth = len(hidden)  # the classifier comes after the hidden layers
        generator = torch.Generator().manual_seed(seed)
        config = LayerConfig(optimizer=optimizer)
        self.layers = nn.ModuleList(
            self.slots.take(number, FFLayer(below, above, config, generator=generator, dtype=dtype))
            for number, (below, above) in enumerate(pairwise(widths))
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (rows, classes) of images (rows, pixels)."""
        h = images
        for number, layer in enumerate(self.iter_layers(range(self.depth + 1))):
            h = self._output(number, layer, h)
        return h

    def step(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        learning_rate: float,
        micro_batches: int = 1,
    ) -> torch.Tensor:
        """Train every layer on one batch; returns the mean cross-entropy ().

        With micro-batches, rows come to a layer a part at a time: of activations and of the
        gradient on its way down, the device holds one part and the store the others.
        """
        size = -(-len(images) // micro_batches)
        parts, whole, store = images.split(size), micro_batches == 1, self.slots.store
        passing: dict[int, torch.Tensor] = {}  # what is between two layers, in one part
        logits = []
        for number, layer in enumerate(self.iter_layers(range(self.depth + 1))):
            for p, part in enumerate(parts):
                h = part if number == 0 else passing.pop(p, None)
                h = self._kept(number, p, part) if h is None else h
                h = self._output(number, layer, h)
                if number == self.depth:
                    logits.append(h)
                else:
                    store.write(f"kept.{number + 1}.{p}", h)
                    if whole:
                        passing[p] = h
                del h
        loss = 0
        for p, (found, true) in enumerate(zip(logits, labels.split(size), strict=True)):
            loss = loss + nn.functional.cross_entropy(found, true, reduction="sum")
            dz = found.softmax(dim=1)
            dz[torch.arange(len(true), device=true.device), true] -= 1
            logits[p] = dz.div_(len(labels))
            del dz
        passing |= enumerate(logits)
        del logits, found
        downwards = range(self.depth, -1, -1)
        for number, layer in zip(downwards, self.iter_layers(downwards, update=True), strict=True):
            dw = self.grad_buffer[: layer.weight.numel()].view_as(layer.weight)
            db = torch.empty_like(layer.bias)
            for p, part in enumerate(parts):
                dz = passing.pop(p, None)
                if dz is None:
                    dz = images.new_empty(len(part), len(layer.bias))
                    store.read(f"down.{p}", dz)
                beta = 0.0 if p == 0 else 1.0
                below = part if number == 0 else self._kept(number, p, part)
                dw.addmm_(dz.t(), below, beta=beta)
                torch.sum(dz, dim=0, out=db) if p == 0 else db.add_(dz.sum(dim=0))
                if number > 0:
                    if whole:  # read again rather than kept: one activation less on the device
                        del below
                    dz = dz @ layer.weight
                    below = self._kept(number, p, part) if whole else below
                    torch.ops.aten.threshold_backward.grad_input(dz, below, 0, grad_input=dz)
                    if whole:
                        passing[p] = dz
                    else:
                        store.write(f"down.{p}", dz)
                del dz, below
            layer.optimizer.update([dw, db], learning_rate)
        return loss / len(labels)

    def _output(self, number: int, layer: FFLayer, h: torch.Tensor) -> torch.Tensor:
        return layer(h) if number < self.depth else torch.addmm(layer.bias, h, layer.weight.t())

    def _kept(self, number: int, p: int, part: torch.Tensor) -> torch.Tensor:
        empty = part.new_empty(len(part), self.layers[number].in_features)
        return self.slots.store.read(f"kept.{number}.{p}", empty)
