"""Backpropagation over processes, to be timed beside Forward-Forward's layers over processes.

Four ways to train the same multilayer perceptron on the same batches:

    single         one process, one thread
    threads        one process with as many threads as there are ranks
    data_parallel  the whole network on every rank, a share of each batch, averaged gradients
    pipeline       some of the layers on every rank, a batch in micro-batches (GPipe, Huang et al.,
                   arXiv 1811.06965)
"""

import json
import os
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ff_utils import process
from ff_utils.backprop import Backprop, mlp
from ff_utils.data import load_dataset
from ff_utils.distributed import TIMED, Settings, partition
from ff_utils.training import batches
from ff_utils.utils import check_number, write_text


def compare(settings: Settings, ranks: int, micro_batches: int, rounds: int) -> dict:
    """Train in the four ways, alternately, in `ranks` fresh processes on the CPU.

    rounds: epochs of each way. Of `settings` the network, data, batches, learning rate (constant)
    and seed count. Returns `epochs` (a row each: kind, round, seconds, loss (mean over the epoch))
    and `ranks` (a row each: tensor_bytes of each kind, that is weights, gradients and Adam's
    moments; busy (share of the pipeline's last epoch); timeline (start, end, "forward", "backward"
    or "update") of its first batches, in seconds).
    """
    check_number("ranks", ranks, 2, len(settings.hidden), whole=True)
    check_number("micro_batches", micro_batches, 1, settings.batch_size, whole=True)
    check_number("rounds", rounds, 1, whole=True)
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, settings, micro_batches, rounds, folder)
        with patch.dict(os.environ, process.RETURN_FREED_MEMORY):  # as `distributed.launch` has it
            torch.multiprocessing.spawn(_work, given, ranks)
        return json.loads(Path(folder, "record.json").read_text(encoding="utf-8"))


class DataParallel:
    """The whole network on every rank, each with its share of a batch (rows, pixels)."""

    def __init__(self, network: nn.Sequential, learning_rate: float) -> None:
        self.network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        self.optimizers = [torch.optim.Adam(network.parameters(), learning_rate, fused=True)]

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One update; returns this rank's part of the batch's mean loss ()."""
        rank, size = dist.get_rank(), dist.get_world_size()
        own, own_labels = images.tensor_split(size)[rank], labels.tensor_split(size)[rank]
        loss = nn.functional.cross_entropy(self.network(own), own_labels, reduction="sum")
        loss = loss / len(images)
        (loss * size).backward()  # whose gradients are averaged
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        return loss.detach()


class Pipeline:
    """Some of the layers on every rank: micro-batches go up one after another, then come down.

    widths: of the input and of every hidden layer. The last rank has the classifier too.
    """

    def __init__(
        self, network: nn.Sequential, widths: list[int], learning_rate: float, micro_batches: int
    ) -> None:
        self.rank, self.last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
        mine = partition(widths, dist.get_world_size())[self.rank]
        self.network = network[2 * mine.start : None if self.last else 2 * mine.stop]
        self.widths = widths[mine.start], widths[mine.stop]
        self.optimizers = [torch.optim.Adam(self.network.parameters(), learning_rate, fused=True)]
        self.micro_batches = micro_batches
        self.spans: list[tuple[float, float, str]] = []
        self.start = 0.0

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One update; returns the mean loss () on the last rank, 0 on the others."""
        size = -(-len(images) // self.micro_batches)
        parts, targets = images.split(size), labels.split(size)
        below = [self._receive(len(p), self.widths[0], self.rank - 1) for p in parts]
        above = [self._receive(len(p), self.widths[1], self.rank + 1) for p in parts]
        inputs, outputs, sent, total = [], [], [], torch.zeros(())
        for part, target, (h, coming) in zip(parts, targets, below, strict=True):
            if coming:
                coming.wait()
                part = h.requires_grad_()
            begun = time.perf_counter()
            out = self.network(part)
            if self.last:
                out = nn.functional.cross_entropy(out, target, reduction="sum") / len(images)
                total += out.detach()
            self._note(begun, "forward")
            if not self.last:
                sent.append((out, dist.isend(out.detach(), self.rank + 1)))
            inputs.append(part)
            outputs.append(out)
        for part, out, (gradient, coming) in zip(inputs, outputs, above, strict=True):
            if coming:
                coming.wait()
            begun = time.perf_counter()
            out.backward(None if self.last else gradient)
            self._note(begun, "backward")
            if self.rank > 0:
                sent.append((part, dist.isend(part.grad, self.rank - 1)))
        begun = time.perf_counter()
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        self._note(begun, "update")
        for _, leaving in sent:
            leaving.wait()
        return total

    def _receive(self, rows: int, width: int, other: int) -> tuple:
        """Room (rows, width) for what `other` sends, and its handle; nothing beyond the ends."""
        if not 0 <= other < dist.get_world_size():
            return None, None
        room = torch.empty(rows, width)
        return room, dist.irecv(room, other)

    def _note(self, begun: float, kind: str) -> None:
        self.spans.append((begun - self.start, time.perf_counter() - self.start, kind))


def _work(
    rank: int, ranks: int, settings: Settings, micro_batches: int, rounds: int, folder: str
) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    data = load_dataset(settings.dataset, settings.train_size or None)
    sizes, rate = (data.pixels, data.classes, list(settings.hidden)), settings.learning_rate
    networks = [mlp(*sizes, seed=settings.seed) for _ in range(4)]
    systems = {
        "single": Backprop(networks[0], learning_rate=rate),
        "threads": Backprop(networks[1], learning_rate=rate),
        "data_parallel": DataParallel(networks[2], rate),
        "pipeline": Pipeline(networks[3], [data.pixels, *settings.hidden], rate, micro_batches),
    }
    orders = {kind: torch.Generator().manual_seed(settings.seed) for kind in systems}
    pipeline, rows, tensor_bytes = systems["pipeline"], [], {}
    for number in range(1, rounds + 1):
        for kind, system in systems.items():
            torch.set_num_threads(ranks if kind == "threads" else 1)
            pipeline.spans = []
            loss, count = torch.zeros(()), 0
            dist.barrier()
            pipeline.start = start = time.perf_counter()
            if rank == 0 or kind in ("data_parallel", "pipeline"):
                for images, labels in batches(data, settings.batch_size, orders[kind]):
                    loss, count = loss + system.step(images, labels), count + 1
            dist.barrier()
            seconds = time.perf_counter() - start
            loss = loss / max(count, 1)
            dist.all_reduce(loss)
            rows.append({"kind": kind, "round": number, "seconds": seconds, "loss": float(loss)})
            tensor_bytes[kind] = _tensor_bytes(system) if count else 0
    busy = sum(end - begun for begun, end, _ in pipeline.spans) / rows[-1]["seconds"]
    shown = pipeline.spans[: TIMED * (2 * micro_batches + 1)]
    own = {"tensor_bytes": tensor_bytes, "busy": busy, "timeline": shown}
    gathered = [None] * ranks
    dist.all_gather_object(gathered, own)
    if rank == 0:
        text = json.dumps({"epochs": rows, "ranks": gathered}) + "\n"
        write_text(Path(folder, "record.json"), text)
    dist.destroy_process_group()


def _tensor_bytes(system: Backprop | DataParallel | Pipeline) -> int:
    """Weights and gradients of a system, and its optimizer's state."""
    size = sum(2 * p.nbytes for p in system.network.parameters())
    for optimizer in system.optimizers:
        states = optimizer.state.values()
        size += sum(v.nbytes for state in states for v in state.values() if torch.is_tensor(v))
    return size
