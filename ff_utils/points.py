"""A point of a sweep: one run of a notebook in a kernel of its own, its files and its lock.

Dask's workers import this, so that nothing heavy is imported here. What has become of a point is
told by its files alone:

    HASH.ipynb and HASH.json                  done: the executed notebook and its record
    HASH.failed.ipynb and HASH.failed.json    failed: the notebook up to there, and why
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ff_utils import files, paths, pipeline

STATUSES = DONE, FAILED, TO_DO = "done", "failed", "to do"
BUSY = "busy"  # another sweep is at it
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_stopped: set[str] = set()  # points whose kernels `stop` ended


@dataclass(frozen=True)
class Point:
    """What is run (a notebook with all its parameters) and where its files are.

    given: the parameters that differ from point to point.
    """

    folder: Path
    notebook: Path
    key: str
    parameters: dict
    given: dict

    def file(self, ending: str) -> Path:
        """The file of this point with this ending."""
        return self.folder / f"{self.key}{ending}"

    def record(self) -> dict | None:
        """The record, or None where there is no whole one of this notebook."""
        found = read(self.file(".json"))
        return found if found and found.get("notebook") == self.notebook.stem else None

    def status(self) -> tuple[str, dict]:
        """What has become of it, with its record or the reason of its failure."""
        record = self.record()
        if record and self.file(".ipynb").exists():
            return DONE, record
        failure = read(self.file(".failed.json"))
        return (FAILED, failure) if failure else (TO_DO, {})

    def fail(self, reason: str, seconds: float | None = None) -> None:
        """Keep why it failed, in one line."""
        reason = " ".join(reason.split()) or "no reason was given"
        text = json.dumps({"reason": reason, "seconds": seconds}) + "\n"
        files.write_atomically(self.file(".failed.json"), text)

    def forget_failure(self) -> None:
        """Have it to do again."""
        with locked(self.folder, self.key) as mine:
            if mine:
                self.file(".failed.json").unlink(missing_ok=True)


def run(point: Point, jobs: int, lock: str) -> str:
    """Run a point unless it is done; returns DONE, FAILED, BUSY, or TO_DO where it was stopped.

    jobs: kernels that run side by side on this machine, which share its cores.
    lock: name of the lock to hold, the point's own or that of a sweep whose points run alone.
    """
    with locked(point.folder, lock) as mine:
        if not mine:
            return BUSY
        if (known := point.status()[0]) != TO_DO:
            return known
        for left in point.folder.glob(f".{point.key}.*"):  # by a run that was killed
            left.unlink(missing_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # failures are told by files
        environment = {paths.RECORD: str(point.file(".json"))} | dict.fromkeys(THREADS, threads)
        start = time.perf_counter()
        try:
            pipeline.execute(point.notebook, point.file(".ipynb"), point.parameters, environment)
        except pipeline.PipelineError as error:
            if point.key in _stopped:
                _stopped.discard(point.key)
                point.file(".failed.ipynb").unlink(missing_ok=True)
                return TO_DO
            point.fail(error.reason, round(time.perf_counter() - start, 2))
            return FAILED
        record = point.record()
        if record is None:
            point.file(".ipynb").replace(point.file(".failed.ipynb"))
            point.fail("it wrote no record: end the notebook with run.finish(...).")
            return FAILED
        seconds = {"seconds": round(time.perf_counter() - start, 2)}
        files.write_atomically(point.file(".json"), json.dumps(record | seconds, indent=1) + "\n")
        return DONE


@contextmanager
def locked(folder: Path, name: str) -> Iterator[bool]:
    """Hold a lock that dies with its process; False where somebody else has it."""
    path = folder / ".locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def stop(folder: Path) -> None:
    """End this process's kernels that run points of `folder`; those are then to do, not failed."""
    import psutil

    for child in psutil.Process().children():
        try:
            record = Path(child.environ().get(paths.RECORD, ""))
            if record.parent == folder:
                _stopped.add(record.stem)
                child.kill()
        except psutil.Error:
            continue


def root() -> Path:
    """Where this process's `ff_utils` is."""
    return paths.ROOT


def read(path: Path) -> dict | None:
    """A JSON object, or None where there is no whole one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
