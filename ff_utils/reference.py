"""Every arm on a real GPU: its allocator's peak, the time of a step, traffic, short trainings.

`python -m ff_utils.reference` (or `make gpu-reference`) measures one point after the other, each
in a process of its own, the most telling first. It needs PyTorch, NumPy, pandas and scikit-learn,
and nothing else. Each record is written as soon as it is there: run again, it measures the rest.
Minutes that are left then go to trainings at full length, which go on where they were stopped.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from ff_utils import checks, closed_form, datasets, files, memory, networks, paths, results, study
from ff_utils import training as loops
from ff_utils.arms import ARMS
from ff_utils.closed_form import Setting
from ff_utils.live_bytes import LiveBytes

FOLDER = paths.DATA / "reference"
REHEARSALS = paths.BUILD / "reference"  # of the CPU: nothing reads them
DEPTHS = (2, 7, 12, 17, 22, 27, 32, 37, 42, 47)
DEEPEST = 1000
READY = 3  # processes that wait, PyTorch loaded, for their one point
POINT_SECONDS = 180
TIMED_SECONDS, MOST_REPEATS = 1.0, 20
# Learning as notebook 2 has it, with the seed's own choices, and by backprop.
TRAININGS = {
    "ff_hard_negatives": {"batch": 100, "epochs": 10},
    "backprop": {"batch": 100, "epochs": 10},
    "ff_seed": {"batch": 5000, "epochs": 30},
}
OUR_CHOICES = {"loss": "pairwise", "label_scale": 4.0, "scale": 30.0}
OUR_COURSE = {"learning_rate": 0.001, "guess_share": 0.5, "softmax_rate": 0.3}
SEED_CHOICES = {"label": "joined", "normalisation": "length", "theta": 2.0}
SEED_COURSE = {"learning_rate": 0.03, "schedule": "layerwise", "negatives": "random"}
# At full length, by `study`: the paper's widths, and what has wanted a GPU.
STUDIES = [("wide", 0), ("wide", 1), ("wide", 2), ("cifar10", 0)]


# --- What to measure ------------------------------------------------------------------------


def points(arms: list[str], depths: list[int], deepest: int, hidden: int, batch: int) -> list[dict]:
    """What there is to measure, the most telling first: all arms at the greatest depth, the
    streamed ones far beyond it, trainings, the other depths, the other remedies far beyond."""

    def steps(chosen: list[str], depth: int) -> list[dict]:
        kind = {"kind": "step", "depth": depth, "hidden": hidden, "batch": batch}
        return [{"arm": arm} | kind for arm in chosen if arm in arms]

    ordered = spread(depths)
    lean = ["ff_streamed", "ff_frugal", "ff_layerwise", "backprop_frugal"]
    apart = [*lean, "backprop_seed", "backprop_language"]
    others = ["ff_resident", *(a for a in ARMS if a.startswith("backprop"))]
    others = [a for a in others if a not in apart]
    trained = [
        {"arm": arm, "kind": "training", "depth": 4, "hidden": hidden} | course
        for arm, course in TRAININGS.items()
        if arm in arms
    ]
    found = steps(arms, ordered[0]) + steps(lean, deepest) + trained
    for depth in ordered[1:]:
        found += steps(arms, depth)
    found += steps(others, deepest)
    return list({_key(point): point for point in found}.values())


def spread(depths: list[int]) -> list[int]:
    """The greatest depth, the smallest, then always the one farthest from those before it."""
    ordered, left = [max(depths)], sorted(set(depths) - {max(depths)})
    while left:
        ordered.append(max(left, key=lambda d: min(abs(d - other) for other in ordered)))
        left.remove(ordered[-1])
    return ordered


# --- One point, in the process that was started for it ----------------------------------------


def measure(point: dict, device: str) -> dict:
    """What one point came to; lack of memory is an `error`, not an exception."""
    try:
        return (_step if point["kind"] == "step" else _training)(point, device)
    except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError
        if "memory" not in str(error).lower():
            raise
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}


def _step(point: dict, device: str) -> dict:
    name = point["arm"]
    s = Setting(point["depth"], point["hidden"], point["batch"], device=device)
    # Pinned memory comes in powers of two: up to twice what is asked for.
    host, free = 2 * closed_form.host(name, s), memory.free_memory()
    if host > free:
        return {"error": f"out of memory: {host / 1e9:.0f} GB of the host's may be needed"}
    workspace = _workspace(name, s)
    arm = ARMS[name].build(s)
    arm.train()
    watch = LiveBytes()
    if device == "cpu":
        arm.watch(watch)
    before = arm.moved()
    found = _peak(arm.train, device, watch) | {"workspace_bytes": workspace}
    found["moved_bytes"] = arm.moved() - before
    evaluation = _peak(arm.evaluate, device, watch)
    found["evaluation_peak_bytes"] = evaluation["peak_bytes"]
    return found | _seconds(arm.timed or arm.train, device)


def _workspace(name: str, s: Setting) -> int:
    """Bytes that libraries, cuBLAS above all, keep once an arm has run, or take in a call.

    The arm is run in miniature and taken down again; this warms the device up as well.
    """
    if s.device == "cpu":
        return 0
    ARMS[name].build(replace(s, depth=2, hidden=64, batch=64)).train()
    gc.collect()
    memory.wait_for(s.device)
    torch.cuda.empty_cache()
    kept = _allocator("requested_bytes", "current")
    a, bias = torch.ones(64, 64, device=s.device), torch.ones(64, device=s.device)
    torch.cuda.reset_peak_memory_stats()
    before = _allocator("requested_bytes", "current")
    product = torch.addmm(bias, a, a)
    return kept + max(0, _allocator("requested_bytes", "peak") - before - product.nbytes)


def _allocator(what: str, when: str) -> int:
    return torch.cuda.memory_stats()[f"{what}.all.{when}"]


def _peak(work, device: str, watch: LiveBytes) -> dict[str, int]:
    """Peak bytes of `work`: allocated (blocks, as torch.cuda.max_memory_allocated has it),
    requested (the same before rounding) and reserved; on a CPU, of live tensors."""
    if device == "cpu":
        with watch:
            watch.restart()
            work()
        return dict.fromkeys(("peak_bytes", "requested_bytes", "reserved_bytes"), watch.peak_bytes)
    memory.wait_for(device)
    torch.cuda.reset_peak_memory_stats()
    work()
    memory.wait_for(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "requested_bytes": _allocator("requested_bytes", "peak"),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def _seconds(work, device: str) -> dict[str, float]:
    """Seconds of `work` by CUDA events (median, fastest, slowest) and until every copy is done."""
    seconds, walls = [], []
    while len(walls) < 3 or (sum(walls) < TIMED_SECONDS and len(walls) < MOST_REPEATS):
        memory.wait_for(device)
        start = time.perf_counter()
        if device == "cuda":
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record()
        work()
        if device == "cuda":
            ends[1].record()
        memory.wait_for(device)
        walls.append(time.perf_counter() - start)
        seconds.append(ends[0].elapsed_time(ends[1]) / 1000 if device == "cuda" else walls[-1])
    return {
        "seconds": median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "until_copied": median(walls),
        "repeats": len(walls),
    }


def _training(point: dict, device: str) -> dict:
    """A short training's error on the test images: MNIST where its files are, else digits."""
    mnist = device == "cuda" and datasets.at_hand("mnist")
    data = datasets.load("mnist" if mnist else "digits").to(device)
    hidden, name = [point["hidden"]] * point["depth"], point["arm"]
    course = {"epochs": point["epochs"], "batch_size": point["batch"], "quiet": True}
    course["batch_size"] = min(course["batch_size"], len(data.train_labels))
    if name == "backprop":
        network = networks.backprop_network(data.pixels, data.classes, hidden, device=device)
        history = loops.train_backprop(network, data, learning_rate=0.001, **course)
        error = history.error.iloc[-1]
    else:
        ours = name != "ff_seed"
        choices = (OUR_CHOICES if ours else SEED_CHOICES) | {"device": device}
        network = networks.ForwardForward(data.pixels, data.classes, hidden, **choices)
        course |= OUR_COURSE if ours else SEED_COURSE | {"decay": "none"}
        history = loops.train_forward_forward(network, data, **course)
        error = history.error.iloc[-1] if ours else loops.goodness_errors(network, data)[-1]
    return {
        "data": data.name,
        "test_error": error,
        "seconds": history.seconds.mean(),  # an epoch's
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


# --- All points -----------------------------------------------------------------------------


class Run:
    """Points measured one at a time by processes that are started ahead of their turn."""

    def __init__(self, path: Path, device: str, minutes: float) -> None:
        self.path, self.device, self.made = path, device, provenance(device)
        rows = read(path) if path.exists() else []
        # What failed for another reason than memory is tried again.
        self.rows = [row for row in rows if "memory" in row.get("error", "memory")]
        self.deadline = time.monotonic() + 60 * minutes
        self.waiting: deque[subprocess.Popen] = deque()

    def measure(self, wanted: list[dict]) -> list[dict]:
        """Measure what is wanted and not yet there, while there is time; returns what is left."""
        done = {_key(row) for row in self.rows}
        left = deque(point for point in wanted if _key(point) not in done)
        print(f"{len(wanted)} points, {len(wanted) - len(left)} of them there already", flush=True)
        try:
            while left and time.monotonic() < self.deadline:
                start = time.monotonic()
                found = self._in_fresh_process(left[0], len(left))
                if found is None:
                    break
                self.rows.append(left.popleft() | found | self.made)
                text = "".join(json.dumps(_plain(row)) + "\n" for row in self.rows)
                files.write_atomically(self.path, text)
                print(f"{_told(self.rows[-1])} ({time.monotonic() - start:.1f} s)", flush=True)
        finally:
            for process in self.waiting:
                process.kill()
                process.communicate()
        return list(left)

    def _in_fresh_process(self, point: dict, left: int) -> dict | None:
        """One point's numbers, or why there are none; None where time ran out on it."""
        while len(self.waiting) < min(READY, left):
            command = [sys.executable, "-m", "ff_utils.reference", "--here"]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            self.waiting.append(
                subprocess.Popen(
                    [*command, "--device", self.device], cwd=paths.ROOT, text=True, **pipes
                )
            )
        process = self.waiting.popleft()
        rest = self.deadline - time.monotonic()
        try:
            told, complaint = process.communicate(json.dumps(point), min(rest, POINT_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"error": f"took over {POINT_SECONDS} s"} if rest > POINT_SECONDS else None
        if process.returncode == 0:
            return json.loads(told.splitlines()[-1])
        if process.returncode == -9:
            return {"error": "killed, most often for lack of memory"}
        last = (complaint.strip().splitlines() or ["no message"])[-1]
        return {"error": f"ended with status {process.returncode}: {last}"}


def train_at_length(studies: list[tuple[str, int]], deadline: float) -> list[tuple[str, int]]:
    """Train these studies and seeds, one after the other, until `deadline` (time.monotonic's).

    Each is a process that saves itself after every epoch; one that is stopped goes on in the next
    call. Returns those that have no record then.
    """
    for name, seed in studies:
        rest = deadline - time.monotonic()
        if rest <= 0:
            break
        print(f"at full length: {name}, seed {seed}", flush=True)
        command = [sys.executable, "-m", "ff_utils.study", name, "--seed", str(seed)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=paths.ROOT, timeout=rest, check=False)
    return [
        (n, s) for n, s in studies if not results.record_path(f"{n}-{s}", study.PROFILE).exists()
    ]


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("kind", "arm", "depth", "hidden", "batch", "epochs"))


def _plain(row: dict) -> dict:
    """Numbers to 6 significant digits, so that records read well."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def _told(row: dict) -> str:
    name = f"{ARMS[row['arm']].title}, {row['depth']} layers, {row['kind']}"
    if row.get("error"):
        return f"{name}: {row['error']}"
    if row["kind"] == "training":
        return f"{name}: {row['test_error']:.2%} wrong, {row['seconds']:.2f} s an epoch"
    return f"{name}: {row['peak_bytes'] / 1e6:,.0f} MB, {row['seconds']:.4f} s"


def provenance(device: str) -> dict:
    """Where a number comes from: GPU, driver, versions, commit."""
    made = {"gpu": "CPU", "driver": "", "cuda": "", "torch": torch.__version__}
    if device == "cuda":
        made |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            made["driver"] = told.strip()
        except (OSError, subprocess.CalledProcessError):
            made["driver"] = "unknown"
    return made | {"commit": results.git_commit()}


# --- What there is --------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    """The records in a file; ValueError where one is not whole."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(
            f"{paths.relative(path)} is not whole JSON lines: delete it and run "
            "`make gpu-reference`."
        ) from error


def table(kind: str = "step") -> pd.DataFrame:
    """Records of "step" or "training" of the GPU that has most of them, one a row; empty where
    no GPU has measured yet. What ran out of memory has an `error` and no `peak_bytes`."""
    found = [read(path) for path in sorted(FOLDER.glob("*.jsonl"))]
    rows = max(found, key=len, default=[])
    columns = ["kind", "arm", "depth", "hidden", "batch", "gpu", "error", "peak_bytes"]
    columns += ["requested_bytes", "workspace_bytes", "moved_bytes", "seconds", "test_error"]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*columns, *(rows and rows[0])])))
    return frame[frame.kind.eq(kind) & frame.arm.isin(ARMS)].fillna({"error": ""})


def compared(simulated: pd.DataFrame) -> pd.DataFrame:
    """Measured steps beside the simulated ones of the same sizes, in bytes.

    Columns: arm, depth, simulated; measured (torch.cuda.max_memory_allocated), which is made of
    tensors, workspace (of cuBLAS) and rounding (blocks are larger than what is asked for); ratio,
    of tensors to simulated; seconds, gpu.
    """
    measured = table()
    measured = measured[measured.error.eq("")]
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
            "No GPU has measured this yet: `make gpu-reference`, on a machine with one, does so "
            "in 10 minutes."
        )
    rounding = (found.rounding / found.tensors).max()
    return (
        f"On {found.gpu.iloc[0]}, at {len(found)} points, the tensors of a step take "
        f"{found.ratio.min():.3f} to {found.ratio.max():.3f} times what is simulated; the "
        f"allocator's peak has up to {rounding:.1%} on top, for blocks larger than what is asked "
        f"for, and cuBLAS's workspace, {found.workspace.max() / 1e6:.0f} MB at most."
    )


def metrics(simulated: pd.DataFrame) -> dict[str, float]:
    """What the ledger asks of a GPU, as far as it has been measured."""
    found, steps, last = {}, table(), max(DEPTHS)
    if len(both := compared(simulated)):
        found["off_simulation"] = float((both.ratio - 1).abs().max())
    sizes = simulated[["hidden", "batch"]].drop_duplicates()
    steps = steps[steps.error.eq("")].merge(sizes).set_index(["arm", "depth"])
    streamed, asked = ("ff_streamed", last), {}
    asked["seed_over_its_backprop"] = "peak_bytes", ("ff_seed", last), ("backprop_seed", last)
    asked["streamed_1000_over_47_layers"] = "peak_bytes", ("ff_streamed", DEEPEST), streamed
    asked["streamed_over_resident_time"] = "seconds", streamed, ("ff_resident", last)
    for name, (column, over, under) in asked.items():
        if over in steps.index and under in steps.index:
            found[name] = float(steps[column][over] / steps[column][under])
    return found


# --- Command line ---------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Measure every arm on this machine's GPU, as far as the minutes go."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.reference", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="stop after so many")
    parser.add_argument("--device", default="cuda", help="cpu rehearses, into build/reference")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help="all unless named")
    parser.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS), help="hidden layers")
    parser.add_argument("--deepest", type=int, default=DEEPEST, help="of streamed arms")
    parser.add_argument("--hidden", type=int, default=2000, help="units in each layer")
    parser.add_argument("--batch", type=int, default=5000, help="rows in a step")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:  # a process that `Run` started: its one point comes when its turn does
        point = json.loads(sys.stdin.readline())
        print(json.dumps(measure(point, options.device)))
        return
    try:
        checks.one_of("device", options.device, ("cuda", "cpu"))
        checks.number("minutes", options.minutes, 0, above=True)
        for arm in options.arms:
            checks.one_of("arm", arm, ARMS)
        sizes = (options.deepest, options.hidden, options.batch)
        for depth in options.depths or [0]:
            Setting(depth, *sizes[1:]).check()
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; --device cpu rehearses on the CPU.")
        name = provenance(options.device)["gpu"].lower().replace(" ", "-")
        folder = FOLDER if options.device == "cuda" else REHEARSALS
        run = Run(folder / f"{name}.jsonl", options.device, options.minutes)
        left = run.measure(points(options.arms, options.depths, *sizes))
        wanted = [s for s in STUDIES if s[0] != "cifar10" or datasets.at_hand("cifar10")]
        untrained = train_at_length(wanted if options.device == "cuda" else [], run.deadline)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    if left:
        depths = sorted({point["depth"] for point in left})
        print(f"left out, for lack of time: {len(left)} points at {depths} layers; run it again")
    if untrained:
        told = ", ".join(f"{name} {seed}" for name, seed in untrained)
        print(f"not yet trained to their end: {told}; run it again, or with more --minutes")
    print(f"records: {paths.relative(run.path)}")


if __name__ == "__main__":
    main()
