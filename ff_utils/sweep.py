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
what is done, so that the same command goes on where a stopped or killed one was.
"""

import argparse
import hashlib
import itertools
import json
import logging
import math
import os
import re
import signal
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ff_utils import checks, files, paths, points
from ff_utils.pipeline import PipelineError, profile_parameters, refuse_unknown
from ff_utils.points import BUSY, DONE, FAILED, STATUSES, TO_DO, Point

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client, Future

KEYS = ("notebook", "profile", "fixed", "grid", "points", "seeds", "metrics", "alone")
# Modules that draw, tell or run: a change to them changes no result.
NO_RESULT = {"claims.py", "figures.py", "pipeline.py", "points.py", "progress.py", "readme.py"}
NO_RESULT.add("sweep.py")
ABOUT = ("status", "reason", "wall_seconds", "notebook", "point")
PROVENANCE = ("commit", "torch", "device", "threads")
SECONDS_TO_ANSWER = 3


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked, with all its points."""

    name: str
    spec: dict
    file: str
    points: list[Point]

    @property
    def folder(self) -> Path:
        """Where its points' files are."""
        return folder(self.name)

    @property
    def alone(self) -> bool:
        """Whether its points run one at a time."""
        return self.spec.get("alone", False)


def folder(name: str) -> Path:
    """Where the files of a sweep's points are; the tables are beside it."""
    return paths.RESULTS / "sweeps" / name


def table_path(name: str, ending: str) -> Path:
    """A sweep's table, "csv" or "parquet"."""
    return paths.RESULTS / "sweeps" / f"{name}.{ending}"


# --- The file -------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as the number it is."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load(file: str | Path) -> Sweep:
    """A checked sweep from its file, or from its name in `notebooks/sweeps`.

    Raises PipelineError or ValueError, in one sentence, for whatever is wrong with it.
    """
    path = Path(file)
    if not path.suffix and not path.is_file():
        checks.one_of("sweep", str(file), shipped())
        path = paths.NOTEBOOKS / "sweeps" / f"{file}.yaml"
    place = paths.relative(path.resolve())
    try:
        spec = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{place} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise PipelineError(f"{place} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return resolve(path.stem, spec, place)
    except (PipelineError, ValueError) as error:
        raise PipelineError(f"{place}: {error}") from error


def shipped() -> list[str]:
    """Names of the sweeps in `notebooks/sweeps`."""
    return sorted(path.stem for path in (paths.NOTEBOOKS / "sweeps").glob("*.yaml"))


def resolve(name: str, spec: dict, file: str) -> Sweep:
    """The sweep that a file's content describes; every name and every value is checked."""
    _mapping("the file", spec)
    refuse_unknown("it has the key", spec, KEYS)
    known = sorted(path.stem for path in paths.NOTEBOOKS.glob("*.ipynb"))
    checks.one_of("notebook", spec.get("notebook"), known)
    notebook = spec["notebook"]
    kinds = files.parameters(notebook)
    named = kinds.pop("profile", None)  # for the sweep to set
    if not isinstance(spec.get("alone", False), bool):
        raise ValueError(f"alone is {spec['alone']!r}; give true or false.")
    if "metrics" in spec:
        _check_metrics(spec["metrics"], kinds)
    values = {parameter: value for parameter, (_, value) in kinds.items()}
    if "profile" in spec:
        values |= profile_parameters(spec["profile"], notebook)
        values.pop("profile")
    fixed = _mapping("fixed", spec.get("fixed", {}))
    _check(notebook, kinds, fixed)
    code = _code_digest(notebook)
    found = {}
    for given in _given(spec, notebook, kinds):
        if twice := set(given) & set(fixed):
            raise ValueError(f"{min(twice)} is both fixed and varied; keep one.")
        parameters = _check(notebook, kinds, values | fixed | given)
        if named:  # as of any run with values of its own
            parameters["profile"] = "interactive"
        text = json.dumps([notebook, sorted(parameters.items()), code], default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        source = paths.NOTEBOOKS / f"{notebook}.ipynb"
        found.setdefault(key, Point(folder(name), source, key, parameters, given))
    return Sweep(name, spec, file, list(found.values()))


def _given(spec: dict, notebook: str, kinds: dict) -> Iterator[dict]:
    """What each point sets: points, crossed with the grid, crossed with the seeds."""
    axes = []
    if "points" in spec:
        entries = spec["points"]
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"points is {entries!r}; give a list of mappings, one or more.")
        axes.append([_mapping("an entry of points", entry) for entry in entries])
    if "grid" in spec:
        if not _mapping("grid", spec["grid"]):
            raise ValueError("grid is empty; give at least one parameter and its values.")
        refuse_unknown(f"{notebook} is given the parameter", spec["grid"], kinds)
        for name, values in spec["grid"].items():
            whole = kinds[name][0] == "int"
            axes.append([{name: value} for value in _axis(name, values, whole)])
    if "seeds" in spec:
        refuse_unknown(f"{notebook} is given the parameter", ["seed"], kinds)
        seeds = spec["seeds"]
        if not isinstance(seeds, list):
            checks.number("seeds", seeds, 1, whole=True)
            seeds = list(range(seeds))
        axes.append([{"seed": seed} for seed in _axis("seeds", seeds, True)])
    if not axes:
        raise ValueError("it has no grid, points or seeds; give at least one of them.")
    for parts in itertools.product(*axes):
        given = {}
        for part in parts:
            if twice := set(part) & set(given):
                raise ValueError(f"{min(twice)} is varied twice; keep one.")
            given |= _check(notebook, kinds, part)
        yield given


def _axis(name: str, values: object, whole: bool) -> list:
    """The values of a grid's parameter: a list as it is, or a range written out."""
    if isinstance(values, dict) and len(values) == 1:
        (kind, ends), numbers = next(iter(values.items())), (int, float)
        refuse_unknown(f"{name} has", [kind], ("range", "log_range"))
        if not isinstance(ends, list) or len(ends) != 3 or {type(e) for e in ends} - set(numbers):
            raise ValueError(f"the {kind} of {name} is {ends!r}; give three numbers.")
        values = (_range if kind == "range" else _log_range)(name, *ends, whole)
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
    return [first + k * step if whole else float(f"{first + k * step:.12g}") for k in range(count)]


def _log_range(name: str, first: float, last: float, count: int, whole: bool) -> list:
    """`count` numbers from `first` to `last`, evenly spaced as factors, to three digits."""
    for end in (first, last):
        checks.number(f"log_range of {name}", end, 0, above=True)
    checks.number(f"count in the log_range of {name}", count, 2, whole=True)
    found = [first * (last / first) ** (k / (count - 1)) for k in range(count)]
    return [round(value) if whole else float(f"{value:.3g}") for value in found]


def _mapping(what: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}; give a mapping of names to values.")
    return value


def _check(notebook: str, kinds: dict, given: dict) -> dict:
    """`given` in the notebook's types: names that exist, values that fit, an int a fine float."""
    refuse_unknown(f"{notebook} is given the parameter", given, kinds)
    checked = {}
    for name, value in given.items():
        kind = kinds[name][0]
        try:
            checked[name] = as_type(value, kind)
        except TypeError as error:
            raise ValueError(f"{name} is {value!r}; {notebook} wants {kind}.") from error
    return checked


def as_type(value: object, kind: str) -> object:
    """`value` as an annotation (`float`, `list[int]`, `int | None`) says; TypeError if it is not.

    An int becomes the float it stands for. A type that is not known takes anything.
    """
    kind = re.sub(r"(?:typing\.)?Optional\[(.+)\]", r"\1 | None", kind)
    if len(parts := re.split(r"\s*\|\s*(?![^\[]*\])", kind)) > 1:
        for part in parts:
            try:
                return as_type(value, part)
            except TypeError:
                continue
        raise TypeError
    if listed := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        if not isinstance(value, list):
            raise TypeError
        return [as_type(item, listed[1]) for item in value]
    if kind == "float" and type(value) is int:
        return float(value)
    plain = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
    plain["None"] = type(None)
    if kind in plain and type(value) is not plain[kind]:
        raise TypeError
    return value


def _check_metrics(metrics: object, kinds: dict) -> None:
    for name, path in _mapping("metrics", metrics).items():
        if not isinstance(path, str) or path.count("[]") > 1:
            raise ValueError(f"the metric {name} is {path!r}; give a path such as a.b or rows[].b.")
        if name in kinds or name in (*ABOUT, *PROVENANCE):
            raise ValueError(f"the metric {name} has the name of another column; give another.")
    if len({path.split("[]")[0] for path in metrics.values() if "[]" in path}) > 1:
        raise ValueError("metrics has [] after two lists; a row can stand for one of them only.")


def _code_digest(notebook: str) -> str:
    """SHA-256 of what decides a result: the module's code and the notebook's, parameters apart."""
    found = hashlib.sha256()
    for path in sorted((paths.ROOT / "ff_utils").glob("*.py")):
        if path.name not in NO_RESULT:
            found.update(path.read_bytes())
    text = (paths.NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8")
    for cell in json.loads(text)["cells"]:
        tagged = "parameters" in cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and not tagged:
            found.update("".join(cell["source"]).encode() + b"\0")
    return found.hexdigest()


# --- The table ------------------------------------------------------------------------------


def table(name: str) -> "pd.DataFrame":
    """A sweep's table: a row a point (or an element of a metric's list), in the file's order.

    Columns: parameters, metrics, status (done, failed, to do), reason, wall_seconds, commit,
    torch, device, threads, notebook, point (the name of its files). Lists are written as JSON.
    Where nothing has run here, the table that was written last, which may come with the
    repository; ValueError where there is none.
    """
    import pandas as pd

    begun = points.read(folder(name) / "sweep.json")
    if begun:
        found = gather(resolve(name, begun["spec"], begun["file"]))
        if not found.status.eq(TO_DO).all():
            return found
    written = table_path(name, "parquet")
    if written.exists():
        return pd.read_parquet(written)
    raise ValueError(f"{paths.relative(written)} is missing: run `make sweep SWEEP={name}`.")


def gather(sweep: Sweep) -> "pd.DataFrame":
    """The table of a sweep from its points' files."""
    import pandas as pd

    rows, names = [], {}
    for point in sweep.points:
        status, found = point.status()
        made = found.get("provenance", {})
        given = {k: _cell(v) for k, v in point.parameters.items() if k != "profile"}
        about = {
            "status": status,
            "reason": found.get("reason"),
            "wall_seconds": found.get("seconds", made.get("wall_seconds")),
            **{key: made.get(key) for key in PROVENANCE},
            "notebook": point.notebook.stem,
            "point": point.key,
        }
        for metrics in _metric_rows(found.get("metrics", {}), sweep.spec.get("metrics"), given):
            names |= dict.fromkeys(metrics)
            rows.append(given | metrics | about)
    names |= dict.fromkeys(sweep.spec.get("metrics") or {})
    table = pd.DataFrame(rows, columns=[*given, *names, *about])
    for column in table:
        if (
            table[column].dtype == object and table[column].dropna().map(type).nunique() > 1
        ):  # Parquet wants one type a column
            table[column] = table[column].map(json.dumps, na_action="ignore")
    return table


def varied(table: "pd.DataFrame") -> list[str]:
    """The parameters that have more than one value in a sweep's table, its seeds apart."""
    parameters = files.parameter_names(table.notebook.iloc[0])
    return [
        name
        for name in parameters
        if name in table and name != "seed" and table[name].nunique() > 1
    ]


def _metric_rows(metrics: dict, wanted: dict | None, given: dict) -> list[dict]:
    """The chosen metrics, or every number and text; several rows where a path has []."""
    if wanted is None:
        flat = _flat(metrics)
        return [{f"metrics.{k}" if k in given else k: v for k, v in flat.items()}]
    listed = next((path.split("[]")[0] for path in wanted.values() if "[]" in path), None)
    elements = _at(metrics, listed) if listed else None
    rows = []
    for element in elements if isinstance(elements, list) and elements else [{}]:
        row = {}
        for name, path in wanted.items():
            inside = path.partition("[]")[2].lstrip(".")
            row[name] = _cell(_at(element, inside) if "[]" in path else _at(metrics, path))
        rows.append(row)
    return rows


def _flat(metrics: dict, before: str = "") -> dict:
    found = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{name}.")
        elif not isinstance(value, list):
            found[before + name] = value
    return found


def _at(value: object, path: str) -> object:
    """What a dotted path leads to, a number being a place in a list; None where it ends early."""
    for part in filter(None, path.split(".")):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, TypeError, ValueError):
            return None
    return value


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value


def write_table(sweep: Sweep) -> "pd.DataFrame":
    """Write a sweep's table as CSV and Parquet; returns it."""
    found = gather(sweep)
    files.write_atomically(table_path(sweep.name, "csv"), found.to_csv(index=False))
    path = table_path(sweep.name, "parquet")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    found.to_parquet(temporary, index=False)
    temporary.replace(path)
    return found


# --- The run --------------------------------------------------------------------------------


def run(sweep: Sweep, jobs: int, scheduler: str | None = None, retry_failed: bool = False) -> None:
    """Run what is to do and write the table, also where it is interrupted.

    Raises PipelineError where the folder is another sweep's or the scheduler is not there.
    """
    refuse_foreign_folder(sweep)
    about = {"name": sweep.name, "file": sweep.file, "spec": sweep.spec}
    text = json.dumps(about, indent=1, default=str) + "\n"
    files.write_atomically(sweep.folder / "sweep.json", text)
    to_do = []
    for point in sweep.points:
        status = point.status()[0]
        if status == FAILED and retry_failed:
            point.forget_failure()
        if status == TO_DO or (status == FAILED and retry_failed):
            to_do.append(point)
    try:
        if to_do:
            _run_all(sweep, to_do, jobs, scheduler)
    finally:
        write_table(sweep)


def refuse_foreign_folder(sweep: Sweep) -> None:
    """PipelineError where a sweep's folder holds files of something else."""
    if not sweep.folder.exists() or not any(sweep.folder.iterdir()):
        return
    place = paths.relative(sweep.folder)
    remedy = f"rename {sweep.name}.yaml, or delete the folder"
    begun = points.read(sweep.folder / "sweep.json")
    if begun is None:
        raise PipelineError(f"{place} holds files, but of no sweep: {remedy}.")
    there = {"name": begun["name"], "file": begun["file"], "notebook": begun["spec"]["notebook"]}
    here = {"name": sweep.name, "file": sweep.file, "notebook": sweep.spec["notebook"]}
    for key, value in there.items():
        if value != here[key]:
            other = f"another sweep, whose {key} is {value} and not {here[key]}"
            raise PipelineError(f"{place} is of {other}: {remedy}.")


def _run_all(sweep: Sweep, to_do: list[Point], jobs: int, scheduler: str | None) -> None:
    with _cluster(1 if sweep.alone else jobs, scheduler) as (client, beside):
        flying = {}
        try:
            beside = 1 if sweep.alone else beside
            finished = _finished(client, to_do, beside, sweep.alone, flying)
            for line in _told(finished, len(to_do)):
                print(line, flush=True)
        except KeyboardInterrupt:
            client.cancel(list(flying), force=True)
            client.run(points.stop, sweep.folder, on_error="ignore")
            raise


@contextmanager
def _cluster(jobs: int, scheduler: str | None) -> "Iterator[tuple[Client, int]]":
    """A client of the user's cluster, or of one of our own with `jobs` workers of one thread.

    With it comes how many kernels share a machine.
    """
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if scheduler:
        with _their_client(scheduler) as client:
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            threads = Counter()
            for worker in workers:
                threads[worker["host"]] += worker["nthreads"]
            yield client, max(threads.values())
        return
    # Ctrl-C is for this process to see: it ends the workers' kernels, then the workers.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        cluster = LocalCluster(
            n_workers=jobs,
            threads_per_worker=1,
            processes=True,
            memory_limit=None,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with cluster, Client(cluster) as client:
        yield client, jobs


def _their_client(scheduler: str) -> "Client":
    """A client of a running cluster whose workers have this checkout; PipelineError."""
    from distributed import Client

    try:
        client = Client(scheduler, timeout=SECONDS_TO_ANSWER)
    except (OSError, ValueError, RuntimeError) as error:
        raise PipelineError(
            f"the scheduler at {scheduler} does not answer: start it, or leave --scheduler out."
        ) from error
    try:
        client.wait_for_workers(1, timeout=SECONDS_TO_ANSWER)
        places = set(client.run(points.root).values())
    except TimeoutError as error:
        client.close()
        raise PipelineError(
            f"the scheduler at {scheduler} has no workers: run `dask worker {scheduler}`."
        ) from error
    except Exception as error:
        client.close()
        raise PipelineError(
            f"a worker of {scheduler} cannot import ff_utils ({error}): start it with this "
            "environment."
        ) from error
    if places != {paths.ROOT}:
        client.close()
        raise PipelineError(
            f"a worker of {scheduler} has another checkout: start it from this one."
        )
    return client


def _finished(
    client: "Client",
    to_do: list[Point],
    jobs: int,
    alone: bool,
    flying: "dict[Future, Point]",
) -> Iterator[tuple[Point, str]]:
    """Each point as it is finished, with what became of it. `flying` holds what is under way.

    A point that another sweep is at is asked for again, until it is finished.
    """
    from distributed import as_completed

    waiting, done = deque(to_do), as_completed()

    def submit() -> None:
        point = waiting.popleft()
        lock = "alone" if alone else point.key
        future = client.submit(points.run, point, jobs, lock, pure=False)
        flying[future] = point
        done.add(future)

    for _ in range(1 if alone else len(to_do)):
        submit()
    for future in done:
        point = flying.pop(future)
        if future.status == "finished":
            status = future.result()
        elif future.cancelled():
            raise PipelineError("the scheduler went away: run the same command to go on.")
        else:
            status = FAILED
            point.fail(_why_lost(future.exception()))
        if status in (BUSY, TO_DO):
            waiting.append(point)
            time.sleep(0.3)
        else:
            yield point, status
        if waiting:
            submit()


def _why_lost(error: BaseException) -> str:
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return "its workers died, most often for lack of memory: lower its sizes"
    return f"{type(error).__name__}: {error}"


def _told(finished: Iterator[tuple[Point, str]], total: int) -> Iterator[str]:
    """A line for each finished point with the time left; on a terminal, a bar and the failures."""
    from tqdm import tqdm

    bar = tqdm(total=total, unit="point", disable=not sys.stderr.isatty(), leave=False)
    start = time.monotonic()
    with bar:
        for number, (point, status) in enumerate(finished, start=1):
            spent = time.monotonic() - start
            left = spent / number * (total - number)
            why = f": {point.status()[1].get('reason')}" if status == FAILED else ""
            ending = f"about {_duration(left)} left" if number < total else _duration(spent)
            bar.update()
            if bar.disable:
                yield f"{number} of {total}, {ending}: {_describe(point)} {status}{why}"
            elif why:
                bar.write(f"{_describe(point)} {status}{why}")


def _describe(point: Point) -> str:
    return " ".join(f"{name}={_cell(value)}" for name, value in point.given.items())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# --- Command line ---------------------------------------------------------------------------


def dry_run(sweep: Sweep, jobs: int) -> None:
    """Print every point with its status, and how long the rest may take."""
    found = [point.status() for point in sweep.points]
    for point, (status, _) in zip(sweep.points, found, strict=True):
        print(f"{status:7} {point.key}  {_describe(point)}")
    seconds = [about["seconds"] for status, about in found if status == DONE and "seconds" in about]
    whence = "the median of those done"
    if not seconds:
        notebook = sweep.spec["notebook"]
        record = points.read(paths.RESULTS / "default" / f"{notebook}.json") or {}
        seconds = [s] if (s := record.get("provenance", {}).get("wall_seconds")) else []
        whence = "as in the notebook's own record"
    left = sum(status == TO_DO for status, _ in found)
    jobs = 1 if sweep.alone else jobs
    about = "nobody knows how long they take"
    if seconds:
        each = statistics.median(seconds)
        about = f"about {_duration(each * math.ceil(left / jobs))} with {jobs} at a time"
        about += f" ({each:.1f} s each, {whence})"
    print(f"{_count(sweep)}; {about}" if left else _count(sweep))


def _count(sweep: Sweep) -> str:
    found = Counter(point.status()[0] for point in sweep.points)
    counts = ", ".join(f"{found[status]} {status}" for status in STATUSES)
    return f"{sweep.name}: {len(sweep.points)} points, {counts}"


def main(arguments: list[str] | None = None) -> None:
    """Run a sweep, or list its points; what is wrong is one sentence and a non-zero exit."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.sweep", description=main.__doc__)
    parser.add_argument("file", help=f"a YAML file, or one of: {', '.join(shipped())}")
    parser.add_argument("--dry-run", action="store_true", help="list the points, run none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="points side by side")
    parser.add_argument("--scheduler", help="a Dask scheduler of your own, as tcp://host:8786")
    parser.add_argument("--retry-failed", action="store_true", help="run failed points again")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        checks.number("--jobs", options.jobs, 1, 1000, whole=True)
        sweep = load(options.file)
        if options.dry_run:
            refuse_foreign_folder(sweep)
            dry_run(sweep, options.jobs)
            return
        if sweep.alone and options.jobs > 1:
            print(f"{sweep.name}: its points run one at a time, with nothing beside them")
        run(sweep, options.jobs, options.scheduler, options.retry_failed)
    except (PipelineError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"stopped; {_count(sweep)}: run the same command to go on", file=sys.stderr)
        sys.exit(130)
    counts = _count(sweep)
    if f" 0 {FAILED}" not in counts:
        counts += " (--retry-failed runs failed ones again)"
    print(f"{counts}\n{paths.relative(table_path(sweep.name, 'csv'))}")


if __name__ == "__main__":
    # Dask's workers have no use for what is in __main__: run the module that they can import.
    from ff_utils import sweep

    sweep.main()
