"""Training past one machine: the layers of a Forward-Forward network spread over ranks.

    torchrun --standalone --nproc-per-node 2 -m ff_utils.distributed --dataset mnist \
        --hidden 800 800 800 800 800 800 --epochs 2 --checkpoint build/ranks

Each rank trains its own layers on what the rank below sends, and sends their activations on.
Nothing comes back, so that a rank turns to the next batch as soon as it is done with this one. On
a CPU the layers learn, bit for bit, what they learn in one process. Negatives are random wrong
labels: hard ones are drawn from a classifier that reads every layer, whose answer would have to
come back to the first rank before its batch could begin. For several machines, see torchrun's
--nnodes and --rdzv-endpoint; the checkpoint's folder must be one that all of them see. With
torchrun's --max-restarts, ranks that end are started again and go on from there. Where the
machine's name does not resolve, torchrun needs --local-addr 127.0.0.1.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn

from ff_utils import data as datasets
from ff_utils.config import FFConfig, LayerConfig, TrainConfig
from ff_utils.ff.layers import FFLayer
from ff_utils.ff.negatives import random_negatives
from ff_utils.ff.network import EVALUATION_ROWS, ForwardForward, named_losses
from ff_utils.process import (
    RETURN_FREED_MEMORY,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)
from ff_utils.training import batches, check_finite, check_fit, decay_factor
from ff_utils.utils import (
    ROOT,
    check_ints,
    check_number,
    format_bytes,
    relative,
    replace_file,
    track,
    user_path,
    write_text,
)

IN_FLIGHT = 2  # batches that a rank has, or will have next, from the rank below
TIMED = 40  # batches whose times are recorded
TIMEOUT = 300.0  # seconds to wait for a neighbour
OLD_NAMES = {"theta": "threshold", "scale": "sharpness"}  # in checkpoints and on command lines


@dataclass(frozen=True)
class Settings:
    """What is learned: the same settings give the same weights on any number of ranks."""

    dataset: str = "auto"
    train_size: int = 0
    hidden: tuple[int, ...] = (1000, 1000, 1000, 1000)
    epochs: int = 2
    batch_size: int = 500
    learning_rate: float = 0.001
    label_scale: float = 4.0
    threshold: float = 1.0
    sharpness: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for a value out of range, whatever the data."""
        check_number("train_size", self.train_size, 0, whole=True)
        check_ints("hidden", self.hidden, 1)
        self.configs()

    def configs(self) -> tuple[FFConfig, TrainConfig]:
        """Of the network, which has no classifier, and of its training."""
        network = {"label_scale": self.label_scale, "threshold": self.threshold}
        network |= {"sharpness": self.sharpness, "seed": self.seed}
        train = TrainConfig(self.epochs, self.batch_size, self.learning_rate)
        return FFConfig(classifier=False, **network), train


class RankLostError(RuntimeError):
    """A neighbour has ended or does not answer."""


# --- Which rank has which layers ------------------------------------------------------------


def partition(widths: list[int], ranks: int) -> list[range]:
    """Each rank's layers, in order, so that the largest part of the work is as small as can be.

    widths: of the input and of every layer. A layer's work is its inputs times its outputs.
    """
    costs = [below * above for below, above in pairwise(widths)]

    @cache
    def best(first: int, ranks: int) -> tuple[int, tuple[int, ...]]:
        if ranks == 1:
            return sum(costs[first:]), (len(costs),)
        options = []
        for end in range(first + 1, len(costs) - ranks + 2):
            largest, ends = best(end, ranks - 1)
            options.append((max(sum(costs[first:end]), largest), (end, *ends)))
        return min(options)

    return [range(*bounds) for bounds in pairwise((0, *best(0, ranks)[1]))]


class LayerShard(ForwardForward):
    """The layers `mine` of a `ForwardForward` network, under their numbers in the whole.

    The others are drawn, so that a seed means the same weights, and dropped one by one.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        hidden: list[int],
        mine: range,
        config: FFConfig,
        device: torch.device,
    ) -> None:
        self.mine = mine
        super().__init__(pixels, classes, hidden, config, device=device)
        largest = max(self.layers[number].weight.numel() for number in mine)
        self.grad_buffer = self.grad_buffer.new_zeros(largest)

    def build_layer(self, number: int, make: Callable[..., FFLayer]) -> nn.Module:
        """Make a layer that is mine; draw one that is not, without its optimizer's state."""
        if number in self.mine:
            return super().build_layer(number, make)
        make(config=LayerConfig(optimizer="sgd"))
        return nn.Identity()

    def own_layers(self) -> list[FFLayer]:
        """The layers that are here."""
        return [self.layers[number] for number in self.mine]


# --- Messages between neighbours ------------------------------------------------------------


class Ranks:
    """This process among the others: it receives from the rank below and sends to the one above.

    timeout: seconds to wait for a neighbour, after which RankLostError is raised.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if dist.is_nccl_available() and torch.cuda.device_count() >= here:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        self.store = dist.HashStore()
        if self.size > 1:
            self.store = next(dist.rendezvous("env://", timeout=limit))[0]
        place = {"rank": self.rank, "world_size": self.size}
        dist.init_process_group(backend, store=self.store, timeout=limit, **place)
        self.last = self.rank == self.size - 1
        self.sending = None  # a message under way, and its handle

    @contextmanager
    def _talk(self, other: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            silent = f"has not answered for {self.timeout:g} s"
            what = silent if "imed out" in str(error) else "has ended"
            raise RankLostError(f"rank {other} {what} before its work was done") from error

    def receive(self, sizes: list[int], room: torch.Tensor) -> Iterator[torch.Tensor]:
        """Activations (size, width) from the rank below, for each of `sizes`.

        The next one arrives while one is in use, and takes the memory of the one before:
        room (IN_FLIGHT, largest size, width).
        """
        coming = deque()
        for number in range(len(sizes) + IN_FLIGHT):
            if number >= IN_FLIGHT:
                h, work = coming.popleft()
                with self._talk(self.rank - 1):
                    work.wait()
                yield h
            if number < len(sizes):
                h = room[number % IN_FLIGHT, : sizes[number]]
                with self._talk(self.rank - 1):
                    coming.append((h, dist.irecv(h, self.rank - 1)))

    def send(self, h: torch.Tensor) -> None:
        """Send activations to the rank above, if there is one, once the last ones are there."""
        if self.last:
            return
        self.flush()
        with self._talk(self.rank + 1):
            self.sending = (h, dist.isend(h, self.rank + 1))

    def flush(self) -> None:
        """Wait until what was sent has left."""
        if self.sending:
            with self._talk(self.rank + 1):
                self.sending[1].wait()
            self.sending = None

    def broadcast(self, value: object = None) -> object:
        """The first rank's `value`, on every rank: all have it at about the same time."""
        if self.rank > 0:
            value = self._receive_object(self.rank - 1)
        if not self.last:
            self._send_object(value, self.rank + 1)
        return value

    def gather(self, value: object) -> list | None:
        """Every rank's `value`, on the first; they go from rank to rank, and last to the first."""
        values = [*(self._receive_object(self.rank - 1) if self.rank > 0 else []), value]
        if self.size == 1:
            return values
        self._send_object(values, (self.rank + 1) % self.size)
        return self._receive_object(self.size - 1) if self.rank == 0 else None

    # Neighbours talk in place of dist.broadcast_object_list, so that the lost rank is known.
    def _send_object(self, value: object, other: int) -> None:
        with self._talk(other):
            dist.send_object_list([value], other, device=torch.device("cpu"))

    def _receive_object(self, other: int) -> object:
        into = [None]
        with self._talk(other):
            dist.recv_object_list(into, other, device=torch.device("cpu"))
        return into[0]

    def end(self, sentence: str, status: int) -> None:
        """Leave at once, and say why unless another rank has said why it did."""
        try:
            first = self.store.add("ended", 1) == 1
        except RuntimeError:  # the store has ended too
            first = True
        if first:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(status)  # no clean-up, which could wait for a rank that is lost


# --- Checkpoints ----------------------------------------------------------------------------


class Checkpoint:
    """A folder with a file for each layer and, once all of them are there, one for the run.

    A kill at any moment leaves a whole set: the last one goes only when the next is complete. As
    each layer has its own file, any number of ranks can go on from it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self, settings: dict) -> dict | None:
        """The last complete run file; ValueError where it is of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {int(path.stem.split("-")[1]): path for path in self.folder.glob("epoch-*.run")}
        if not found:
            return None
        run = _load(found[max(found)])
        then = {OLD_NAMES.get(name, name): value for name, value in run["settings"].items()}
        for name, value in settings.items():
            if then.get(name) != value:
                raise ValueError(
                    f"{name} is {value!r}, but {relative(self.folder)} holds a training where it "
                    f"is {then.get(name)!r}: give that, or another folder."
                )
        return run | {"settings": then}

    def save_layers(self, shard: LayerShard, epoch: int) -> None:
        """Write the layers that are here."""
        for number in shard.mine:
            state = shard.layers[number].state_dict()
            _save(state, self.folder / f"epoch-{epoch}.layer-{number}")

    def load_layers(self, shard: LayerShard, epoch: int) -> None:
        """Read the layers that are here."""
        for number in shard.mine:
            state = _load(self.folder / f"epoch-{epoch}.layer-{number}", shard.grad_buffer.device)
            shard.layers[number].load_state_dict(state)

    def complete(self, run: dict) -> None:
        """All layers are written: write the run's file and remove what it replaces."""
        _save(run, self.folder / f"epoch-{run['epoch']}.run")
        for path in [*self.folder.glob("epoch-*"), *self.folder.glob(".epoch-*")]:
            if not path.name.startswith(f"epoch-{run['epoch']}."):
                path.unlink()


def _save(state: dict, path: Path) -> None:
    replace_file(path, lambda temporary: torch.save(state, temporary))


def _load(path: Path, device: torch.device | str = "cpu") -> dict:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load has many ways to say that a file is not whole
        raise ValueError(
            f"{relative(path)} is missing or not whole: empty its folder to start again."
        ) from error


# --- Training -------------------------------------------------------------------------------


def train(settings: Settings, ranks: Ranks, checkpoint: Path | None = None) -> dict | None:
    """Train this rank's layers; on the first rank, returns the record of all.

    checkpoint: a folder that every epoch is kept in, and that a run goes on from.
    The record: settings, device, threads, test_error (by goodness), `epochs` (a row each: epoch,
    seconds, loss_1 ...), `layers` (a SHA-256 of each layer's weights and optimizer state) and
    `ranks` (a row each: layers, tensor_bytes, peak_bytes of the process beyond what it had before
    there were layers, busy (share of the last epoch's time), timeline (start and end of the work
    on its first batches, in seconds from the epoch's start)).
    Raises ValueError for bad input before anything runs, RankLostError for a lost neighbour, and
    FloatingPointError where a loss stops being finite.
    """
    store, run, data, sizes = Checkpoint(checkpoint) if checkpoint else None, None, None, None
    if ranks.rank == 0:
        data, run = _prepare(settings, ranks, store)
        counts = {"train": len(data.train_labels), "test": len(data.test_labels)}
        sizes = {"pixels": data.pixels, "classes": data.classes, "epoch": run["epoch"]} | counts
    before = _baseline(ranks)
    sizes = ranks.broadcast(sizes)
    mine = partition([sizes["pixels"], *settings.hidden], ranks.size)[ranks.rank]
    widths = (sizes["pixels"], sizes["classes"], list(settings.hidden))
    shard = LayerShard(*widths, mine, settings.configs()[0], ranks.device)
    generator = torch.Generator().manual_seed(settings.seed)
    if sizes["epoch"]:
        store.load_layers(shard, sizes["epoch"])
        if data:
            generator.set_state(run["generator"])
    stage = Stage(settings, ranks, sizes, shard, data, generator)
    work = {"busy": None, "timeline": []}
    numbers = range(sizes["epoch"] + 1, settings.epochs + 1)
    if data:
        numbers = track(numbers, "epoch", sizes["epoch"], settings.epochs)
    ranks.gather(None)  # all are ready
    for epoch in numbers:
        row, work = stage.train_epoch(epoch)
        if store:
            store.save_layers(shard, epoch)
            ranks.gather(None)  # all are written
        if data:
            run |= {"epoch": epoch, "epochs": [*run["epochs"], row]}
            run |= {"generator": generator.get_state()}
            if store:
                store.complete(run)
    error = stage.test_error()
    row = {
        "layers": [number + 1 for number in shard.mine],
        "tensor_bytes": sum(t.nbytes for t in [*shard.parameters(), *shard.buffers()]),
        "peak_bytes": _peak(ranks) - before,
        **work,
    }
    gathered = ranks.gather((row, [digest(layer) for layer in shard.own_layers()]))
    if not data:
        return None
    return {
        "settings": run["settings"],
        "device": ranks.device.type,
        "threads": torch.get_num_threads(),
        "test_error": error,
        "epochs": run["epochs"],
        "layers": [text for _, digests in gathered for text in digests],
        "ranks": [row for row, _ in gathered],
    }


class Stage:
    """One rank's layers at work. The first rank has the data and makes inputs of it.

    sizes: pixels, classes, train and test (samples), and the epoch that is done.
    """

    def __init__(
        self,
        settings: Settings,
        ranks: Ranks,
        sizes: dict[str, int],
        shard: LayerShard,
        data: datasets.Dataset | None,
        generator: torch.Generator,
    ) -> None:
        self.settings, self.ranks, self.sizes = settings, ranks, sizes
        self.shard, self.data, self.generator = shard, data, generator
        self.rows = 2 * settings.batch_size
        self.room = None
        if not data:
            room = (IN_FLIGHT, max(self.rows, sizes["classes"]), shard.own_layers()[0].in_features)
            self.room = shard.grad_buffer.new_empty(room)

    def train_epoch(self, epoch: int) -> tuple[dict | None, dict]:
        """Train on every batch; returns the epoch's row, on the first rank, and this one's work."""
        sizes = _batch_rows(self.sizes["train"], self.settings.batch_size, 2)
        self.ranks.broadcast()
        start = time.perf_counter()
        total, times = 0, []
        rows = self._samples() if self.data else self.ranks.receive(sizes, self.room)
        for number, h in enumerate(rows):
            begun = time.perf_counter()
            done = (epoch - 1 + number / len(sizes)) / self.settings.epochs
            rate = self.settings.learning_rate * decay_factor(done, "linear")
            positives, losses = len(h) // 2, []
            for layer in self.shard.own_layers():
                h, loss = layer.step(h, positives, rate, self.shard.grad_buffer)
                losses.append(loss)
            total = total + torch.stack(losses)
            if h.is_cuda and number < TIMED:
                torch.cuda.synchronize()
            times.append((begun - start, time.perf_counter() - start))
            self.ranks.send(h)
        self.ranks.flush()
        mean = named_losses((total / len(sizes)).tolist(), first=self.shard.mine.start + 1)
        check_finite(mean, epoch)
        gathered = self.ranks.gather(mean)
        seconds, row = time.perf_counter() - start, None
        if gathered:
            row = {"epoch": epoch, "seconds": seconds}
            for losses in gathered:
                row |= losses
        busy = sum(end - begun for begun, end in times) / seconds
        return row, {"busy": busy, "timeline": times[:TIMED]}

    def test_error(self) -> float | None:
        """Share of test images whose label with the most goodness, over all layers, is wrong.

        Images go up with every label at once; each rank adds its layers' goodness, and the first
        one the ranks' sums.
        """
        classes, samples = self.sizes["classes"], self.sizes["test"]
        each = max(1, min(EVALUATION_ROWS, self.rows) // classes)
        sizes = _batch_rows(samples, each, classes)
        rows = self._tests(each) if self.data else self.ranks.receive(sizes, self.room)
        sums, done = torch.empty(samples, classes), 0
        for h in rows:
            total, images = 0, len(h) // classes
            for layer in self.shard.own_layers():
                h = layer(h)
                total = total + layer.goodness_of(layer.normalise_(h))
            self.ranks.send(h)
            sums[done : done + images] = total.view(images, classes)
            done += images
        self.ranks.flush()
        gathered = self.ranks.gather(sums)
        if not gathered:
            return None
        wrong = sum(gathered).argmax(1) != self.data.test_labels.cpu()
        return float(wrong.sum()) / samples

    def _samples(self) -> Iterator[torch.Tensor]:
        """What the first layer is trained on, half positive, half negative."""
        for images, labels in batches(self.data, self.settings.batch_size, self.generator):
            wrong = random_negatives(labels, self.data.classes, self.generator)
            yield self.shard.encode(images.repeat(2, 1), torch.cat([labels, wrong]))

    def _tests(self, each: int) -> Iterator[torch.Tensor]:
        """`each` test images at a time, every one under every label."""
        every = torch.arange(self.data.classes, device=self.ranks.device)
        for images, _ in datasets.test_batches(self.data, each):
            labels = every.repeat(len(images))
            yield self.shard.encode(images.repeat_interleave(len(every), 0), labels)


def digest(layer: FFLayer) -> str:
    """Short SHA-256 of a layer's weights and optimizer state."""
    found = hashlib.sha256()
    for tensor in layer.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def _prepare(
    settings: Settings, ranks: Ranks, store: Checkpoint | None
) -> tuple[datasets.Dataset, dict]:
    """On the first rank: load the data, refuse what does not fit it, and see what is done."""
    if ranks.size > len(settings.hidden):
        raise ValueError(
            f"hidden has {len(settings.hidden)} layers for {ranks.size} ranks; give at least one "
            "layer for each."
        )
    data = datasets.load_dataset(settings.dataset, settings.train_size or None)
    check_fit(data, settings.configs()[1])
    given = asdict(settings) | {"hidden": list(settings.hidden)}
    given |= {"dataset": data.name, "checksum": data.checksum}
    run = {"settings": given, "epoch": 0, "epochs": []}
    if store:
        run = store.latest(given) or run
    return data.to(ranks.device), run


def _baseline(ranks: Ranks) -> int:
    """Bytes this process has before there are layers."""
    torch.ones(64, 64) @ torch.ones(64, 64)  # loads what any program loads
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    reset_peak()
    return resident_bytes()


def _peak(ranks: Ranks) -> int:
    cuda = ranks.device.type == "cuda"
    return torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()


def _batch_rows(samples: int, batch_size: int, rows: int) -> list[int]:
    """Rows of every batch, with `rows` for each sample."""
    starts = range(0, samples, batch_size)
    return [rows * min(batch_size, samples - start) for start in starts]


# --- What backprop would do -----------------------------------------------------------------


def backprop_timeline(
    stage_seconds: list[float], micro_batches: int, batches: int
) -> list[list[tuple[float, float, str]]]:
    """Each rank's (start, end, "forward" or "backward") in pipelined backpropagation, computed.

    A batch goes up in parts (GPipe, arXiv 1811.06965) and must come down again before the weights
    change and the next one starts. stage_seconds: of a batch's work on each rank, a third of it
    forward, two thirds backward. With p equal ranks and m parts, (p - 1) / (m + p - 1) of the
    time is idle.
    """
    ranks = range(len(stage_seconds))
    rows, now = [[] for _ in ranks], 0.0
    for _ in range(batches):
        free = [now] * len(stage_seconds)
        for kind, share, order in (("forward", 1 / 3, ranks), ("backward", 2 / 3, ranks[::-1])):
            for _ in range(micro_batches):
                ready = 0.0
                for rank in order:
                    start = max(free[rank], ready)
                    free[rank] = ready = start + share * stage_seconds[rank] / micro_batches
                    rows[rank].append((start, ready, kind))
        now = max(free)
    return rows


# --- Processes ------------------------------------------------------------------------------


def torchrun_command(ranks: int, settings: Settings, *options: str) -> list[str]:
    """The command that trains in `ranks` processes of this machine.

    Ranks meet on the loopback address, whatever this machine's name resolves to.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    command += ["-m", "ff_utils.distributed", *options]
    for name, value in asdict(settings).items():
        many = value if isinstance(value, list | tuple) else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, many)]
    return command


def launch(ranks: int, settings: Settings, checkpoint: str | os.PathLike | None = None) -> dict:
    """Train in `ranks` fresh processes of this machine, one thread each; returns the record.

    They end with this process. RuntimeError with the reason where they fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        options = ["--record", str(record), "--end-with", str(os.getpid())]
        if checkpoint:
            options += ["--checkpoint", str(user_path(checkpoint))]
        done = subprocess.run(
            torchrun_command(ranks, settings, *options),
            cwd=ROOT,
            env=os.environ | RETURN_FREED_MEMORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return json.loads(record.read_text(encoding="utf-8"))
    lines = done.stderr.strip().splitlines() or ["no message"]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raise RuntimeError((reasons or lines)[-1])


def _end_with(ids: list[int]) -> None:
    """End this process once one of those with these ids has ended, however it ended."""
    try:
        processes = [psutil.Process(number) for number in ids]
        while all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            time.sleep(1)
    finally:
        os._exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Train as one of torchrun's ranks, or alone; the first one prints what came of it."""
    parser = argparse.ArgumentParser(prog="torchrun -m ff_utils.distributed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for field in fields(Settings):
        many = {"nargs": "+"} if field.name == "hidden" else {}
        kind = int if many else type(field.default)
        names = [field.name, *(old for old, new in OLD_NAMES.items() if new == field.name)]
        options = [f"--{name.replace('_', '-')}" for name in names]
        parser.add_argument(*options, type=kind, default=field.default, **many)
    parser.add_argument("--checkpoint", type=user_path, help="a folder to keep every epoch in")
    parser.add_argument("--record", type=user_path, help="a file for the record, as JSON")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    timeout_help = "seconds to wait for another rank"
    parser.add_argument("--timeout", "--patience", type=float, default=TIMEOUT, help=timeout_help)
    parser.add_argument("--end-with", type=int, help="id of a process not to outlive")
    if int(os.environ.get("RANK", 0)) > 0:
        parser.error = lambda _: sys.exit(2)  # the first rank says it
    given = parser.parse_args(arguments)
    try:
        settings = Settings(**{f.name: getattr(given, f.name) for f in fields(Settings)})
        check_number("threads", given.threads, 1, whole=True)
        check_number("timeout", given.timeout, 0, 1e6, above=True)
    except ValueError as error:
        parser.error(str(error))
    watched = [os.getppid()] if dist.is_torchelastic_launched() else []
    watched += [given.end_with] if given.end_with else []
    if watched:
        threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    torch.set_num_threads(given.threads)
    try:
        ranks = Ranks(given.timeout)
    except RuntimeError as error:
        parser.exit(1, f"error: the ranks did not all meet within {given.timeout:g} s: {error}\n")
    # torchrun ends the others when one is lost: let each find out which, and say so, first.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))
    try:
        record = train(settings, ranks, given.checkpoint)
        if record:
            _print(record)
            if given.record:
                write_text(given.record, json.dumps(record, indent=1) + "\n")
        ranks.broadcast()
    except RankLostError as error:
        again = "with --checkpoint FOLDER, a second start goes on from the last epoch"
        if given.checkpoint:
            again = f"the same command, on any number of ranks, goes on from {given.checkpoint}"
        ranks.end(f"{error}: {again}.", 1)
    except (ValueError, FloatingPointError, OSError, datasets.DataNotFoundError) as error:
        ranks.end(str(error), 2)
    except KeyboardInterrupt:
        os._exit(130)
    dist.destroy_process_group()


def _print(record: dict) -> None:
    last = record["epochs"][-1]
    print(f"test error {record['test_error']:.2%} by goodness, {last['seconds']:.2f} s an epoch")
    for rank, row in enumerate(record["ranks"]):
        layers, size = row["layers"], format_bytes(row["tensor_bytes"])
        peak = format_bytes(row["peak_bytes"])
        busy = "" if row["busy"] is None else f", busy {row['busy']:.0%} of the time"
        print(f"rank {rank}: layers {layers[0]} to {layers[-1]}, {size} ({peak} resident){busy}")


if __name__ == "__main__":
    main()
