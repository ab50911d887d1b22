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
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context, parent_process

import numpy as np
import pandas as pd
import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ff_utils import process
from ff_utils.memory import formulas
from ff_utils.memory.arms import ARMS, LEANEST, ONE_LAYER, OPTIMIZERS, PRECISIONS, Sizes
from ff_utils.memory.steps import build
from ff_utils.memory.tracker import CATEGORIES, device_bytes
from ff_utils.utils import (
    ROOT,
    check_choice,
    check_number,
    default_device,
    format_bytes,
    time_alternately,
    track,
)

INSTRUMENTS = ("simulated", "tracked", "rss", "cuda")
MANY_LAYERS = 300  # simulations of so many layers are worth the start of more processes
PROBES = (1600, 3200)  # rows at which the saving map is simulated
_simulated: dict[tuple[str, Sizes], "Report"] = {}  # what this process knows already


class DoesNotFitError(ValueError):
    """A step needs more memory than is free."""


@dataclass
class Report:
    """Peak bytes of one arm's training step and evaluation under one instrument.

    Peaks are the device's; `host_bytes` are kept beside it and `moved_bytes` travel in a step.
    predicted_bytes: by the formula, for arms that have one. What an instrument cannot know is
    None; `error` says why a run that died gave no number.
    """

    arm: str
    depth: int
    hidden: int
    batch: int
    instrument: str
    peak_bytes: int | None
    predicted_bytes: int | None
    optimizer: str = "adam"
    precision: str = "float32"
    breakdown: dict[str, int] | None = None
    evaluation_peak_bytes: int | None = None
    host_bytes: int | None = None
    moved_bytes: int | None = None
    step_seconds: float | None = None
    error: str = ""


# --- One point ------------------------------------------------------------------------------


def measure(
    arm: str,
    *,
    depth: int,
    hidden: int,
    batch: int,
    optimizer: str = "adam",
    precision: str = "float32",
    instrument: str = "simulated",
    override: bool = False,
) -> Report:
    """Measure one arm. `rss` and `cuda` run in a fresh process of their own.

    Raises DoesNotFitError before anything runs where a real instrument would need more memory
    than is free, unless `override`. A process that dies (out of memory, killed) gives a report
    with `error`, not an exception.
    """
    sizes = Sizes(depth, hidden, batch, optimizer, precision)
    _check(arm, instrument)
    if instrument == "simulated":
        return simulate(arm, sizes)
    if not override:
        _refuse_what_does_not_fit(arm, sizes, instrument)
    report = _report(arm, sizes, instrument)
    if instrument == "tracked" and not override:
        return _count(report, sizes)
    options = ["--here", "--json", "--instrument", instrument, "--arm", arm]
    for name in ("depth", "hidden", "batch", "optimizer", "precision"):
        options += [f"--{name}", str(getattr(sizes, name))]
    output, report.error = run_module("ff_utils.memory", options, process.RETURN_FREED_MEMORY)
    return report if report.error else Report(**json.loads(output))


def simulate(arm: str, sizes: Sizes) -> Report:
    """What a step needs, without doing it; each point once in a process."""
    key = arm, replace(sizes, device="cpu", store="memory")
    if key not in _simulated:
        _simulated[key] = _count(_report(arm, sizes, "simulated"), key[1])
    return replace(_simulated[key])


def timeline(
    arm: str, *, depth: int, hidden: int, batch: int, optimizer: str = "adam"
) -> list[tuple[str, dict[str, int]]]:
    """Live bytes by category after every operation of one training step, simulated."""
    _check(arm, "simulated")
    with FakeTensorMode():
        return build(arm, Sizes(depth, hidden, batch, optimizer)).track().timeline


def _check(arm: str, instrument: str) -> None:
    check_choice("instrument", instrument, INSTRUMENTS)
    check_choice("arm", arm, ARMS)
    if instrument == "cuda" and not torch.cuda.is_available():
        raise ValueError("instrument is 'cuda', but there is no CUDA device; use 'simulated'.")


def _report(arm: str, s: Sizes, instrument: str) -> Report:
    predicted = formulas.predict(arm, s)
    if instrument == "rss" and predicted is not None:
        predicted += _host_in_memory(arm, s)
    sizes = {"depth": s.depth, "hidden": s.hidden, "batch": s.batch}
    kind = {"optimizer": s.optimizer, "precision": s.precision}
    return Report(
        arm, **sizes, **kind, instrument=instrument, peak_bytes=None, predicted_bytes=predicted
    )


def _host_in_memory(arm: str, s: Sizes) -> int:
    """Bytes on the host that stay in memory even where offloaded layers are in files."""
    return simulate(arm, s).host_bytes if "offload" in ARMS[arm].remedies else 0


def _count(report: Report, s: Sizes) -> Report:
    simulated = report.instrument == "simulated"
    try:
        with FakeTensorMode() if simulated else nullcontext():
            step = build(report.arm, s)
            before = step.moved()
            tracker = step.track()
            report.moved_bytes = (step.moved() - before) // 2  # of one of two equal steps
            report.peak_bytes = tracker.peak_bytes
            report.breakdown = {category: tracker.peak[category] for category in CATEGORIES}
            report.host_bytes = tracker.peak_host_bytes
            with tracker:
                tracker.restart()
                step.evaluate()
            report.evaluation_peak_bytes = tracker.peak_bytes
    except (MemoryError, RuntimeError) as error:
        if simulated or not is_out_of_memory(error):
            raise
        report.error = f"out of memory: {str(error).splitlines()[0]}"
    return report


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; PyTorch's own is a RuntimeError."""
    return isinstance(error, MemoryError) or "memory" in str(error).lower()


def _refuse_what_does_not_fit(arm: str, s: Sizes, instrument: str) -> None:
    needed = simulate(arm, s)
    device, host = needed.peak_bytes, needed.host_bytes
    if instrument == "cuda":
        _refuse_beyond(device, torch.cuda.mem_get_info()[0], f"{arm} needs on the device")
        _refuse_beyond(host, psutil.virtual_memory().available, f"{arm} needs on the host")
        return
    in_memory = _host_in_memory(arm, s) if instrument == "rss" else host
    _refuse_beyond(device + in_memory, psutil.virtual_memory().available, f"{arm} needs")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    _refuse_beyond(host - in_memory, free, f"{arm} needs in temporary files")


def _refuse_beyond(need: int, free: int, what: str) -> None:
    if need > free:
        raise DoesNotFitError(
            f"{what} {format_bytes(need)} and {format_bytes(free)} are free: lower depth, hidden "
            "or batch, take the simulated instrument, or override this check."
        )


# --- Processes ------------------------------------------------------------------------------


def run_module(module: str, options: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """Run a module of the package in a fresh process; its output, and why it died or ""."""
    # The folder is made here, so that it goes even when the process that fills it is killed.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", module, *options],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | environment | {"TMPDIR": folder},
            check=False,
        )
    if done.returncode == 0:
        return done.stdout, ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == -9:
        last = "killed, most often for lack of memory"
    return "", f"ended with status {done.returncode}: {last}"


def _measure_process(report: Report, s: Sizes) -> Report:
    """Measure this process from outside: resident memory, less what it had before."""
    # Load what any program loads (thread pools, kernels) before the baseline is read.
    build("backprop", replace(s, depth=2, hidden=64, batch=64)).train()
    baseline = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        step = build(report.arm, replace(s, store=folder))
        step.train()
        can_reset = process.reset_peak()
        before, start = step.moved(), time.perf_counter()
        step.train()
        report.peak_bytes = process.peak_resident_bytes() - baseline
        report.step_seconds = time.perf_counter() - start
        report.moved_bytes = step.moved() - before
        if can_reset:
            process.reset_peak()
            step.evaluate()
            report.evaluation_peak_bytes = process.peak_resident_bytes() - baseline
    return report


def _share(function: Callable, points: list[tuple], layers: int, what: str) -> list:
    """`function` of all points in order, by all cores where they are many."""
    main = sys.modules["__main__"]
    is_script = main.__spec__ is None and hasattr(main, "__file__")  # each process would run it
    if is_script or (layers < MANY_LAYERS and not _workers.cache_info().currsize):
        return [function(*points[number]) for number in track(range(len(points)), what)]
    futures = [_workers().submit(function, *point) for point in points]
    try:
        return [futures[number].result() for number in track(range(len(points)), what)]
    except BaseException:
        _workers().shutdown(wait=False, cancel_futures=True)
        _workers.cache_clear()
        raise


@cache
def _workers() -> ProcessPoolExecutor:
    """Processes that stay, because one takes as long to start as many simulations."""
    return ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Leave signals of the terminal to the parent, and end once it is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- Many points ----------------------------------------------------------------------------


def measure_grid(
    arms: Sequence[str],
    depths: Sequence[int],
    *,
    hidden: int,
    batch: int | None = None,
    images: int | None = None,
    optimizer: str = "adam",
    instruments: Sequence[str] = ("simulated",),
) -> pd.DataFrame:
    """Measure every arm at every depth with every instrument; one row a report.

    Steps are of as many `images`, of which FF makes two rows each, or of `batch` rows. Columns
    beside a report's: images, total_bytes (device and host).

    Many simulations are shared by all cores, before anything real runs. The breakdown's categories
    are columns, in bytes. What does not fit, or dies, is a row whose `error` says why; the others
    are measured all the same.
    """
    for arm, instrument in product(arms, instruments):
        _check(arm, instrument)
    if (batch is None) == (images is None):
        raise ValueError("give either batch, the rows of a step, or images.")
    rows = {arm: batch if images is None else ARMS[arm].rows(images) for arm in arms}
    kind = {"hidden": hidden, "optimizer": optimizer}
    points = [
        (arm, Sizes(depth=depth, batch=rows[arm], **kind)) for arm in arms for depth in depths
    ]
    simulate_all(points)
    points = list(product(instruments, arms, depths))
    real = sum(instrument != "simulated" for instrument, *_ in points)
    reports = []
    for instrument, arm, depth in track(points, "point") if real else points:
        sizes = {"depth": depth, "batch": rows[arm], **kind}
        try:
            report = measure(arm, **sizes, instrument=instrument)
        except DoesNotFitError as error:
            report = _report(arm, Sizes(**sizes), instrument)
            report.error = str(error)
        row = asdict(report) | {"images": ARMS[arm].images(rows[arm])}
        reports.append(row | (row.pop("breakdown") or {}))
    table = pd.DataFrame(reports)
    return table.assign(total_bytes=table.peak_bytes + table.host_bytes)


def extended(table: pd.DataFrame, depth: int) -> pd.DataFrame:
    """The rows of a grid of two depths, and each arm at `depth`, on the line through its two.

    For arms whose peaks grow evenly with depth; what is no number stays that of the deeper one.
    """
    if depth in set(table.depth):
        return table
    shallow, deep = (rows.set_index("arm") for _, rows in table.groupby("depth"))
    numbers = shallow.select_dtypes("number").columns
    layers = (depth - deep.depth) / (deep.depth - shallow.depth)
    slopes = deep[numbers] - shallow[numbers]
    sizes = (deep[numbers] + slopes.mul(layers, axis=0)).round().astype(deep[numbers].dtypes)
    further = deep.assign(**sizes)
    return pd.concat([table, further.reset_index()[table.columns]], ignore_index=True)


def simulate_all(points: list[tuple[str, Sizes]]) -> None:
    """Simulate these points, so that `simulate` knows them."""
    points = [point for point in dict.fromkeys(points) if point not in _simulated]
    layers = sum(sizes.depth for _, sizes in points)
    reports = _share(simulate, points, layers, "simulation")
    for point, report in zip(points, reports, strict=True):
        _simulated[point] = report


def beside_simulated(real: pd.DataFrame) -> pd.DataFrame:
    """The rows of a grid that were measured for real, with what each should be by its simulated
    row: `expected_bytes`. In a CPU's process offloaded activations stay in memory, layers do not.
    """
    where = ["arm", "depth"]
    simulated = real[real.instrument == "simulated"].set_index(where)[["peak_bytes", "host_bytes"]]
    measured = real[real.instrument.ne("simulated") & real.error.eq("")]
    measured = measured.join(simulated.add_prefix("simulated_"), on=where)
    offload = [name for name, arm in ARMS.items() if "offload" in arm.remedies]
    stays = measured.instrument.eq("rss") & measured.arm.isin(offload)
    host = measured.pop("simulated_host_bytes").where(stays, 0)
    return measured.assign(expected_bytes=measured.pop("simulated_peak_bytes") + host)


def saving_map(
    lean: Sequence[str],
    others: Sequence[str],
    depths: Sequence[int],
    batches: Sequence[int],
    hidden: int,
    optimizer: str = "adam",
) -> pd.DataFrame:
    """The smallest peak of each group of arms at every depth and batch, which counts images.

    The bytes after each operation are a constant and so much a row, so that two simulated batches
    give those of any other (parts of a batch, whose rows are rounded up, nearly).
    Columns: depth, batch, lean, other (bytes), saved (the share that `lean` saves).
    """
    points = [(a, d, hidden, optimizer) for a in dict.fromkeys([*lean, *others]) for d in depths]
    layers = 2 * sum(depth for _, depth, *_ in points)
    computed = _share(_bytes_by_batch, points, layers, "simulation")
    lines = {point[:2]: line for point, line in zip(points, computed, strict=True)}
    rows = []
    for depth, batch in product(depths, batches):

        def least(arms: Sequence[str], depth: int = depth, batch: int = batch) -> float:
            return min((lines[arm, depth] @ [1, ARMS[arm].rows(batch)]).max() for arm in arms)

        rows.append({"depth": depth, "batch": batch, "lean": least(lean), "other": least(others)})
    table = pd.DataFrame(rows).astype(int)
    return table.assign(saved=1 - table.lean / table.other)


def _bytes_by_batch(arm: str, depth: int, hidden: int, optimizer: str) -> np.ndarray:
    """Live bytes after each operation: a constant, and what a row adds: (operations, 2)."""
    sizes = {"depth": depth, "hidden": hidden, "optimizer": optimizer}
    few, many = (
        [device_bytes(live) for _, live in timeline(arm, batch=rows, **sizes)] for rows in PROBES
    )
    return np.linalg.solve([[1, rows] for rows in PROBES], [few, many]).T


def memory_metrics(hidden: int = 2000, images: int = 5000, depth: int = 47) -> dict[str, float]:
    """What the ledger of claims asks of memory, simulated; by default at the first study's sizes.

    Both sides have steps of as many images, but for the first study's own systems (`seed_...` and
    `recurrent_...`), which have as many rows, as that study counts. What one more layer adds does
    not depend on depth: it is read off 7 and 8 layers, of the recurrent network off 2 and 3.
    """

    def per_image(arm: str, layers: int = depth, optimizer: str = "adam") -> Report:
        return simulate(arm, Sizes(layers, hidden, ARMS[arm].rows(images), optimizer))

    def per_row(arm: str, layers: int = depth) -> Report:
        return simulate(arm, Sizes(layers, hidden, images))

    def device(report: Report) -> int:
        return report.peak_bytes

    def both(report: Report) -> int:
        return report.peak_bytes + report.host_bytes

    def activations(report: Report) -> int:
        return report.breakdown["activations"]

    def a_layer(arm: str, size: Callable[[Report], int]) -> int:
        return size(per_image(arm, 8)) - size(per_image(arm, 7))

    def leanest(arms: Sequence[str], size: Callable = device, optimizer: str = "adam") -> Report:
        return min((per_image(arm, optimizer=optimizer) for arm in arms), key=size)

    def saved(ours: Report, theirs: Report, size: Callable[[Report], int] = device) -> float:
        return 1 - size(ours) / size(theirs)

    def seed_saved(other: str, layers: int = depth) -> float:
        return saved(per_row("ff_seed", layers), per_row(other, layers))

    def recurrent(layers: int) -> float:
        two, three = (device(per_row("ff_recurrent", near)) for near in (2, 3))
        peak = two + (layers - 2) * (three - two)
        return peak / device(per_row("backprop_seed", layers))

    leanest_arms = [*LEANEST["ff"], *LEANEST["backprop"], "backprop"]
    one_layer_arms = [*ONE_LAYER["ff"], *ONE_LAYER["backprop"], "backprop_frugal"]
    points = [(arm, "sgd") for arm in leanest_arms]
    points += [(arm, "adam") for arm in (*leanest_arms, *one_layer_arms)]
    simulate_all([(a, Sizes(depth, hidden, ARMS[a].rows(images), o)) for a, o in points])
    shallow, deep = per_row("ff_seed", 2), per_row("ff_seed")
    ff, plain = per_image("ff_resident"), per_image("backprop")
    streamed = per_image("ff_streamed")
    streamed_1000 = device(streamed) + (1000 - depth) * a_layer("ff_streamed", device)
    ff_one, backprop_one = (leanest(ONE_LAYER[side]) for side in ("ff", "backprop"))
    remedies = per_image("backprop_frugal")
    ff_in_total = leanest(LEANEST["ff"], both)
    backprop_in_total = leanest((*LEANEST["backprop"], "backprop_frugal"), both)
    metrics = {
        "seed_saved_at_47_layers": seed_saved("backprop_seed"),
        "seed_saved_against_plain": seed_saved("backprop"),
        # A ratio of two peaks that grow evenly with depth is largest and smallest at the ends.
        "seed_most_saved": max(seed_saved("backprop_seed", layers) for layers in (2, depth)),
        "seed_bytes_a_layer": device(deep) - device(per_row("ff_seed", depth - 1)),
        "seed_growth": device(deep) - device(shallow),
        "seed_shallow": device(shallow),
        "seed_shallow_evaluation": shallow.evaluation_peak_bytes,
        "recurrent_over_backprop": min(recurrent(layers) for layers in (2, depth)),
        "saved_at_47_layers": saved(ff, plain),
        "saved_as_trained": saved(per_image("ff_hard_negatives_recomputed"), plain),
        "saved_against_remedies": saved(leanest(LEANEST["ff"]), remedies),
        "saved_in_total": saved(ff_in_total, backprop_in_total, both),
        "remedies_total_over_ff": both(remedies) / both(ff),
        "layerwise_over_floor": device(per_image("ff_layerwise")) / _one_layer(hidden, images),
        "streamed_over_floor": device(streamed) / _one_layer(hidden, images),
        "streamed_1000_over_2_layers": streamed_1000 / device(per_image("ff_streamed", 2)),
        "one_layer_device_backprop_over_ff": device(backprop_one) / device(ff_one),
        "one_layer_host_backprop_over_ff": backprop_one.host_bytes / ff_one.host_bytes,
        "one_layer_total_backprop_over_ff": both(backprop_one) / both(ff_one),
        "activations_a_layer": a_layer("ff_resident", activations),
        "activations_a_layer_as_trained": a_layer("ff_hard_negatives_recomputed", activations),
        "activations_a_layer_stored": a_layer("ff_hard_negatives", activations),
        "autograd_bytes_a_layer": a_layer("ff_autograd", device),
    }
    for name in ("adam", "sgd"):
        strongest = (leanest(LEANEST[side], optimizer=name) for side in ("ff", "backprop"))
        metrics[f"saved_against_strongest_{name}"] = saved(*strongest)
        two = (per_image(arm, optimizer=name) for arm in ("ff_resident", "backprop"))
        metrics[f"saved_against_plain_{name}"] = saved(*two)
    return metrics


def _one_layer(hidden: int, images: int) -> int:
    """Bytes that no training of a layer by Adam can go below: its weights, gradient and moments,
    the input and the output of a batch's positive and negative rows."""
    return 4 * (4 * (hidden + 1) * hidden + 2 * (2 * images * hidden))


# --- Time -----------------------------------------------------------------------------------


def time_steps(
    arms: Sequence[str], *, depth: int, hidden: int, images: int, repeats: int
) -> pd.DataFrame:
    """Seconds of a training step of every arm on `images` images, timed alternately, `repeats`
    times.

    Columns: arm, seconds (median), fastest, slowest, images, per_1000_images (seconds), moved_bytes
    (between host and device, a step), peak_bytes and host_bytes (simulated). On a CPU, offloaded
    layers are in files.
    """
    check_number("repeats", repeats, 1, whole=True)
    device = default_device()
    for arm in arms:
        _check(arm, "tracked")
    sizes = {arm: Sizes(depth, hidden, ARMS[arm].rows(images), device=device) for arm in arms}
    reports = {arm: simulate(arm, s) for arm, s in sizes.items()}
    need = sum(report.peak_bytes for report in reports.values())
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        need += sum(_host_in_memory(arm, s) for arm, s in sizes.items())
        free = psutil.virtual_memory().available
    _refuse_beyond(need, free, "all arms together need")
    with ExitStack() as folders:
        tasks, moved = {}, {}
        for arm, s in sizes.items():
            folder = folders.enter_context(tempfile.TemporaryDirectory())
            step = build(arm, replace(s, store=folder if device == "cpu" else "memory"))
            step.train()
            task = partial(finish, step.timed or step.train, device)
            task()
            before = step.moved()
            task()
            tasks[arm], moved[arm] = task, step.moved() - before
        seconds = time_alternately(tasks, repeats)
        del step, task, tasks
    table = seconds.agg(["median", "min", "max"]).T
    table.columns = ["seconds", "fastest", "slowest"]
    table = table.rename_axis("arm").reset_index()
    return table.assign(
        images=images,
        per_1000_images=1000 * table.seconds / images,
        moved_bytes=table.arm.map(moved),
        peak_bytes=[report.peak_bytes for report in reports.values()],
        host_bytes=[report.host_bytes for report in reports.values()],
    )


def finish(work: Callable[[], object], device: str) -> None:
    """Do `work` and return once the device is done with it."""
    work()
    if device == "cuda":
        torch.cuda.synchronize()


# --- Command line ---------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Print one arm's report as a table, or as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.memory", description=main.__doc__)
    parser.add_argument("--arm", default="backprop", help=", ".join(ARMS))
    parser.add_argument("--depth", type=int, default=7, help="hidden layers")
    parser.add_argument("--hidden", type=int, default=2000, help="units in each")
    parser.add_argument("--batch", type=int, default=5000, help="rows in a step")
    parser.add_argument("--optimizer", default="adam", help=", ".join(OPTIMIZERS))
    parser.add_argument("--precision", default="float32", help=", ".join(PRECISIONS))
    parser.add_argument("--instrument", default="simulated", help=", ".join(INSTRUMENTS))
    parser.add_argument("--json", action="store_true", help="one JSON object, in bytes")
    parser.add_argument(
        "--override", action="store_true", help="run even what is predicted not to fit"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    as_json, here = options.pop("json"), options.pop("here")
    try:
        with _still_at_work(f"{options['arm']}, {options['depth']} layers"):
            report = _measure_here(**options) if here else measure(**options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130)
    if as_json:
        print(json.dumps(asdict(report)))
    elif report.error:
        parser.exit(1, f"error: {report.arm} gave no number: {report.error}\n")
    else:
        print(_table(report))


def _measure_here(arm: str, instrument: str, override: bool, **sizes: object) -> Report:
    """The fresh process that `measure` started."""
    _check(arm, instrument)
    s = Sizes(**sizes)
    report = _report(arm, s, instrument)
    if instrument != "cuda":
        return (_count if instrument == "tracked" else _measure_process)(report, s)
    from ff_utils.memory.gpu import measure_here

    row = measure_here(arm, replace(s, device="cuda"))
    report.step_seconds = row.pop("seconds", None)
    return replace(report, **{k: v for k, v in row.items() if k in asdict(report)})


@contextmanager
def _still_at_work(what: str) -> Iterator[None]:
    """Say every ten seconds on a terminal, or whatever stands for it, that this still runs."""
    done, start = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not done.wait(10):
            spent = time.perf_counter() - start
            print(f"{what}: {spent:.0f} s so far", file=sys.stderr, flush=True)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _table(report: Report) -> str:
    """A report as lines of text."""
    sizes = {name.replace("_", " "): size for name, size in (report.breakdown or {}).items()}
    sizes["training peak"] = report.peak_bytes
    sizes["evaluation peak"] = report.evaluation_peak_bytes
    sizes["on the host"] = report.host_bytes
    sizes["moved in a step"] = report.moved_bytes
    formula = {"training peak": report.predicted_bytes}
    table = pd.DataFrame({report.instrument: sizes, "formula": formula}, sizes, dtype=float)
    lines = table.to_string(na_rep="-", formatters=[format_bytes] * 2, col_space=10)
    head = f"{report.arm}: {report.depth} layers of {report.hidden} units, {report.batch} rows, "
    head += f"{report.optimizer}, {report.precision} ({report.instrument})"
    return f"{head}\n\n{lines}"
