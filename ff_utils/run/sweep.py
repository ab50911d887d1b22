"""Parameter sweeps: a notebook run at every point of a grid, side by side, resumable, in one table.

`python -m ff_utils.sweep FILE [--dry-run] [--jobs N] [--scheduler tcp://...] [--retry-failed]`

FILE is a YAML file, or the name of one in `notebooks/sweeps/`. Its keys:

    notebook  name of the notebook to run
    profile   whose values the parameters have that the sweep does not set (the notebook's own)
    fixed     parameters that are the same at every point
    grid      for each parameter a list, {range: [first, last, step]} or
              {log_range: [first, last, count]}; every combination is a point
    points    parameters together, a list of mappings; each is crossed with the grid
    seeds     a list, or how many: values of the parameter `seed`, at every point
    metrics   columns of the table: name -> dotted path into the record's metrics, every number
              and text where not given. With `[]` after a list's name, a row an element.
    alone     true: one point at a time, nothing beside it, for time and memory

Points run under Dask, each in a kernel of its own. Their files in `data/results/sweeps/NAME/` say
what is done, so that the same command goes on where a stopped or killed one was:

    HASH.ipynb and HASH.json                  done: the executed notebook and its record
    HASH.failed.ipynb and HASH.failed.json    failed: the notebook up to there, and why

Dask's workers import this module, so that heavy packages are imported where they are used.
"""

import argparse
import hashlib
import itertools
import json
import logging
import math
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import nbformat
import psutil

from ff_utils import utils
from ff_utils.run import notebooks

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client

KEYS = ("notebook", "profile", "fixed", "grid", "points", "seeds", "metrics", "alone")
STATUSES = DONE, FAILED, TO_DO = "done", "failed", "to do"
# Code that draws, tells or runs: a change to it changes no result.
NO_RESULT = (
    "__main__.py",
    "pipeline.py",
    "pipelined.py",
    "report/claims.py",
    "report/plots.py",
    "run/",
    "sweep.py",
)
COLUMNS = ("status", "reason", "wall_seconds", "notebook", "point")
PROVENANCE = ("commit", "torch", "device", "threads")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SECONDS_TO_ANSWER = 3
MOST_POINTS = 10_000

_stopped: set[str] = set()  # keys of the points that `stop` ended


# --- Points ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What is run (a notebook with all its parameters) and where its files are.

    given: the parameters that differ from point to point. lock: the name of the lock it waits for,
    its own or that of a sweep whose points run alone.
    """

    folder: Path
    notebook: Path
    key: str
    parameters: dict
    given: dict
    lock: str

    def file(self, ending: str) -> Path:
        """The file of this point with this ending."""
        return self.folder / f"{self.key}{ending}"

    def record(self) -> dict | None:
        """The record, or None where there is no whole one of this notebook."""
        record = _read(self.file(".json")) or {}
        parts = [record.get(part) for part in ("metrics", "provenance")]
        whole = all(isinstance(part, dict) and part for part in parts)
        return record if whole and record.get("notebook") == self.notebook.stem else None

    def status(self) -> tuple[str, dict]:
        """What has become of it, with its record or the reason of its failure."""
        record = self.record()
        if record and self.file(".ipynb").exists():
            return DONE, record
        failure = _read(self.file(".failed.json"))
        return (FAILED, failure) if failure else (TO_DO, {})

    def fail(self, reason: str, seconds: float | None = None) -> str:
        """Keep why it failed, in one line; returns FAILED."""
        failure = {"reason": " ".join(reason.split()) or "no reason was given", "seconds": seconds}
        utils.write_text(self.file(".failed.json"), json.dumps(failure) + "\n")
        return FAILED

    @property
    def title(self) -> str:
        """What it sets, to tell it from the others."""
        return " ".join(f"{name}={_cell(value)}" for name, value in self.given.items())


def run_point(point: Point, jobs: int) -> str:
    """Run a point unless it is done; returns DONE, FAILED, or TO_DO where it was stopped.

    jobs: kernels that run side by side on this machine and share its cores.
    """
    from dask.system import CPU_COUNT

    lock = point.folder / ".locks" / point.lock
    lock.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(lock):  # which dies with its process
        status = point.status()[0]
        if status == TO_DO:  # and no other sweep has run it meanwhile
            status = _run(point, dict.fromkeys(THREADS, str(max(1, CPU_COUNT // jobs))))
        return status


def _run(point: Point, environment: dict[str, str]) -> str:
    for left in point.folder.glob(f".{point.key}.*"):  # by a run that was killed
        left.unlink(missing_ok=True)
    values = point.parameters | {"record_file": utils.relative(point.file(".json"))}
    start = time.perf_counter()
    try:
        notebooks.execute(point.notebook, point.file(".ipynb"), values, environment=environment)
    except notebooks.NotebookError as error:
        if point.key in _stopped:
            _stopped.discard(point.key)
            point.file(".failed.ipynb").unlink(missing_ok=True)
            return TO_DO
        return point.fail(error.reason, round(time.perf_counter() - start, 2))
    record = point.record()
    if record is None:
        point.file(".ipynb").replace(point.file(".failed.ipynb"))
        return point.fail("it wrote no record: end the notebook with run.finish(...).")
    seconds = {"seconds": round(time.perf_counter() - start, 2)}
    utils.write_text(point.file(".json"), json.dumps(record | seconds, indent=1) + "\n")
    return DONE


def stop(keys: set[str]) -> None:
    """End this process's kernels that run these points; those are then to do, not failed."""
    for child in psutil.Process().children():
        try:
            key = next((Path(part).stem for part in child.cmdline() if part.endswith(".json")), "")
            if key in keys:
                _stopped.add(key)
                child.kill()
        except psutil.Error:
            continue


def _read(path: Path) -> dict | None:
    """A JSON object, or None where there is no whole one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# --- The file -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked, with all its points."""

    name: str
    spec: dict
    file: str
    points: list[Point]

    @property
    def folder(self) -> Path:
        """Where its points' files are; its tables are beside it."""
        return utils.RESULTS / "sweeps" / self.name

    @property
    def alone(self) -> bool:
        """Whether its points run one at a time."""
        return self.spec.get("alone", False)


def load(file: str | Path) -> Sweep:
    """A checked sweep from its file, or from its name in `notebooks/sweeps`.

    Raises ValueError, in one sentence, for whatever is wrong with it.
    """
    path = utils.user_path(file)
    if not path.suffix and not path.is_file():
        utils.check_choice("sweep", str(file), shipped())
        path = utils.NOTEBOOKS / "sweeps" / f"{file}.yaml"
    place = utils.relative(path.resolve())
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{place} cannot be read: {error}") from error
    spec = notebooks.read_yaml(text, place)
    try:
        return resolve(path.stem, spec, place)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def shipped() -> list[str]:
    """Names of the sweeps in `notebooks/sweeps`."""
    return sorted(path.stem for path in (utils.NOTEBOOKS / "sweeps").glob("*.yaml"))


def resolve(name: str, spec: dict, file: str) -> Sweep:
    """The sweep that a file's content describes; every name and every value is checked."""
    _mapping("the file", spec)
    utils.check_names("it has the key", spec, KEYS)
    known = sorted(path.stem for path in utils.NOTEBOOKS.glob("*.ipynb"))
    utils.check_choice("notebook", spec.get("notebook"), known)
    path = utils.NOTEBOOKS / f"{spec['notebook']}.ipynb"
    kinds = notebooks.parameters(path)
    named = kinds.pop("profile", None)  # not for the sweep to set
    if not isinstance(spec.get("alone", False), bool):
        raise ValueError(f"alone is {spec['alone']!r}; give true or false.")
    if "metrics" in spec:
        _check_metrics(spec["metrics"], kinds)
    values = {parameter: default for parameter, (_, default) in kinds.items()}
    if "profile" in spec:
        values |= notebooks.profile_values(spec["profile"], path.stem)
    fixed = _mapping("fixed", spec.get("fixed", {}))
    code, points, axes = code_digest(path), {}, _axes(spec, kinds)
    _check_count("it", math.prod(map(len, axes)))
    for parts in itertools.product(*axes):
        names = Counter(name for part in (fixed, *parts) for name in part)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"{twice[0]} is set twice, by fixed, points, grid or seeds; keep one.")
        given = {name: value for part in parts for name, value in part.items()}
        parameters = notebooks.check_values(path.stem, kinds, values | fixed | given)
        given = {name: parameters[name] for name in given}
        if named:  # as of any run with values of its own
            parameters["profile"] = "interactive"
        text = json.dumps([path.stem, sorted(parameters.items()), code], default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        lock = "alone" if spec.get("alone") else key
        folder = utils.RESULTS / "sweeps" / name
        points.setdefault(key, Point(folder, path, key, parameters, given, lock))
    return Sweep(name, spec, file, list(points.values()))


def _axes(spec: dict, kinds: dict) -> list[list[dict]]:
    """Lists of what points set: entries of points, values in the grid, seeds, to be crossed."""
    axes = []
    if "points" in spec:
        entries = spec["points"]
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"points is {entries!r}; give a list of mappings, one or more.")
        axes.append([_mapping("an entry of points", entry) for entry in entries])
    if "grid" in spec:
        if not _mapping("grid", spec["grid"]):
            raise ValueError("grid is empty; give at least one parameter and its values.")
        utils.check_names("grid has the parameter", spec["grid"], kinds)
        for name, values in spec["grid"].items():
            whole = kinds[name][0] == "int"
            axes.append([{name: value} for value in _axis(name, values, whole)])
    if "seeds" in spec:
        seeds = spec["seeds"]
        if not isinstance(seeds, list):
            utils.check_number("seeds", seeds, 1, MOST_POINTS, whole=True)
            seeds = list(range(seeds))
        axes.append([{"seed": seed} for seed in _axis("seeds", seeds, True)])
    if not axes:
        raise ValueError("it has no grid, points or seeds; give at least one of them.")
    return axes


def _axis(name: str, values: object, whole: bool) -> list:
    """The values of a grid's parameter: a list as it is, or a range written out."""
    if isinstance(values, dict) and len(values) == 1:
        (kind, numbers), *_ = values.items()
        utils.check_names(f"{name} has", [kind], ("range", "log_range"))
        types = [type(number) for number in numbers] if isinstance(numbers, list) else []
        if len(types) != 3 or not set(types) <= {int, float}:
            raise ValueError(f"the {kind} of {name} is {numbers!r}; give three numbers.")
        values = (_range if kind == "range" else _log_range)(name, *numbers, whole)
    if not isinstance(values, list):
        raise ValueError(f"{name} is {values!r}; give a list, a range or a log_range.")
    if not values:
        raise ValueError(f"{name} has no values in the grid; give at least one.")
    return values


def _range(name: str, first: float, last: float, step: float, whole: bool) -> list:
    """From `first` in steps up (or down) to `last`, which belongs to it."""
    if step == 0 or (last - first) / step < 0 or not math.isfinite(last - first):
        raise ValueError(f"the range of {name} never comes from {first} to {last}; mend its step.")
    count = math.floor((last - first) / step + 1e-9) + 1
    _check_count(f"the range of {name}", count)
    return [first + k * step if whole else float(f"{first + k * step:.12g}") for k in range(count)]


def _log_range(name: str, first: float, last: float, count: int, whole: bool) -> list:
    """`count` numbers from `first` to `last`, evenly spaced as factors, to three digits."""
    for end in (first, last):
        utils.check_number(f"log_range of {name}", end, 0, above=True)
    utils.check_number(f"count in the log_range of {name}", count, 2, MOST_POINTS, whole=True)
    values = [first * (last / first) ** (k / (count - 1)) for k in range(count)]
    return [round(value) if whole else float(f"{value:.3g}") for value in values]


def _check_count(what: str, count: int) -> None:
    if count > MOST_POINTS:
        raise ValueError(f"{what} has {count:,} points; give at most {MOST_POINTS:,}.")


def _mapping(what: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}; give a mapping of names to values.")
    return value


def _check_metrics(metrics: object, kinds: dict) -> None:
    for name, path in _mapping("metrics", metrics).items():
        if not isinstance(path, str) or path.count("[]") > 1:
            raise ValueError(f"the metric {name} is {path!r}; give a path such as a.b or rows[].b.")
        if name in kinds or name in (*COLUMNS, *PROVENANCE):
            raise ValueError(f"the metric {name} has the name of another column; give another.")
    if len({path.split("[]")[0] for path in metrics.values() if "[]" in path}) > 1:
        raise ValueError("metrics has [] after two lists; a row can stand for one of them only.")


def code_digest(notebook: Path) -> str:
    """SHA-256 of what decides a result: the module's code and the notebook's, parameters apart."""
    digest, module = hashlib.sha256(), utils.ROOT / "ff_utils"
    for path in sorted(module.rglob("*.py")):
        if not path.relative_to(module).as_posix().startswith(NO_RESULT):
            digest.update(path.read_bytes())
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            digest.update(cell.source.encode() + b"\0")
    return digest.hexdigest()


# --- The table ------------------------------------------------------------------------------


def table(name: str) -> "pd.DataFrame":
    """A sweep's table: a row a point (or an element of a metric's list), in the file's order.

    Columns: parameters, metrics, status (done, failed, to do), reason, wall_seconds, commit,
    torch, device, threads, notebook, point (the name of its files). Lists are written as JSON.
    Where nothing has run here, the table that was written last, which may come with the
    repository; ValueError where there is none.
    """
    import pandas as pd

    begun = _read(utils.RESULTS / "sweeps" / name / "sweep.json")
    if begun:
        found = gather(resolve(name, begun["spec"], begun["file"]))
        if not found.status.eq(TO_DO).all():
            return found
    written = utils.RESULTS / "sweeps" / f"{name}.parquet"
    if written.exists():
        return pd.read_parquet(written)
    raise ValueError(f"{utils.relative(written)} is missing: run `make sweep SWEEP={name}`.")


def gather(sweep: Sweep) -> "pd.DataFrame":
    """The table of a sweep from its points' files."""
    import pandas as pd

    wanted, rows, metrics = sweep.spec.get("metrics"), [], {}
    for point in sweep.points:
        status, found = point.status()
        made = found.get("provenance", {})
        given = {name: _cell(v) for name, v in point.parameters.items() if name != "profile"}
        about = {
            "status": status,
            "reason": found.get("reason"),
            "wall_seconds": found.get("seconds", made.get("wall_seconds")),
            **{name: made.get(name) for name in PROVENANCE},
            "notebook": point.notebook.stem,
            "point": point.key,
        }
        for row in _metric_rows(found.get("metrics", {}), wanted):
            row = {f"metrics.{name}" if name in given else name: v for name, v in row.items()}
            metrics |= dict.fromkeys(row)
            rows.append(given | row | about)
    table = pd.DataFrame(rows, columns=[*given, *metrics, *about])
    for name, column in table.items():  # Parquet wants one type a column
        if column.dtype == object and column.dropna().map(type).nunique() > 1:
            table[name] = column.map(json.dumps, na_action="ignore")
    return table


def varied(table: "pd.DataFrame") -> list[str]:
    """The parameters that have more than one value in a sweep's table, its seeds apart."""
    names = notebooks.parameters(utils.NOTEBOOKS / f"{table.notebook.iloc[0]}.ipynb")
    return [n for n in names if n in table and n != "seed" and table[n].nunique() > 1]


def _metric_rows(metrics: dict, wanted: dict | None) -> list[dict]:
    """The wanted metrics, or every number and text; several rows where a path has []."""
    import pandas as pd

    if wanted is None:
        flat = pd.json_normalize(metrics).to_dict("records") or [{}]
        return [{name: v for name, v in flat[0].items() if not isinstance(v, list)}]
    listed = next((path.split("[]")[0] for path in wanted.values() if "[]" in path), None)
    elements = utils.value_at(metrics, listed) if listed else None
    rows = []
    for element in elements if isinstance(elements, list) and elements else [{}]:
        row = {}
        for name, path in wanted.items():
            _, inside, below = path.partition("[]")
            place = (element, below) if inside else (metrics, path)
            row[name] = _cell(utils.value_at(*place))
        rows.append(row)
    return rows


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value


def write_table(sweep: Sweep) -> "pd.DataFrame":
    """Write a sweep's table as CSV and Parquet; returns it."""
    found = gather(sweep)
    utils.write_text(sweep.folder.with_suffix(".csv"), found.to_csv(index=False))
    parquet = sweep.folder.with_suffix(".parquet")
    utils.replace_file(parquet, lambda temporary: found.to_parquet(temporary, index=False))
    return found


# --- The run --------------------------------------------------------------------------------


def run(sweep: Sweep, jobs: int, scheduler: str | None = None, retry_failed: bool = False) -> None:
    """Run what is to do and write the table, also where it is interrupted.

    Raises ValueError where the folder is another sweep's, RuntimeError where the scheduler is not
    there.
    """
    refuse_foreign_folder(sweep)
    about = {"name": sweep.name, "file": sweep.file, "spec": sweep.spec}
    text = json.dumps(about, indent=1, default=str) + "\n"
    utils.write_text(sweep.folder / "sweep.json", text)
    if retry_failed:
        for point in sweep.points:
            point.file(".failed.json").unlink(missing_ok=True)
    to_do = [point for point in sweep.points if point.status()[0] == TO_DO]
    try:
        if to_do:
            _run_all(sweep, to_do, 1 if sweep.alone else jobs, scheduler)
    finally:
        write_table(sweep)


def refuse_foreign_folder(sweep: Sweep) -> None:
    """ValueError where a sweep's folder holds files of something else, or its table is ours."""
    ours = utils.NOTEBOOKS / "sweeps" / f"{sweep.name}.yaml"
    if ours.exists() and utils.relative(ours) != sweep.file:
        raise ValueError(
            f"{sweep.file} has the name of {utils.relative(ours)}, whose table is kept: rename it."
        )
    if not sweep.folder.exists() or not any(sweep.folder.iterdir()):
        return
    place = utils.relative(sweep.folder)
    remedy = f"rename {sweep.name}.yaml, or delete the folder"
    begun = _read(sweep.folder / "sweep.json")
    if begun is None:
        raise ValueError(f"{place} holds files, but of no sweep: {remedy}.")
    there = {"file": begun["file"], "notebook": begun["spec"]["notebook"]}
    for key, here in {"file": sweep.file, "notebook": sweep.spec["notebook"]}.items():
        if there[key] != here:
            other = f"another sweep, whose {key} is {there[key]} and not {here}"
            raise ValueError(f"{place} is of {other}: {remedy}.")


def _run_all(sweep: Sweep, to_do: list[Point], jobs: int, scheduler: str | None) -> None:
    """Run points, with a line for each as it is finished."""
    random.shuffle(to_do)  # so that sweeps which share the points seldom wait for the same ones
    with _cluster(min(jobs, len(to_do)), scheduler) as client:
        if scheduler and not sweep.alone:
            jobs = _kernels_of_a_machine(client)
        start = time.monotonic()
        try:
            for number, (point, status) in enumerate(_finished(client, to_do, jobs), 1):
                spent = time.monotonic() - start
                left = f"about {_duration(spent / number * (len(to_do) - number))} left"
                when = left if number < len(to_do) else _duration(spent)
                why = f": {point.status()[1].get('reason')}" if status == FAILED else ""
                print(f"{number} of {len(to_do)}, {when}: {point.title} {status}{why}", flush=True)
        except KeyboardInterrupt:
            client.cancel(list(client.futures), force=True)
            client.run(stop, {point.key for point in to_do}, on_error="ignore")
            raise


def _finished(client: "Client", to_do: list[Point], jobs: int) -> Iterator[tuple[Point, str]]:
    """Each point as it is finished, with what became of it."""
    from distributed import KilledWorker, as_completed

    points = {client.submit(run_point, point, jobs, pure=False): point for point in to_do}
    for future in as_completed(points):
        point = points[future]
        if future.status == "finished":
            yield point, future.result()
        elif future.cancelled():
            raise RuntimeError("the scheduler went away: run the same command to go on.")
        elif isinstance(error := future.exception(), KilledWorker):
            reason = "its workers died, most often for lack of memory: lower its sizes"
            yield point, point.fail(reason)
        else:
            yield point, point.fail(f"{type(error).__name__}: {error}")


@contextmanager
def _cluster(points: int, scheduler: str | None) -> "Iterator[Client]":
    """A client of the user's cluster, or of one in this process that runs `points` at a time.

    A thread a point is enough, because its work is done in its kernel.
    """
    import dask
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if scheduler:
        with _their_client(scheduler) as client:
            yield client
        return
    with (
        notebooks.temporary_folder() as folder,
        dask.config.set({"temporary-directory": str(folder)}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=points,
            processes=False,
            memory_limit=None,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _their_client(scheduler: str) -> "Client":
    """A client of a running cluster whose workers have this checkout; RuntimeError."""
    from distributed import Client

    try:
        client = Client(scheduler, timeout=SECONDS_TO_ANSWER)
    except (OSError, ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"the scheduler at {scheduler} does not answer: start it, or leave --scheduler out."
        ) from error
    try:
        client.wait_for_workers(1, timeout=SECONDS_TO_ANSWER)
        roots = set(client.run(lambda: utils.ROOT).values())
    except Exception as error:
        raise RuntimeError(
            f"{scheduler} has no workers that can import ff_utils ({error}): start them with this "
            f"environment, as in `dask worker {scheduler}`."
        ) from error
    if roots != {utils.ROOT}:
        raise RuntimeError(f"a worker of {scheduler} has another checkout: start it from this one.")
    return client


def _kernels_of_a_machine(client: "Client") -> int:
    """The most kernels that run on one machine of a cluster."""
    threads = Counter()
    for worker in client.scheduler_info(n_workers=-1)["workers"].values():
        threads[worker["host"]] += worker["nthreads"]
    return max(threads.values())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# --- Command line ---------------------------------------------------------------------------


def dry_run(sweep: Sweep, jobs: int) -> None:
    """Print every point with its status, and how long the rest may take."""
    found = [point.status() for point in sweep.points]
    for point, (status, _) in zip(sweep.points, found, strict=True):
        print(f"{status:7} {point.key}  {point.title}")
    seconds = [done["seconds"] for status, done in found if status == DONE and "seconds" in done]
    whence = "the median of those done"
    if not seconds:
        record = _read(utils.RESULTS / "default" / f"{sweep.spec['notebook']}.json") or {}
        seconds = [s] if (s := record.get("provenance", {}).get("wall_seconds")) else []
        whence = "as in the notebook's own record"
    left = sum(status == TO_DO for status, _ in found)
    jobs = 1 if sweep.alone else jobs
    about = "how long they take is not known"
    if seconds:
        each = statistics.median(seconds)
        about = f"about {_duration(each * math.ceil(left / jobs))} with {jobs} at a time"
        about += f" ({each:.1f} s each, {whence})"
    print(f"{_count(sweep)}; {about}" if left else _count(sweep))


def _count(sweep: Sweep) -> str:
    found = Counter(point.status()[0] for point in sweep.points)
    counts = ", ".join(f"{found[status]} {status}" for status in STATUSES)
    return f"{sweep.name}: {len(sweep.points)} points, {counts}"


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def main(arguments: list[str] | None = None) -> None:
    """Run a sweep, or list its points; what is wrong is one sentence and a non-zero exit."""
    from dask.system import CPU_COUNT

    parser = argparse.ArgumentParser(prog="python -m ff_utils.sweep", description=main.__doc__)
    parser.add_argument("file", help=f"a YAML file, or one of: {', '.join(shipped())}")
    parser.add_argument("--dry-run", action="store_true", help="list the points, run none")
    parser.add_argument("--jobs", type=int, default=CPU_COUNT, help="points side by side")
    parser.add_argument("--scheduler", help="a Dask scheduler of your own, as tcp://host:8786")
    parser.add_argument("--retry-failed", action="store_true", help="run failed points again")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        utils.check_number("--jobs", options.jobs, 1, 1000, whole=True)
        sweep = load(options.file)
        if options.dry_run:
            refuse_foreign_folder(sweep)
            dry_run(sweep, options.jobs)
            return
        if sweep.alone and options.jobs > 1:
            print(f"{sweep.name}: its points run one at a time, with nothing beside them")
        run(sweep, options.jobs, options.scheduler, options.retry_failed)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        print(f"stopped; {_count(sweep)}: run the same command to go on", file=sys.stderr)
        sys.exit(128 + (error.args or [signal.SIGINT])[0])
    counts = _count(sweep)
    if f" 0 {FAILED}" not in counts:
        counts += " (--retry-failed runs failed ones again)"
    print(f"{counts}\n{utils.relative(sweep.folder.with_suffix('.csv'))}")
