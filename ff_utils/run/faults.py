"""Faults: commands that are killed, short of disk, run twice or given damaged files, then repeated.

`python -m ff_utils faults --trials 50 --seed 0`

Each trial works in a copy of this checkout, on built-in data, and is decided by its seed alone: the
trials of seed 0 are those of the seeds 0, 1, 2, ... Faults, commands and files take turns; moments,
signals and kinds of damage are drawn. A trial survives if

- the same command, given once more, ends with the metrics of an undisturbed run, times and process
  memory apart,
- files that were damaged were refused in one sentence, or read for what they are, or not needed,
- and neither a process nor a temporary file is left.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import psutil

from ff_utils import utils
from ff_utils.data import load_dataset
from ff_utils.report import records
from ff_utils.run import notebooks

MARK = "FF_TRIAL"  # in the environment of every process of a trial: its folder
TIME_LIMIT = 900  # seconds for one command, on a busy machine
GRACE = 60  # seconds in which what a killed process had started has to end
CACHES = ("torchinductor_",)  # folders that every process of a library shares
# Names of metrics that depend on time, and instruments that measure a whole process.
TIMES = re.compile(
    r"second|busy|timeline|peak_bytes_resident|^ranks$|time_ratio|evaluation_ratio|fastest|slowest|"
    r"per_1000|times_plain|speed_up|\(s\)|elapsed|in_turn|efficiency|memory_left|digests|verdicts"
)
PROCESS = ("rss", "cuda")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FILES = {
    "notebooks/sweeps/faults.yaml": """notebook: one_setting
fixed: {arms: [backprop], dataset: digits, hidden: 20, epochs: 1, train_size: 200, depth: 2}
seeds: 2
metrics: {arm: "arms[].arm", error: "arms[].error", peak_bytes: "arms[].peak_bytes"}
""",
    # A scheduler and two workers of Dask, as a person starts them, and a sweep on them.
    "cluster.sh": """mkdir -p cluster; rm -f cluster/scheduler
trap 'kill $cluster; sleep 2; kill -9 $cluster; wait' EXIT
export DASK_TEMPORARY_DIRECTORY=cluster
python="environment/bin/python -m"; quiet="--no-dashboard --host 127.0.0.1"
$python distributed.cli.dask_scheduler $quiet --port 0 --scheduler-file cluster/scheduler &
scheduler=$!; cluster=$scheduler
until [ -s cluster/scheduler ]; do sleep 0.2; kill -0 $scheduler || exit 1; done
address=$(sed -n 's/.*"address": "\\(.*\\)".*/\\1/p' cluster/scheduler | head -1)
for worker in 1 2; do
  $python distributed.cli.dask_worker $address $quiet --no-nanny --nthreads 1 --death-timeout 20 &
  cluster="$cluster $!"
done
while kill -0 $scheduler; do
  $python ff_utils sweep faults --retry-failed --scheduler $address && exit
  [ -e data/results/sweeps/faults/sweep.json ] && exit 1  # it had begun
done
exit 1
""",
}


class FaultError(AssertionError):
    """What did not survive, in one line."""


@dataclass(frozen=True)
class Command:
    """What is disturbed.

    line: what is run in the copy. result: its record or table. damaged: patterns of its files; a
    trial damages one, removes those of `first` so that it is read, and gives the command again.
    inputs: whether a person restores a damaged file; else it is deleted, as the sentence says.
    """

    line: str
    result: str
    damaged: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    inputs: bool = False


PYTHON = "environment/bin/python -m"
SETTING = "make VENV=environment one_setting PROFILE=smoke"
RECORD = "data/results/smoke/one_setting.json"
SWEEP = f"{PYTHON} ff_utils sweep faults --jobs 2 --retry-failed"
TABLE = "data/results/sweeps/faults.csv"
TRAINING = (
    f"{PYTHON} ff_utils run notebooks/full_length.ipynb --set dataset=digits --set epochs=5 "
    "--set form=supervised --output build/full_length/supervised.ipynb"
)
TRAINED = "build/full_length/supervised-0-5-digits"
RANKS = (
    f"{PYTHON} torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 "
    "--log-dir build/logs -m "
    "ff_utils.distributed --dataset digits --hidden 200 200 200 --epochs 25 --batch-size 50 "
    "--checkpoint build/ranks --record build/ranks.json"
)
IMAGES = f"{PYTHON} ff_utils run notebooks/one_setting.ipynb --set dataset=folder:images " + (
    "--profile smoke --set train_size=0 --output build/images.ipynb"
)
COMMANDS = {
    "make": Command(SETTING, RECORD),
    "sweep": Command(SWEEP, TABLE),
    "Dask workers": Command("sh cluster.sh", TABLE),
    "training": Command(TRAINING, f"{TRAINED}.json"),
    "ranks": Command(RANKS, "build/ranks.json"),
}
DAMAGED = {
    "a notebook": Command(SETTING, RECORD, ("notebooks/one_setting.ipynb",), inputs=True),
    "a profile": Command(SETTING, RECORD, ("notebooks/profiles/smoke.yaml",), inputs=True),
    "a record": Command(TRAINING, f"{TRAINED}.json", (f"{TRAINED}.json",)),
    "a point's record": Command(SWEEP, TABLE, ("data/results/sweeps/faults/*.json",)),
    "a checkpoint": Command(TRAINING, f"{TRAINED}.json", (f"{TRAINED}.pt",), (f"{TRAINED}.json",)),
    "ranks' checkpoint": Command(
        RANKS, "build/ranks.json", ("build/ranks/epoch*",), ("build/ranks.json",)
    ),
    "an image": Command(
        IMAGES, "data/results/interactive/one_setting.json", ("images/*/*/*.png",), inputs=True
    ),
}
FAULTS = ("kill", "kill", "kill", "full disk", "two at once", "kill", "damage", "damage")


# --- Copies and processes -------------------------------------------------------------------


def copy_checkout(folder: Path) -> None:
    """The repository as a fresh clone has it, with an environment of this one's packages."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=utils.ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (utils.ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(utils.ROOT / name, folder / name)
    python = folder / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    here = 'PYTHONPATH="$(cd "$(dirname "$0")/../.." && pwd)"'  # kernels work in another folder
    python.write_text(f'#!/bin/sh\n{here} exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / "environment" / "ready").touch()


@contextmanager
def workplace(prefix: str) -> Iterator[Path]:
    """A temporary folder with a copy of this checkout in `checkout`. What still runs in it at the
    end is killed, also when a signal ends the command; the folder goes unless `keep` is in it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, notebooks.end_quietly)
    work = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        copy_checkout(work / "checkout")
        yield work
    finally:
        for one in running(str(work)):
            one.kill()
        if not (work / "keep").exists():
            shutil.rmtree(work, ignore_errors=True)


def write_images(folder: Path) -> None:
    """Some of the built-in digits as a folder of images."""
    from PIL import Image

    data = load_dataset("digits", 200, 100)
    for part in ("train", "test"):
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = folder / part / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * image.view(data.shape)).byte().numpy()).save(path)


class Trial:
    """A copy of the checkout in which commands are run and disturbed."""

    def __init__(self, folder: Path, source: Path) -> None:
        shutil.copytree(source, folder / "copy")
        self.folder, self.outside = folder / "copy", folder / "copy"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.entry: list[str] = []  # before a command: where its disk is small
        self.said = ""
        self.stack = ExitStack()  # what is undone once the next run is judged

    def start(self, command: Command) -> subprocess.Popen:
        """Begin a command, in a session of its own."""
        environment = os.environ | {MARK: str(self.folder), "TMPDIR": str(self.temporary)}
        for name in ("MAKEFLAGS", "MAKELEVEL", "FF_DATA_DIR"):
            environment.pop(name, None)
        return subprocess.Popen(
            [*self.entry, "sh", "-c", f"cd '{self.folder}' && {command.line}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            # In the background it may be ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self, process: subprocess.Popen) -> int:
        """Wait for a command; its exit status, and what it said in `said`."""
        try:
            self.said = process.communicate(timeout=TIME_LIMIT)[0]
        except subprocess.TimeoutExpired as error:
            for one in running(str(self.folder)):
                one.kill()
            raise FaultError(f"it was still running after {TIME_LIMIT} s") from error
        return process.returncode

    def run(self, command: Command) -> int:
        """Run a command to its end."""
        return self.finish(self.start(command))

    def metrics(self, command: Command) -> object:
        """The metrics that a command wrote, times and process memory apart."""
        path = self.outside / command.result
        if path.suffix == ".csv":
            # Threads: a point has more of them as long as only one of two workers has come.
            return pd.read_csv(path).drop(columns=["wall_seconds", "commit", "threads"]).to_json()
        record = json.loads(path.read_text(encoding="utf-8"))
        return without_times(record.get("metrics", record))

    def leftovers(self) -> list[str]:
        """Temporary files, and processes that have not ended after a while."""
        deadline = time.monotonic() + GRACE
        while (left := running(str(self.folder))) and time.monotonic() < deadline:
            time.sleep(0.5)
        left = [f"the process {title(one)}" for one in left]
        for folder in ("build", "data"):
            left += [p.name for p in (self.outside / folder).rglob(".*") if p.name != ".locks"]
        names = [path.name for path in self.temporary.iterdir()]
        return left + [f"tmp/{name}" for name in names if not name.startswith(CACHES)]


def running(folder: str) -> list[psutil.Process]:
    """Processes of the trials in a folder, or of the one whose folder it is."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get(MARK, "").startswith(folder):
                found += [one] if one.status() != psutil.STATUS_ZOMBIE else []
        except psutil.Error:
            continue
    return found


def without_times(metrics: object) -> object:
    """Metrics without what another run of the same code may have otherwise."""
    if isinstance(metrics, dict):
        kept = {name: value for name, value in metrics.items() if not TIMES.search(name)}
        return {name: without_times(value) for name, value in kept.items()}
    if isinstance(metrics, list):
        rows = [v for v in metrics if not isinstance(v, dict) or v.get("instrument") not in PROCESS]
        return [without_times(value) for value in rows]
    return metrics


def title(one: psutil.Process) -> str:
    """What a process is, in a word."""
    known = {
        "dask_scheduler": "scheduler",
        "dask_worker": "worker",
        "ipykernel_launcher": "kernel",
        "torch.distributed.run": "torchrun",
        "ff_utils.distributed": "rank",
        "ff_utils": "runner",
    }
    try:
        words = [word.removeprefix("distributed.cli.") for word in one.cmdline()]
        return next((known[word] for word in words if word in known), one.name())
    except psutil.Error:
        return "gone"


@contextmanager
def small_disk(trial: Trial, size: int) -> Iterator[None]:
    """Within, commands see disks of `size` bytes where they write; OSError where that can't be."""
    places = [trial.folder / "build", trial.folder / "data" / "results"]
    mount = (
        "for place; do mkdir -p $place && mount -t tmpfs -o size=$size disk $place || exit; done"
    )
    holder = subprocess.Popen(
        ["unshare", "-Urm", "sh", "-c", f"{mount}; echo ready; exec sleep {4 * TIME_LIMIT}", "sh"]
        + [str(place) for place in places],
        env=os.environ | {"size": str(size)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if holder.stdout.readline() != "ready\n":
            raise OSError("no small disk can be mounted")
        enter = ["nsenter", "-t", str(holder.pid), "-U", "-m", "--preserve-credentials"]
        trial.entry, trial.outside = enter, Path(f"/proc/{holder.pid}/root{trial.folder}")
        yield
    finally:
        holder.kill()
        holder.communicate()


# --- Faults ---------------------------------------------------------------------------------


def kill(trial: Trial, command: Command, dice: random.Random, seconds: float) -> str:
    """Signal one of a command's processes, at a random moment of its `seconds`."""
    moment, number = dice.uniform(0, seconds), dice.choice(SIGNALS)
    process = trial.start(command)
    time.sleep(moment)
    names = {one: title(one) for one in running(str(trial.folder))}
    if command.line.startswith("sh"):  # the shell that holds the cluster is the trial's own
        names = {one: name for one, name in names.items() if name not in ("sh", "sleep", "sed")}
    kinds = sorted(set(names.values()) - {"gone"})
    if not kinds:
        what = "nothing, it had ended"
    else:
        kind = dice.choice(kinds)
        victim = dice.choice([one for one, name in names.items() if name == kind])
        victim.send_signal(number)
        what = kind
    trial.finish(process)
    return f"{signal.Signals(number).name} to {what} after {moment:.1f} s"


def full_disk(trial: Trial, command: Command, dice: random.Random, _: float) -> str:
    """Let a command run out of disk; then there is room."""
    size = 4096 * dice.randint(1, 100)
    what = f"a disk of {utils.format_bytes(size)}"
    try:
        trial.stack.enter_context(small_disk(trial, size))
        code = trial.run(command)
        room = "for place in build data/results; do mount -o remount,size=1g $place; done"
        if trial.run(Command(room, "")):
            raise FaultError(f"the disk could not be made larger: {trial.said}")
    except OSError:
        what = f"files of at most {utils.format_bytes(size)}"
        # Where sh counts blocks of 512 bytes.
        code = trial.run(replace(command, line=f"ulimit -f {size // 512} && {command.line}"))
    return f"{what}, {'not enough' if code else 'enough'}"


def two_at_once(trial: Trial, command: Command, dice: random.Random, seconds: float) -> str:
    """Run a command twice, the second beginning at a random moment of the first."""
    moment = dice.uniform(0, seconds)
    first = trial.start(command)
    time.sleep(moment)
    second = trial.start(command)
    codes = [trial.finish(one) for one in (second, first)]
    return f"the second after {moment:.1f} s, exit status {codes[1]} and {codes[0]}"


def damage(trial: Trial, command: Command, dice: random.Random, _: float) -> str:
    """Damage a file, see that it is refused in a sentence or does no harm, and mend it."""
    for pattern in command.first:
        for path in trial.folder.glob(pattern):
            path.unlink()
    path = dice.choice(sorted(p for p in trial.folder.glob(dice.choice(command.damaged))))
    whole = path.read_bytes()
    ways = {
        "cut short": lambda at: whole[:at],
        "emptied": lambda _: b"",
        "overwritten with zeros": lambda at: whole[:at] + bytes(len(whole) - at),
        "with bytes of another file": lambda at: whole[:at] + b"\x00\xff\x10[" + whole[at + 4 :],
    }
    if path.suffix in (".pt", ".png") or path.name.startswith("epoch"):
        flip = 1 << dice.randrange(8)
        ways["with a flipped bit"] = lambda at: (
            whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
        )
    way = dice.choice(sorted(ways))
    if path.suffix == ".yaml" and way in ("cut short", "emptied"):
        way = "with bytes of another file"  # what is left would be a profile too
    path.write_bytes(ways[way](dice.randrange(len(whole))))
    what = f"{path.relative_to(trial.folder)} {way}"
    if trial.run(command) == 0:
        return f"{what}, not needed"
    errors = [line for line in trial.said.splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or ("Traceback" in trial.said and "torch.distributed" not in command.line):
        raise FaultError(f"{what}: {len(errors)} sentences: {trial.said[-300:]}")
    if command.inputs:
        path.write_bytes(whole)
    elif path.name.startswith("epoch"):
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    return f"{what}, refused"


WAYS = {"kill": kill, "full disk": full_disk, "two at once": two_at_once, "damage": damage}


def run_trial(seed: int, work: Path, whole: dict[str, tuple[Path, object, float]]) -> dict:
    """One trial; its row of the table. whole: undisturbed runs by their command, kept for others:
    the folder, the metrics and the seconds."""
    dice = random.Random(seed)
    rounds, place = divmod(seed, len(FAULTS))
    fault = FAULTS[place]
    table = DAMAGED if fault == "damage" else COMMANDS
    if fault in ("full disk", "two at once"):
        table = {name: one for name, one in table.items() if name != "Dask workers"}
    earlier = FAULTS.count(fault) * rounds + FAULTS[:place].count(fault)
    name, command = list(table.items())[earlier % len(table)]  # each in turn
    if command.line not in whole:
        undisturbed = Trial(work / f"whole-{len(whole)}", work / "checkout")
        start = time.monotonic()
        if undisturbed.run(command):
            raise RuntimeError(f"undisturbed, `{command.line}` fails: {undisturbed.said[-1000:]}")
        spent = time.monotonic() - start
        whole[command.line] = undisturbed.folder, undisturbed.metrics(command), spent
    folder, expected, seconds = whole[command.line]
    start, why, what = time.monotonic(), "", ""
    trial = Trial(work / str(seed), folder if fault == "damage" else work / "checkout")
    with trial.stack:
        try:
            what = WAYS[fault](trial, command, dice, seconds)
            if code := trial.run(command):
                raise FaultError(f"exit status {code} of the next run: {trial.said[-300:]}")
            if trial.metrics(command) != expected:
                raise FaultError("the next run's metrics differ")
            if left := trial.leftovers():
                raise FaultError(f"left behind: {', '.join(left[:3])}")
        except (FaultError, OSError, ValueError, LookupError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
    if not why:
        shutil.rmtree(work / str(seed), ignore_errors=True)
    return {
        "seed": seed,
        "fault": fault,
        "of": name,
        "what": what,
        "survived": not why,
        "why": why,
        "seconds": round(time.monotonic() - start, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Try faults and print a table of what was survived; exits with 1 where something was not."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils faults", description=main.__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial, + 1 for each next")
    parser.add_argument("--record", action="store_true", help="write data/results/faults.json")
    options = parser.parse_args(arguments)
    parameters = {"trials": options.trials, "seed": options.seed}
    run = records.Run("faults", "faults", parameters, file=utils.RESULTS / "faults.json")
    rows, whole = [], {}
    with workplace("faults-") as work:
        write_images(work / "checkout" / "images")
        for name, text in FILES.items():
            (work / "checkout" / name).write_text(text)
        for seed in range(options.seed, options.seed + options.trials):
            row = run_trial(seed, work, whole)
            rows.append(row)
            outcome = "survived" if row["survived"] else f"NOT SURVIVED: {row['why']}"
            print(f"seed {seed}: {row['fault']}, {row['of']}: {row['what']}: {outcome}", flush=True)
            if not row["survived"]:
                (work / "keep").touch()
    table = pd.DataFrame(rows)
    print(table.groupby(["fault", "of"]).survived.agg(tried="count", survived="sum").to_string())
    print(f"{table.survived.sum()} of {len(table)} survived")
    if options.record:
        run.finish({"trials": table.drop(columns="seconds")})
    if not table.survived.all():
        sys.exit(f"error: the folders of the trials that did not survive are in {work}")
