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
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ff_utils import checks, closed_form, paths, progress
from ff_utils.arms import ARMS, Arm
from ff_utils.closed_form import Setting
from ff_utils.live_bytes import CATEGORIES, LiveBytes, format_bytes

MANY_POINTS = 50  # of a sweep: so many are worth the start of more processes
INSTRUMENTS = ("simulated", "tracked", "rss", "cuda")
# Have the C library give freed blocks back to the system at once, so that a process's peak is
# what it needed and not what its allocator kept.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class DoesNotFitError(ValueError):
    """More memory is predicted to be needed than is free."""


@dataclass
class Report:
    """Peak bytes of one arm's training step and evaluation under one instrument.

    Peaks are the device's; `host_bytes` rest beside it and `moved_bytes` travel in a step. What
    an instrument cannot tell is None; `error` says why a run that died gave no number.
    """

    arm: str
    depth: int
    hidden: int
    batch: int
    instrument: str
    peak_bytes: int | None
    predicted_bytes: int
    optimizer: str = "adam"
    precision: str = "float32"
    breakdown: dict[str, int] | None = None
    evaluation_peak_bytes: int | None = None
    host_bytes: int | None = None
    moved_bytes: int | None = None
    step_seconds: float | None = None
    error: str = ""


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

    Raises DoesNotFitError before anything runs where the real instruments would need more
    memory than is free, unless `override`. A process that dies (out of memory, killed) gives
    a report with `error`, not an exception.
    """
    s = Setting(depth, hidden, batch, optimizer, precision)
    predicted = _check(arm, s, instrument)
    if instrument != "simulated" and not override:
        _refuse_what_does_not_fit(arm, s, instrument)
    report = Report(arm, depth, hidden, batch, instrument, None, predicted, optimizer, precision)
    if instrument == "simulated" or (instrument == "tracked" and not override):
        return _count(report, s)
    return _in_fresh_process(report)


def sweep(
    arms: Sequence[str],
    depths: Sequence[int],
    *,
    hidden: int,
    batch: int,
    instruments: Sequence[str] = ("simulated",),
) -> pd.DataFrame:
    """Measure every arm at every depth with every instrument; one row a report.

    Many simulated points, which nothing disturbs, are shared by all cores; give "simulated" first.
    The breakdown's categories are columns, in bytes. What does not fit, or dies, is a row whose
    `error` says why; the others are measured all the same.
    """
    points = [(i, arm, depth) for i in instruments for arm in arms for depth in depths]
    with ExitStack() as stack:
        jobs = [
            partial(measure, arm, depth=depth, hidden=hidden, batch=batch, instrument=instrument)
            for instrument, arm, depth in points
        ]
        if sum(i == "simulated" for i, *_ in points) >= MANY_POINTS:
            pool = stack.enter_context(ProcessPoolExecutor(mp_context=get_context("spawn")))
            jobs = [
                pool.submit(job).result if i == "simulated" else job
                for job, (i, *_) in zip(jobs, points, strict=True)
            ]
        return _rows(points, jobs, hidden, batch)


def _rows(points: list[tuple], jobs: list[Callable], hidden: int, batch: int) -> pd.DataFrame:
    rows = []
    for number in progress.track(range(len(points)), "point"):
        instrument, arm, depth = points[number]
        try:
            report = jobs[number]()
        except DoesNotFitError as error:
            predicted = _check(arm, Setting(depth, hidden, batch), instrument)
            report = Report(arm, depth, hidden, batch, instrument, None, predicted)
            report.error = str(error)
        row = asdict(report)
        rows.append(row | (row.pop("breakdown") or {}))
    return pd.DataFrame(rows)


def timeline(arm: str, *, depth: int, hidden: int, batch: int) -> list[tuple[str, dict[str, int]]]:
    """Live bytes by category after every operation of one training step, simulated."""
    s = Setting(depth, hidden, batch)
    _check(arm, s, "simulated")
    with FakeTensorMode():
        live = watch_step(ARMS[arm].build(s))
    return live.timeline


def time_steps(
    arms: Sequence[str], *, depth: int, hidden: int, batch: int, repeats: int
) -> pd.DataFrame:
    """Seconds of a training step of every arm, all measured in turn, `repeats` times.

    The arms run as `progress.take_turns` has them. Columns: arm, seconds (median), fastest,
    slowest, images (a step's: half of FF's rows are positive), per_1000_images (seconds),
    moved_bytes (between host and device, a step), peak_bytes and host_bytes (simulated). On a
    CPU, what rests on the host rests in files.
    """
    checks.number("repeats", repeats, 1, whole=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    s = Setting(depth, hidden, batch, device=device)
    for arm in arms:
        _check(arm, s, "tracked")
    if device == "cuda":
        need, free = sum(closed_form.peak(arm, s) for arm in arms), torch.cuda.mem_get_info()[0]
    else:
        need = sum(closed_form.peak(arm, s) + closed_form.host_in_memory(arm, s) for arm in arms)
        free = free_memory()
    _refuse_beyond(need, free, "all arms together need")
    with ExitStack() as folders:
        steps, moved = {}, {}
        for name in arms:
            folder = folders.enter_context(tempfile.TemporaryDirectory())
            arm = ARMS[name].build(replace(s, store=folder if device == "cpu" else "memory"))
            steps[name] = arm.timed or arm.train
            arm.train()
            steps[name]()
            before = arm.moved()
            steps[name]()
            moved[name] = arm.moved() - before
            wait_for(device)
        tasks = {name: partial(_timed, step, device) for name, step in steps.items()}
        seconds = progress.take_turns(tasks, repeats)
        tasks.clear()
        steps.clear()
    rows = []
    for name in arms:
        report = measure(name, depth=depth, hidden=hidden, batch=batch)
        rows.append(
            {
                "arm": name,
                "seconds": seconds[name].median(),
                "fastest": seconds[name].min(),
                "slowest": seconds[name].max(),
                "images": (images := batch if name.startswith("backprop") else batch // 2),
                "per_1000_images": 1000 * seconds[name].median() / images,
                "moved_bytes": moved[name],
                "peak_bytes": report.peak_bytes,
                "host_bytes": report.host_bytes,
            }
        )
    return pd.DataFrame(rows)


def _timed(step: Callable[[], object], device: str) -> None:
    step()
    wait_for(device)


def leanest_by_batch(
    lean: Sequence[str],
    others: Sequence[str],
    depths: Sequence[int],
    batches: Sequence[int],
    hidden: int,
) -> pd.DataFrame:
    """The smallest peak of each group of arms at every depth and batch, by the closed form.

    Columns: depth, batch, lean, other (bytes), saved (the share that `lean` saves).
    """
    rows = []
    for depth, batch in product(depths, batches):
        s = Setting(depth, hidden, batch)
        a, b = (min(closed_form.peak(arm, s) for arm in arms) for arms in (lean, others))
        rows.append({"depth": depth, "batch": batch, "lean": a, "other": b, "saved": 1 - a / b})
    return pd.DataFrame(rows)


def crossing(lean: str, other: str, deepest: int, *, hidden: int, batch: int) -> int | None:
    """The first depth from 2 on at which `lean` needs less than `other`, by the closed form."""
    for depth in range(2, deepest + 1):
        s = Setting(depth, hidden, batch)
        if closed_form.peak(lean, s) < closed_form.peak(other, s):
            return depth
    return None


def watch_step(arm: Arm) -> LiveBytes:
    """Run one step unwatched (it makes the optimizer's state), then one watched.

    The result's `peak`, `peak_bytes`, `most_on_host` and `timeline` tell of the second.
    """
    arm.train()
    live = LiveBytes()
    arm.watch(live)
    with live:
        live.restart()
        arm.train()
    return live


def _check(arm: str, s: Setting, instrument: str) -> int:
    """Refuse what does not exist; the closed form's bytes."""
    checks.one_of("instrument", instrument, INSTRUMENTS)
    checks.one_of("arm", arm, ARMS)
    s.check()
    if instrument == "cuda" and not torch.cuda.is_available():
        raise ValueError("instrument is 'cuda', but there is no CUDA device; use 'simulated'.")
    return closed_form.peak(arm, s) + (
        closed_form.host_in_memory(arm, s) if instrument == "rss" else 0
    )


def _refuse_what_does_not_fit(arm: str, s: Setting, instrument: str) -> None:
    device, host = closed_form.peak(arm, s), closed_form.host(arm, s)
    if instrument == "cuda":
        _refuse_beyond(device, torch.cuda.mem_get_info()[0], f"{arm} needs on the device")
        _refuse_beyond(host, free_memory(), f"{arm} needs on the host")
        return
    in_memory = closed_form.host_in_memory(arm, s) if instrument == "rss" else host
    _refuse_beyond(device + in_memory, free_memory(), f"{arm} needs")
    in_files = host - in_memory
    folder = tempfile.gettempdir()
    _refuse_beyond(in_files, shutil.disk_usage(folder).free, f"{arm} needs in temporary files")


def free_memory() -> int:
    """Bytes of the host's memory that can be had."""
    if Path("/proc/meminfo").exists():
        return proc_bytes("MemAvailable", "/proc/meminfo")
    import psutil

    return psutil.virtual_memory().available


def wait_for(device: str) -> None:
    """Return once everything that `device` was asked to do is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def _refuse_beyond(need: int, free: int, what: str) -> None:
    if need > free:
        raise DoesNotFitError(
            f"{what} {format_bytes(need)} and {format_bytes(free)} are free: lower depth, hidden "
            "or batch, take the simulated instrument, or override this check."
        )


def _count(report: Report, s: Setting) -> Report:
    simulated = report.instrument == "simulated"
    try:
        with FakeTensorMode() if simulated else nullcontext():
            arm = ARMS[report.arm].build(s)
            before = arm.moved()
            live = watch_step(arm)
            report.moved_bytes = (arm.moved() - before) // 2  # of one of two equal steps
            report.peak_bytes = live.peak_bytes
            report.breakdown = {c: live.peak[c] for c in CATEGORIES}
            report.host_bytes = live.most_on_host
            with live:
                live.restart()
                arm.evaluate()
            report.evaluation_peak_bytes = live.peak_bytes
    except (MemoryError, RuntimeError) as error:
        if simulated or "memory" not in str(error):
            raise
        report.error = f"out of memory: {str(error).splitlines()[0]}"
    return report


def _in_fresh_process(report: Report) -> Report:
    command = [sys.executable, "-m", "ff_utils.memory", "--here", "--json"]
    for name in ("instrument", "arm", "depth", "hidden", "batch", "optimizer", "precision"):
        command += [f"--{name}", str(getattr(report, name))]
    # The folder is made here, so that it goes even when the process that fills it is killed.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=paths.ROOT,
            env=os.environ | RETURN_FREED_MEMORY | {"TMPDIR": folder},
            check=False,
        )
    if done.returncode == 0:
        return Report(**json.loads(done.stdout))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == -9:
        last = "killed, most often for lack of memory"
    report.error = f"ended with status {done.returncode}: {last}"
    return report


def _run_here(report: Report, s: Setting) -> Report:
    """Measure this process: the one number an outsider sees."""
    cuda = report.instrument == "cuda"
    s = replace(s, device="cuda" if cuda else "cpu")
    # Load what any program loads (thread pools, kernels) before the baseline is read.
    small = ARMS["backprop"].build(replace(s, depth=2, hidden=64, batch=64))
    small.train()
    del small
    baseline = 0 if cuda else resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        arm = ARMS[report.arm].build(s if cuda else replace(s, store=folder))
        arm.train()
        evaluation_is_apart = reset_peak(cuda)
        before, start = arm.moved(), time.perf_counter()
        arm.train()
        report.peak_bytes = peak_bytes(cuda) - baseline
        report.step_seconds = time.perf_counter() - start
        report.moved_bytes = arm.moved() - before
        if evaluation_is_apart:
            reset_peak(cuda)
            arm.evaluate()
            report.evaluation_peak_bytes = peak_bytes(cuda) - baseline
    return report


def reset_peak(cuda: bool) -> bool:
    """Start a new peak; False where the system cannot."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(cuda: bool) -> int:
    """This process's peak: of resident memory, or of the CUDA allocator."""
    if cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if (found := proc_bytes("VmHWM")) is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_bytes() -> int:
    """Resident memory now; where only its peak is told, the peak so far."""
    return proc_bytes("VmRSS") or peak_bytes(cuda=False)


def proc_bytes(key: str, path: str = "/proc/self/status") -> int | None:
    """A size that Linux tells, in bytes. /proc/self/status counts this process alone, where
    getrusage's peak is inherited from whoever started it."""
    status = Path(path)
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    return None


# --- Command line ---------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Print one arm's report as a table, or as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.memory", description=main.__doc__)
    parser.add_argument("--arm", default="backprop", help=", ".join(ARMS))
    parser.add_argument("--depth", type=int, default=7, help="hidden layers")
    parser.add_argument("--hidden", type=int, default=2000, help="units in each")
    parser.add_argument("--batch", type=int, default=5000, help="rows in a step")
    optimizers, precisions = closed_form.OPTIMIZERS, closed_form.PRECISIONS
    parser.add_argument("--optimizer", default="adam", help=", ".join(optimizers))
    parser.add_argument("--precision", default="float32", help=", ".join(precisions))
    parser.add_argument("--instrument", default="simulated", help=", ".join(INSTRUMENTS))
    parser.add_argument("--json", action="store_true", help="one JSON object, in bytes")
    parser.add_argument(
        "--override", action="store_true", help="run even what is predicted not to fit"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) for name in ("depth", "hidden", "batch")}
    kind = {name: getattr(options, name) for name in ("optimizer", "precision", "instrument")}
    try:
        if options.here:  # the fresh process that `measure` started
            report = _here(options.arm, sizes, kind)
        else:
            report = measure(options.arm, **sizes, **kind, override=options.override)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    if options.json:
        print(json.dumps(asdict(report)))
    elif report.error:
        parser.exit(1, f"error: {options.arm} gave no number: {report.error}\n")
    else:
        _print(report)


def _here(arm: str, sizes: dict, kind: dict) -> Report:
    s = Setting(**sizes, optimizer=kind["optimizer"], precision=kind["precision"])
    predicted = _check(arm, s, kind["instrument"])
    report = Report(arm, **sizes, **kind, peak_bytes=None, predicted_bytes=predicted)
    return (_count if kind["instrument"] == "tracked" else _run_here)(report, s)


def _print(report: Report) -> None:
    s = Setting(report.depth, report.hidden, report.batch, report.optimizer, report.precision)
    predicted = closed_form.predict(report.arm, s)
    print(
        f"{report.arm}: {s.depth} layers of {s.hidden} units, {s.batch} rows, {s.optimizer}, "
        f"{s.precision} ({report.instrument})\n"
    )
    rows = {
        category.replace("_", " "): (
            report.breakdown and report.breakdown[category],
            predicted[category],
        )
        for category in CATEGORIES
    }
    if report.predicted_bytes > sum(predicted.values()):
        rows["host"] = (None, report.predicted_bytes - sum(predicted.values()))
    rows["training peak"] = (report.peak_bytes, report.predicted_bytes)
    rows["evaluation peak"] = (report.evaluation_peak_bytes, None)
    rows["on the host"] = (report.host_bytes, closed_form.host(report.arm, s))
    rows["moved in a step"] = (report.moved_bytes, None)
    print(f"{'':24}{report.instrument:>14}{'closed form':>14}")
    for name, found in rows.items():
        shown = ["-" if size is None else format_bytes(size) for size in found]
        print(f"{name:24}{shown[0]:>14}{shown[1]:>14}")


if __name__ == "__main__":
    main()
