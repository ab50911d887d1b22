"""Every arm on a GPU, one point after the other in this process, as far as the minutes go."""

import gc
import time
from collections.abc import Callable
from statistics import median

import pandas as pd
import psutil
import torch

from ff_utils.memory.arms import ARMS, Sizes
from ff_utils.memory.measure import finish, is_out_of_memory, simulate
from ff_utils.memory.steps import Step, build
from ff_utils.utils import check_number, default_device, format_bytes, track

TIMED_SECONDS, MOST_REPEATS = 1.0, 20  # of a step
COLUMNS = ("arm", "depth", "hidden", "batch", "gpu", "error", "peak_bytes", "requested_bytes")
COLUMNS += ("reserved_bytes", "workspace_bytes", "evaluation_peak_bytes", "moved_bytes")
COLUMNS += ("seconds", "fastest", "slowest", "until_copied", "repeats")


def gpu_grid(
    depths: list[int], deepest: int, *, hidden: int, images: int, minutes: float
) -> pd.DataFrame:
    """Every arm at the last of `depths`, offloaded FF at `deepest`, every arm at the other depths,
    on `images` images a step, for as long as `minutes` last; one row a point.

    Columns: arm, depth, hidden, batch, gpu; bytes at the peak as torch.cuda.max_memory_allocated
    has it (peak_bytes, evaluation_peak_bytes), before rounding to blocks (requested_bytes), of
    segments (reserved_bytes), of libraries (workspace_bytes); moved_bytes; seconds by CUDA events
    (median, fastest, slowest), until every copy is done (until_copied); error, where memory ran
    out. On a CPU it is a rehearsal, which counts live tensors.
    """
    check_number("minutes", minutes, 0, above=True)
    device = default_device()
    points = [(arm, depths[-1]) for arm in ARMS]
    # Streamed in parts, a step of so many layers takes too long.
    flat = [arm for arm in ARMS.values() if arm.offloaded and arm.micro_batches == 1]
    points += [(arm.name, deepest) for arm in flat if arm.network == "ff"]
    points += [(arm, depth) for depth in depths[:-1] for arm in ARMS]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    deadline, rows = time.monotonic() + 60 * minutes, []
    for arm, depth in track(list(dict.fromkeys(points)), "point"):
        if time.monotonic() < deadline:
            s = Sizes(depth, hidden, ARMS[arm].rows(images), device=device)
            row = {"arm": arm, "depth": depth, "hidden": hidden, "batch": s.batch, "gpu": name}
            rows.append(row | {"error": ""} | measure_here(arm, s))
    if len(rows) < len(set(points)):
        print(f"left out, for lack of time: {len(set(points)) - len(rows)} of {len(set(points))}")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measure_here(arm: str, s: Sizes) -> dict:
    """One point in this process, on `s.device`; lack of memory is an `error`, no exception."""
    # Pinned memory comes in powers of two: up to twice what is asked for.
    host = 2 * simulate(arm, s).host_bytes
    if host > psutil.virtual_memory().available:
        return {"error": f"out of memory: {format_bytes(host)} of the host's may be needed"}
    try:
        return _measure_step(arm, s)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    finally:
        _clear(s.device)


def _measure_step(arm: str, s: Sizes) -> dict:
    workspace = _workspace(s)
    step = build(arm, s)
    peaks = _cuda_peaks if s.device == "cuda" else _tracked_peaks
    row = {"workspace_bytes": workspace} | peaks(step)
    before = step.moved()
    step.train()
    row["moved_bytes"] = step.moved() - before
    return row | _seconds(step.timed or step.train, s.device)


def _cuda_peaks(step: Step) -> dict[str, int]:
    """Peaks of the allocator in a step and in an evaluation."""
    peaks = []
    step.train()
    for work in (step.train, step.evaluate):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        finish(work, "cuda")
        peaks.append(
            {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "requested_bytes": _allocator("requested_bytes", "peak"),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        )
    return peaks[0] | {"evaluation_peak_bytes": peaks[1]["peak_bytes"]}


def _tracked_peaks(step: Step) -> dict[str, int]:
    """The same of live tensors."""
    tracker = step.track()
    names = ("peak_bytes", "requested_bytes", "reserved_bytes")
    row = dict.fromkeys(names, tracker.peak_bytes)
    with tracker:
        tracker.restart()
        step.evaluate()
    return row | {"evaluation_peak_bytes": tracker.peak_bytes}


def _clear(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _workspace(s: Sizes) -> int:
    """Bytes that libraries, cuBLAS above all, keep once an arm has run, or take in a call."""
    if s.device == "cpu":
        return 0
    build("backprop", Sizes(2, 64, 64, s.optimizer, s.precision, s.device)).train()
    _clear(s.device)
    kept = _allocator("requested_bytes", "current")
    a, bias = torch.ones(64, 64, device=s.device), torch.ones(64, device=s.device)
    torch.cuda.reset_peak_memory_stats()
    before = _allocator("requested_bytes", "current")
    product = torch.addmm(bias, a, a)
    return kept + max(0, _allocator("requested_bytes", "peak") - before - product.nbytes)


def _allocator(what: str, when: str) -> int:
    return torch.cuda.memory_stats()[f"{what}.all.{when}"]


def _seconds(work: Callable[[], object], device: str) -> dict[str, float]:
    """Seconds of `work` by CUDA events (median, fastest, slowest) and until every copy is done."""
    seconds, walls = [], []
    while len(walls) < 3 or (sum(walls) < TIMED_SECONDS and len(walls) < MOST_REPEATS):
        finish(lambda: None, device)
        start = time.perf_counter()
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        work()
        if device == "cuda":
            last.record()
        finish(lambda: None, device)
        walls.append(time.perf_counter() - start)
        seconds.append(first.elapsed_time(last) / 1000 if device == "cuda" else walls[-1])
    return {
        "seconds": median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "until_copied": median(walls),
        "repeats": len(walls),
    }


# --- Measured beside simulated --------------------------------------------------------------


def compared(simulated: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Steps measured on a GPU beside the simulated ones of the same sizes, in bytes.

    Columns: arm, depth, simulated; measured (torch.cuda.max_memory_allocated), which is made of
    tensors, workspace (of cuBLAS) and rounding (blocks are larger than what is asked for); ratio,
    of tensors to simulated; seconds, gpu.
    """
    measured = measured.reindex(columns=list(COLUMNS)).dropna(subset="peak_bytes")
    where = ["arm", "depth", "hidden", "batch"]
    ours = simulated[[*where, "peak_bytes"]].rename(columns={"peak_bytes": "simulated"})
    both = ours.merge(measured.rename(columns={"peak_bytes": "measured"}), on=where)
    both["workspace"] = both.workspace_bytes
    both["tensors"] = both.requested_bytes - both.workspace
    both["rounding"] = both.measured - both.requested_bytes
    both["ratio"] = both.tensors / both.simulated
    parts = ["simulated", "tensors", "workspace", "rounding", "measured", "ratio"]
    return both[["arm", "depth", *parts, "seconds", "gpu"]]


def about(found: pd.DataFrame) -> str:
    """One sentence that reads what `compared` found."""
    if found.empty:
        return (
            "No GPU has measured this yet: `make 04 PROFILE=gpu`, on a machine with one, does so."
        )
    rounding = (found.rounding / found.tensors).max()
    return (
        f"On {found.gpu.iloc[0]}, at {len(found)} points, the tensors of a step take "
        f"{found.ratio.min():.3f} to {found.ratio.max():.3f} times what is simulated; the "
        f"allocator's peak has up to {rounding:.1%} on top, for blocks larger than what is asked "
        f"for, and cuBLAS's workspace, {format_bytes(found.workspace.max())} at most."
    )


def gpu_metrics(simulated: pd.DataFrame, measured: pd.DataFrame) -> dict[str, float]:
    """What the ledger of claims asks of a GPU, as far as it has been measured."""
    both = compared(simulated, measured)
    if both.empty:
        return {}
    metrics = {"off_simulation": float((both.ratio - 1).abs().max())}
    last, deepest = both.depth.max(), measured.depth.max()
    steps = measured.dropna(subset="peak_bytes").set_index(["arm", "depth"])
    streamed = ("ff_streamed", last)
    for name, column, over, under in (
        ("seed_over_its_backprop", "peak_bytes", ("ff_seed", last), ("backprop_seed", last)),
        ("streamed_1000_over_47_layers", "peak_bytes", ("ff_streamed", deepest), streamed),
        ("streamed_over_resident_time", "seconds", streamed, ("ff_resident", last)),
    ):
        if over in steps.index and under in steps.index:
            metrics[name] = float(steps[column][over] / steps[column][under])
    return metrics
