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
import select
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

from ff_utils import process
from ff_utils.config import FFConfig, LayerConfig, TrainConfig
from ff_utils.data import DataNotFoundError, Dataset, load_dataset, test_batches
from ff_utils.ff.layers import FFLayer
from ff_utils.ff.negatives import random_negatives
from ff_utils.ff.network import EVALUATION_ROWS, ForwardForward, named_losses
from ff_utils.training import (
    batches,
    check_finite,
    check_fit,
    check_same_run,
    learning_rate,
    load_state,
    save_state,
)
from ff_utils.utils import (
    ROOT,
    check_ints,
    check_number,
    format_bytes,
    track,
    user_path,
    write_text,
)

IN_FLIGHT = 2  # batches that a rank has, or will have next, from the rank below
TIMED = 40  # batches whose times are recorded
TIMEOUT = 300.0  # seconds to wait for a neighbour


@dataclass(frozen=True)
class Settings:
    """What is learned: the same settings give the same weights on any number of ranks."""

    dataset: str = "auto"
    train_size: int = 0
    test_size: int = 0
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
        check_number("test_size", self.test_size, 0, whole=True)
        check_ints("hidden", self.hidden, 1)
        check_number("seed", self.seed, 0, 2**63 - 1, whole=True)
        self.configs()

    def configs(self) -> tuple[FFConfig, TrainConfig]:
        """Of the network, which has no classifier, and of its training."""
        names = ("label_scale", "threshold", "sharpness", "seed")
        network = FFConfig(classifier=False, **{name: getattr(self, name) for name in names})
        return network, TrainConfig(self.epochs, self.batch_size, self.learning_rate)


# --- Messages between neighbours ------------------------------------------------------------


class RankLostError(RuntimeError):
    """A neighbour has ended or does not answer."""


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
        self.sending = None  # activations under way, and their handle

    @contextmanager
    def _talk(self, other: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            silent = f"has not answered for {self.timeout:g} s"
            what = silent if "imed out" in str(error) else "has ended"
            raise RankLostError(f"rank {other} {what} before its work was done") from error

    def receive(self, total: int, rows: int, width: int) -> Iterator[torch.Tensor]:
        """`total` rows of activations (rows, width) from the rank below, `rows` at a time.

        The next ones arrive while some are in use, and take the memory of those before.
        """
        room = torch.empty(IN_FLIGHT, rows, width, device=self.device)
        coming, count = deque(), -(-total // rows)
        for number in range(count + IN_FLIGHT):
            if number >= IN_FLIGHT:
                h, work = coming.popleft()
                with self._talk(self.rank - 1):
                    work.wait()
                yield h
            if number < count:
                h = room[number % IN_FLIGHT, : total - number * rows]
                with self._talk(self.rank - 1):
                    coming.append((h, dist.irecv(h, self.rank - 1)))

    def send(self, h: torch.Tensor) -> None:
        """Send activations to the rank above, if there is one, once the last ones are there."""
        self.flush()
        if self.rank < self.size - 1:
            with self._talk(self.rank + 1):
                self.sending = (h, dist.isend(h, self.rank + 1))

    def flush(self) -> None:
        """Wait until what was sent has left."""
        if self.sending:
            with self._talk(self.rank + 1):
                self.sending[1].wait()
            self.sending = None

    def gather(self, value: object = None) -> list:
        """Every rank's `value`, on every rank; all have them at about the same time.

        Only neighbours talk, up the ranks and down again, so that it is known who is lost.
        """
        values = [*(self._receive_object(self.rank - 1) if self.rank > 0 else []), value]
        if self.rank < self.size - 1:
            self._send_object(values, self.rank + 1)
            values = self._receive_object(self.rank + 1)
        if self.rank > 0:
            self._send_object(values, self.rank - 1)
        return values

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


# --- A rank's layers ------------------------------------------------------------------------


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
    """One rank's layers of a `ForwardForward` network, under their numbers in the whole.

    The others are drawn, so that a seed means the same weights, and dropped one by one.
    data: the first rank's, which makes inputs of it; on the others on the device "meta".
    """

    def __init__(self, settings: Settings, ranks: Ranks, data: Dataset) -> None:
        self.mine = partition([data.pixels, *settings.hidden], ranks.size)[ranks.rank]
        sizes = (data.pixels, data.classes, list(settings.hidden))
        config, self.train_config = settings.configs()
        super().__init__(*sizes, config, device=ranks.device)
        self.ranks, self.data = ranks, data
        self.generator = torch.Generator().manual_seed(settings.seed)
        largest = max(layer.weight.numel() for layer in self.own_layers())
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

    def train_epoch(self, epoch: int) -> tuple[dict, dict]:
        """Train on every batch; returns the epoch's row and this rank's `busy` and `timeline`."""
        config, samples = self.train_config, len(self.data.train_labels)
        count = -(-samples // config.batch_size)
        self.ranks.gather()
        start = time.perf_counter()
        total, times = 0, []
        inputs = self._inputs(self._samples(), 2 * samples, 2 * config.batch_size)
        for number, h in enumerate(inputs):
            begun = time.perf_counter()
            rate = learning_rate(config, (epoch - 1) * count + number, config.epochs * count)
            positives, losses = len(h) // 2, []
            for layer in self.own_layers():
                h, loss = layer.step(h, positives, rate, self.grad_buffer)
                losses.append(loss)
            total = total + torch.stack(losses)
            if h.is_cuda and number < TIMED:
                torch.cuda.synchronize()
            times.append((begun - start, time.perf_counter() - start))
            self.ranks.send(h)
        self.ranks.flush()
        mean = named_losses((total / count).tolist(), first=self.mine.start + 1)
        check_finite(mean, epoch)
        gathered = self.ranks.gather(mean)
        row = {"epoch": epoch, "seconds": time.perf_counter() - start}
        busy = sum(end - begun for begun, end in times) / row["seconds"]
        for losses in gathered:
            row |= losses
        return row, {"busy": busy, "timeline": times[:TIMED]}

    def test_error(self) -> float | None:
        """Share of test images whose label with the most goodness, over all layers, is wrong.

        Images go up with every label at once; each rank adds its layers' goodness, and the first
        one, which alone knows the labels, the ranks' sums.
        """
        samples, classes = len(self.data.test_labels), self.classes
        each = max(1, min(EVALUATION_ROWS, 2 * self.train_config.batch_size) // classes)
        sums = []
        for h in self._inputs(self._tests(each), samples * classes, each * classes):
            total = 0
            for layer in self.own_layers():
                h = layer(h)
                total = total + layer.goodness_of(layer.normalise_(h))
            self.ranks.send(h)
            sums.append(total.view(-1, classes).cpu())
        self.ranks.flush()
        gathered = self.ranks.gather(torch.cat(sums))
        if self.ranks.rank > 0:
            return None
        return float((sum(gathered).argmax(1) != self.data.test_labels.cpu()).sum()) / samples

    def _inputs(self, own: Iterator[torch.Tensor], total: int, rows: int) -> Iterator[torch.Tensor]:
        """What the first layer here reads: `own`, or what the rank below sends."""
        if self.ranks.rank == 0:
            return own
        return self.ranks.receive(total, rows, self.own_layers()[0].in_features)

    def _samples(self) -> Iterator[torch.Tensor]:
        """What the first layer is trained on, half positive, half negative."""
        size = self.train_config.batch_size
        for images, labels in batches(self.data, size, self.generator):
            wrong = random_negatives(labels, self.classes, self.generator)
            yield self.encode(images.repeat(2, 1), torch.cat([labels, wrong]))

    def _tests(self, each: int) -> Iterator[torch.Tensor]:
        """`each` test images at a time, every one under every label."""
        every = torch.arange(self.classes, device=self.ranks.device)
        for images, _ in test_batches(self.data, each):
            labels = every.repeat(len(images))
            yield self.encode(images.repeat_interleave(self.classes, 0), labels)


def digest(layer: FFLayer) -> str:
    """Short SHA-256 of a layer's weights and optimizer state."""
    found = hashlib.sha256()
    for tensor in layer.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


# --- Training, and its checkpoints ----------------------------------------------------------


def train(settings: Settings, ranks: Ranks, checkpoint: Path | None = None) -> dict | None:
    """Train this rank's layers; on the first rank, returns the record of all.

    checkpoint: a folder that every epoch is kept in, and that a run goes on from: a file for each
        layer, so that any number of ranks can go on, and once all are there one for the run. A
        kill at any moment leaves a whole set: the last one goes only when the next is complete.
    The record: settings, device, threads, test_error (by goodness), `epochs` (a row each: epoch,
    seconds, loss_1 ...), `layers` (a SHA-256 of each layer's weights and optimizer state) and
    `ranks` (a row each: layers, tensor_bytes, peak_bytes of the process beyond what it had before
    there were layers, busy (share of the last epoch's time), timeline (start and end of the work
    on its first batches, in seconds from the epoch's start)).
    Raises ValueError for bad input before anything runs, RankLostError for a lost neighbour, and
    FloatingPointError where a loss stops being finite.
    """
    first, cuda, begin = ranks.rank == 0, ranks.device.type == "cuda", None
    if first:
        data, run = _prepare(settings, ranks, checkpoint)
        begin = (data.to("meta"), run)
    torch.ones(64, 64) @ torch.ones(64, 64)  # loads what any program loads
    torch.cuda.reset_peak_memory_stats() if cuda else process.reset_peak()
    before = 0 if cuda else psutil.Process().memory_info().rss
    sizes, run = ranks.gather(begin)[0]
    shard = LayerShard(settings, ranks, data if first else sizes)
    if run["epoch"]:
        for number in shard.mine:
            path, layer = checkpoint / f"epoch-{run['epoch']}.layer-{number}", shard.layers[number]
            layer.load_state_dict(load_state(path, ranks.device, tuple(layer.state_dict())))
        shard.generator.set_state(run["generator"])
    work = {"busy": None, "timeline": []}
    epochs = range(run["epoch"] + 1, settings.epochs + 1)
    ranks.gather()  # all are ready
    for epoch in track(epochs, "epoch", run["epoch"], settings.epochs) if first else epochs:
        row, work = shard.train_epoch(epoch)
        run |= {"epoch": epoch, "epochs": [*run["epochs"], row]}
        run |= {"generator": shard.generator.get_state()}
        if checkpoint:
            for number in shard.mine:
                state = shard.layers[number].state_dict()
                save_state(state, checkpoint / f"epoch-{epoch}.layer-{number}")
            ranks.gather()  # all are written
            if first:
                save_state(run, checkpoint / f"epoch-{epoch}.run")
                for path in [*checkpoint.glob("epoch-*"), *checkpoint.glob(".epoch-*")]:
                    if not path.name.startswith(f"epoch-{epoch}."):
                        path.unlink()
    error = shard.test_error()
    row = {
        "layers": [number + 1 for number in shard.mine],
        "tensor_bytes": sum(t.nbytes for t in [*shard.parameters(), *shard.buffers()]),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else process.peak_resident_bytes(),
        **work,
    }
    row["peak_bytes"] -= before
    gathered = ranks.gather((row, [digest(layer) for layer in shard.own_layers()]))
    if not first:
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


def _prepare(settings: Settings, ranks: Ranks, checkpoint: Path | None) -> tuple[Dataset, dict]:
    """On the first rank: load the data, refuse what does not fit it, and see what is done."""
    if ranks.size > len(settings.hidden):
        raise ValueError(
            f"hidden has {len(settings.hidden)} layers for {ranks.size} ranks; give at least one "
            "layer for each."
        )
    sizes = settings.train_size or None, settings.test_size or None
    data = load_dataset(settings.dataset, *sizes)
    check_fit(data, settings.configs()[1])
    given = asdict(settings) | {"hidden": list(settings.hidden)}
    given |= {"dataset": data.name, "checksum": data.checksum}
    run = {"epoch": 0, "epochs": []}
    if checkpoint:
        checkpoint.mkdir(parents=True, exist_ok=True)
        kept = [path for path in checkpoint.glob("epoch-*.run") if path.stem[6:].isdigit()]
        if kept:
            last = max(kept, key=lambda path: int(path.stem[6:]))
            run = load_state(last, parts=("epoch", "epochs", "generator", "settings"))
        check_same_run(checkpoint, run.get("settings", given), given)
    return data.to(ranks.device), run | {"settings": given}


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


def launch(ranks: int, settings: Settings, *options: str, threads: int = 1) -> dict:
    """Train in `ranks` fresh processes of this machine; returns the record.

    options: more of the command line's. threads: of each process. They end with this process.
    RuntimeError with the reason where they fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        options += ("--record", str(record), "--end-with", str(os.getpid()))
        options += ("--threads", str(threads))
        command = torchrun_command(ranks, settings, *options)
        # torchrun leaves a folder of its own in the temporary one.
        environment = os.environ | process.RETURN_FREED_MEMORY | {"TMPDIR": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(record.read_text(encoding="utf-8"))
    lines = done.stderr.strip().splitlines() or ["no message"]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raise RuntimeError((reasons or lines)[-1])


def _watch(ids: list[int]) -> None:
    """End this process with those of these ids, however they end, and 5 s after SIGTERM.

    torchrun ends the others so when a rank is lost: until then, each can find out which, and say
    so. A thread, as the main one may be waiting for a message, where Python handles no signal.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def watch() -> None:
        try:
            processes = [psutil.Process(number) for number in ids]
            while all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
                if select.select([reader], [], [], 1)[0]:
                    time.sleep(5)
                    break
        finally:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> None:
    """Train as one of torchrun's ranks, or alone; the first one prints what came of it."""
    parser = argparse.ArgumentParser(prog="torchrun -m ff_utils.distributed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for field in fields(Settings):
        kind = {"type": type(field.default)}
        if field.name == "hidden":
            kind = {"type": int, "nargs": "+"}
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, default=field.default, **kind)
    parser.add_argument("--checkpoint", type=user_path, help="a folder to keep every epoch in")
    parser.add_argument("--record", type=user_path, help="a file for the record, as JSON")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    help_timeout = "seconds to wait for another rank"
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help=help_timeout)
    parser.add_argument("--end-with", type=int, help="id of a process not to outlive")
    if int(os.environ.get("RANK", 0)) > 0:
        parser.error = lambda _: sys.exit(2)  # the first rank says it
    given = parser.parse_args(arguments)
    try:
        settings = Settings(**{f.name: getattr(given, f.name) for f in fields(Settings)})
        check_number("threads", given.threads, 1, whole=True)
        check_number("timeout", given.timeout, 0, 1e6, above=True)
        if given.record and given.record.is_dir():
            raise ValueError(f"--record is {given.record}, a folder: give a file.")
        if given.checkpoint and given.checkpoint.exists() and not given.checkpoint.is_dir():
            raise ValueError(f"--checkpoint is {given.checkpoint}, a file: give a folder.")
    except ValueError as error:
        parser.error(str(error))
    if dist.is_torchelastic_launched():
        _watch([os.getppid(), given.end_with or os.getppid()])
    torch.set_num_threads(given.threads)
    try:
        ranks = Ranks(given.timeout)
    except RuntimeError as error:
        parser.exit(1, f"error: the ranks did not all meet within {given.timeout:g} s: {error}\n")
    try:
        record = train(settings, ranks, given.checkpoint)
        if record:
            _print(record)
            if given.record:
                write_text(given.record, json.dumps(record, indent=1) + "\n")
        ranks.gather()
    except RankLostError as error:
        again = "with --checkpoint FOLDER, a second start goes on from the last epoch"
        if given.checkpoint:
            again = f"the same command, on any number of ranks, goes on from {given.checkpoint}"
        ranks.end(f"{error}: {again}.", 1)
    except (ValueError, FloatingPointError, OSError, DataNotFoundError) as error:
        ranks.end(str(error), 2)
    except KeyboardInterrupt:
        os._exit(130)
    dist.destroy_process_group()


def _print(record: dict) -> None:
    last = record["epochs"][-1]
    print(f"test error {record['test_error']:.2%} by goodness, {last['seconds']:.2f} s an epoch")
    for rank, row in enumerate(record["ranks"]):
        size, peak = format_bytes(row["tensor_bytes"]), format_bytes(row["peak_bytes"])
        busy = "" if row["busy"] is None else f", busy {row['busy']:.0%} of the time"
        print(f"rank {rank}: layers {row['layers']}, {size} ({peak} resident){busy}")


if __name__ == "__main__":
    main()
