"""Sweeps of a tiny notebook in a repository of its own.

Most are scheduled in this process, where a function stands in for the kernel. One is killed,
interrupted and robbed of a kernel and goes on; one loses a worker.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from distributed import Client, LocalCluster
from nbformat.v4 import new_code_cell, new_notebook

from ff_utils import utils
from ff_utils.run import notebooks, sweep

PARAMETERS = """profile: str = "interactive"  # a name
x: float = 1.0  # any, below 0 fails
size: int = 2  # any
pause: float = 0.0  # seconds
names: list[str] = ["a", "b"]  # any
seed: int = 0  # any"""
CODE = """import json, os, time
from pathlib import Path
with open("log", "a") as log:
    log.write(f"{x} {seed}\\n")
time.sleep(pause)
if x < 0:
    raise ValueError(f"x is {x}; give more.")
rows = [{"name": name, "length": size * k} for k, name in enumerate(names)]
metrics = {"y": x * x + seed, "deep": {"z": size, "text": "t"}, "rows": rows, "names": names}
made = {"commit": "c", "torch": "t", "device": "d", "wall_seconds": 1.0}
made["threads"] = int(os.environ["OMP_NUM_THREADS"])
record = {"notebook": "01_tiny", "metrics": metrics, "provenance": made}
(Path("..") / record_file).write_text(json.dumps(record))"""
KERNEL = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
SPEC = {"notebook": "01_tiny", "grid": {"x": [1, 2.5, -1]}, "seeds": 2}
PROVENANCE = ["wall_seconds", *sweep.PROVENANCE]


def repository(folder):
    """A checkout with this module and one notebook."""
    shutil.copytree(utils.ROOT / "ff_utils", folder / "ff_utils")
    (folder / "notebooks" / "sweeps").mkdir(parents=True)
    (folder / "notebooks" / "profiles").mkdir()
    (folder / "notebooks" / "profiles" / "quick.yaml").write_text("01_tiny: {size: 7}")
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(CODE)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), folder / "notebooks/01_tiny.ipynb")
    return folder


def write(folder, spec=SPEC, name="trial"):
    (folder / "notebooks" / "sweeps" / f"{name}.yaml").write_text(yaml.safe_dump(spec))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """This process's paths led to a repository of one notebook."""
    folder = repository(tmp_path)
    monkeypatch.setattr(utils, "ROOT", folder)
    monkeypatch.setattr(utils, "NOTEBOOKS", folder / "notebooks")
    monkeypatch.setattr(utils, "PROFILES", folder / "notebooks" / "profiles")
    monkeypatch.setattr(utils, "RESULTS", folder / "data" / "results")
    return folder


def loaded(folder, **spec):
    write(folder, {"notebook": "01_tiny", **spec})
    return sweep.load("trial")


def values(folder, name, **spec):
    return [point.parameters[name] for point in loaded(folder, **spec).points]


def ran(folder):
    return (folder / "notebooks" / "log").read_text().splitlines()


def written(folder):
    """The table on disk but for wall times and provenance; both files say the same."""
    place = folder / "data" / "results" / "sweeps"
    parquet = pd.read_parquet(place / "trial.parquet")
    csv = pd.read_csv(place / "trial.csv")
    both = [table.astype(object).where(table.notna(), None) for table in (csv, parquet)]
    pd.testing.assert_frame_equal(*both, check_exact=False)
    return parquet.drop(columns=PROVENANCE)


# --- the file -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"gird": {"x": [1]}}, "the key 'gird', which does not exist: did you mean grid?"),
        ({"notebook": "01_tin"}, "notebook is '01_tin'; choose one of: 01_tiny"),
        ({}, "it has no grid, points or seeds"),
        ({"grid": {}}, "grid is empty"),
        ({"grid": {"x": []}}, "x has no values in the grid"),
        ({"grid": {"xx": [1]}}, "the parameter 'xx', which does not exist"),
        ({"grid": {"profile": ["a"]}}, "the parameter 'profile', which does not exist"),
        ({"grid": {"x": ["high"]}}, "x is 'high'; 01_tiny wants float"),
        ({"grid": {"x": ["1.2.3e4"]}}, r"x is '1\.2\.3e4'; 01_tiny wants float"),
        ({"grid": {"size": [1, 2.5]}}, r"size is 2\.5; 01_tiny wants int"),
        ({"grid": {"size": [True]}}, "size is True; 01_tiny wants int"),
        ({"grid": {"names": ["a"]}}, r"names is 'a'; 01_tiny wants list\[str\]"),
        ({"grid": {"names": [["a", 1]]}}, r"wants list\[str\]"),
        ({"grid": {"x": 3}}, "x is 3; give a list, a range or a log_range"),
        ({"grid": {"x": {"rang": [1, 2, 3]}}}, "'rang', which does not exist: did you mean range?"),
        ({"grid": {"x": {"range": [1, 2]}}}, r"the range of x is \[1, 2\]; give three numbers"),
        ({"grid": {"x": {"range": [1, 2, -1]}}}, "the range of x never comes from 1 to 2"),
        ({"grid": {"x": {"log_range": [0, 1, 3]}}}, "log_range of x is 0; give a number above 0"),
        ({"grid": {"x": {"log_range": [1, 2, 1]}}}, "give a whole number of at least 2"),
        ({"fixed": {"y": 1}, "seeds": 1}, "the parameter 'y', which does not exist"),
        ({"fixed": {"x": "a"}, "seeds": 1}, "x is 'a'; 01_tiny wants float"),
        ({"fixed": {"x": 1}, "grid": {"x": [1]}}, "x is set twice"),
        ({"grid": {"x": [1]}, "points": [{"x": 2}]}, "x is set twice"),
        ({"points": []}, r"points is \[\]; give a list of mappings"),
        ({"points": [3]}, "an entry of points is 3; give a mapping"),
        ({"seeds": 0}, "seeds is 0; give a whole number"),
        ({"seeds": 10**12}, "seeds is 1000000000000; .* at most 10000"),
        ({"grid": {"x": {"range": [0, 1e12, 1]}}}, "has 1,000,000,000,001 points; give at most"),
        ({"grid": {"size": list(range(200))}, "seeds": 200}, "it has 40,000 points"),
        ({"grid": {"x": [float("inf")]}}, "01_tiny wants float"),
        ({"seeds": ["a"]}, "seed is 'a'; 01_tiny wants int"),
        ({"seeds": 1, "alone": "yes"}, "alone is 'yes'; give true or false"),
        ({"seeds": 1, "metrics": ["y"]}, "give a mapping of names to values"),
        ({"seeds": 1, "metrics": {"x": "y"}}, "the metric x has the name of another column"),
        (
            {"seeds": 1, "metrics": {"a": "b[].c", "d": "e[].f"}},
            r"metrics has \[\] after two lists",
        ),
        ({"seeds": 1, "profile": "slow"}, "profile is 'slow'; choose one of: quick"),
    ],
)
def test_file_that_is_wrong_is_one_sentence(here, spec, sentence):
    with pytest.raises(ValueError, match=sentence) as info:
        loaded(here, **spec)
    assert "\n" not in str(info.value) and "trial.yaml" in str(info.value)


def test_file_that_is_no_sweep_is_refused(here):
    with pytest.raises(ValueError, match="sweep is 'none'; choose one of"):
        sweep.load("none")
    for text, sentence in (
        ("a: [", "is not YAML"),
        ("notebook: a\nnotebook: b", "the key 'notebook' is given twice"),
        ("- 1", "give a mapping"),
        ("", "is None"),
    ):
        (here / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            sweep.load(here / "x.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        sweep.load(here / "absent.yaml")


def test_ranges_are_written_out_with_both_ends(here):
    assert values(here, "size", grid={"size": {"range": [1, 6, 1]}}) == [1, 2, 3, 4, 5, 6]
    assert values(here, "x", grid={"x": {"range": [0, 0.3, 0.1]}}) == [0, 0.1, 0.2, 0.3]
    assert values(here, "x", grid={"x": {"log_range": [1, 100, 3]}}) == [1, 10, 100]
    assert values(here, "size", grid={"size": {"log_range": [125, 8000, 7]}})[2] == 500
    (here / "notebooks" / "sweeps" / "e.yaml").write_text("{notebook: 01_tiny, grid: {x: [1e-3]}}")
    assert sweep.load("e").points[0].parameters["x"] == 0.001


def test_points_are_crossed_with_the_grid_and_the_seeds_and_listed_once(here):
    spec = {"points": [{"x": 1}, {"x": 2, "size": 3}], "grid": {"pause": [0, 1, 0]}, "seeds": [5]}
    found = [
        (p.given["x"], p.parameters["size"], p.given["pause"]) for p in loaded(here, **spec).points
    ]
    assert found == [(1, 2, 0), (1, 2, 1), (2, 3, 0), (2, 3, 1)]
    assert values(here, "size", seeds=1, profile="quick") == [7]


def test_point_is_named_by_its_parameters_and_by_all_code_that_decides_its_result(here):
    def key():
        return loaded(here, grid={"x": [1]}).points[0].key

    before = key()
    assert loaded(here, grid={"x": [1.0]}, fixed={"size": 2}).points[0].key == before
    assert loaded(here, grid={"x": [1]}, fixed={"size": 3}).points[0].key != before
    keys = {before}
    for path in sorted((here / "ff_utils").rglob("*.py")):
        name = path.relative_to(here / "ff_utils").as_posix()
        text = path.read_text()
        path.write_text(text + "\n# otherwise")
        if name.startswith(("run/", "__main__", "pipeline", "sweep")) or name in (
            "report/claims.py",
            "report/plots.py",
        ):  # draws, tells or runs
            assert key() == before, name
        else:
            keys.add(key())
            assert before != key(), name
        path.write_text(text)
    (here / "ff_utils" / "new").mkdir()
    (here / "ff_utils" / "new" / "room.py").write_text("# learns")
    path = here / "notebooks" / "01_tiny.ipynb"
    assert key() not in keys
    path.write_text(path.read_text().replace("x * x", "x + x"))
    assert key() not in keys


# --- the table ------------------------------------------------------------------------------


def keep(point, record):
    point.folder.mkdir(parents=True, exist_ok=True)
    point.file(".json").write_text(json.dumps(record))
    point.file(".ipynb").touch()


def test_table_has_a_row_for_an_element_of_a_list_in_the_record(here):
    metrics = {"name": "rows[].name", "length": "rows[].length", "z": "deep.z", "last": "names.-1"}
    trial = loaded(here, grid={"x": [1, 2]}, metrics=metrics)
    rows = [{"name": "a", "length": 0}, {"name": "b", "length": 2}]
    metrics = {"rows": rows, "deep": {"z": 4}, "names": ["q", "r"]}
    made = {"commit": "c"}
    keep(trial.points[0], {"notebook": "01_tiny", "metrics": metrics, "provenance": made})
    table = sweep.write_table(trial)
    assert list(table.name[:2]) == ["a", "b"] and list(table.length[:2]) == [0, 2]
    assert list(table.z[:2]) == [4, 4] and list(table["last"][:2]) == ["r", "r"]
    assert list(table.status) == ["done", "done", "to do"] and sweep.varied(table) == ["x"]
    # A clone has the table and not the runs.
    shutil.rmtree(trial.folder)
    kept = pd.read_parquet(trial.folder.with_suffix(".parquet"))
    pd.testing.assert_frame_equal(sweep.table("trial"), kept)
    with pytest.raises(ValueError, match="run `make sweep SWEEP=other`"):
        sweep.table("other")


def test_record_that_is_not_whole_is_to_do_again(here):
    (point,) = loaded(here, grid={"x": [1]}).points
    for record in ({}, [], {"notebook": "02_other"}):
        keep(point, record)
        assert point.status()[0] == "to do"
    point.file(".json").write_text("{")
    assert point.status()[0] == "to do"


def test_dry_run_lists_the_points_and_runs_none(here, capsys):
    trial = loaded(here, grid={"x": [1, 2]}, seeds=2)
    sweep.dry_run(trial, 2)
    assert "4 points, 0 done, 0 failed, 4 to do; how long" in capsys.readouterr().out
    record = {"notebook": "01_tiny", "metrics": {"y": 1}, "provenance": {"commit": "c"}}
    keep(trial.points[1], record | {"seconds": 30.0})
    sweep.dry_run(trial, 2)
    said = capsys.readouterr().out
    assert f"done    {trial.points[1].key}  x=1.0 seed=1" in said
    assert "3 to do; about 60 s with 2 at a time (30.0 s each, the median of those done)" in said


# --- the run, in this process ---------------------------------------------------------------


@pytest.fixture
def cluster(here, monkeypatch):
    """A Dask cluster of two threads; a function runs the notebook's cells in place of a kernel."""
    lock, at_once = threading.Lock(), []

    def execute(notebook, output, values, environment):
        at_once.append(values["x"])
        code = (
            nbformat.read(notebook, 4).cells[1].source.replace('"log"', f'"{here}/notebooks/log"')
        )
        code = code.replace('Path("..")', f'Path("{here}")').replace("os.environ", "environment")
        try:
            with lock:
                exec(code, values | {"environment": environment})
            output.touch()
        except ValueError as error:
            failure = notebooks.NotebookError(str(error))
            failure.reason = f"ValueError: {error}"
            raise failure from error
        finally:
            execute.most = max(execute.most, len(at_once))
            time.sleep(0.05)
            at_once.pop()

    execute.most = 0
    monkeypatch.setattr(notebooks, "execute", execute)
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address, execute


def test_run_gives_a_row_a_point_and_failures_their_reason(here, cluster, capsys):
    address, _ = cluster
    write(here)
    trial = sweep.load("trial")
    sweep.run(trial, 2, address)
    assert "6 of 6" in capsys.readouterr().out
    assert sorted(ran(here)) == sorted(f"{x} {s}" for x in (1.0, 2.5, -1.0) for s in (0, 1))
    table = written(here)
    assert list(table.x) == [1, 1, 2.5, 2.5, -1, -1] and list(table.seed) == [0, 1] * 3
    assert list(table.status) == ["done"] * 4 + ["failed"] * 2
    assert list(table.y[:4]) == [1, 2, 6.25, 7.25] and table.y[4:].isna().all()
    assert list(table.reason[4:]) == ["ValueError: x is -1.0; give more."] * 2
    assert list(table["deep.z"][:4]) == [2] * 4 and set(table.names) == {'["a", "b"]'}
    assert "rows" not in table and "profile" not in table
    before = ran(here)
    sweep.run(trial, 2, address)  # failed points are not run again unasked
    assert ran(here) == before
    sweep.run(trial, 2, address, retry_failed=True)
    assert sorted(ran(here)[len(before) :]) == ["-1.0 0", "-1.0 1"]
    pd.testing.assert_frame_equal(written(here), table)


def test_two_runs_of_one_sweep_share_the_points(here, cluster):
    address, _ = cluster
    write(here, SPEC | {"seeds": 4})
    trial = sweep.load("trial")
    runs = [(trial, list(trial.points), 2, address)] * 2
    threads = [threading.Thread(target=sweep._run_all, args=args) for args in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sweep.write_table(trial)
    assert len(ran(here)) == 12 == len(set(ran(here)))
    assert "to do" not in set(written(here).status)


@pytest.mark.parametrize("alone", [False, True])
def test_points_run_alone_only_where_asked(here, cluster, alone):
    address, execute = cluster
    sweep.run(loaded(here, grid={"x": [1]}, seeds=6, alone=alone), 2, address)
    assert execute.most == (1 if alone else 2)


def test_notebook_without_a_record_fails(here, monkeypatch):
    def execute(notebook, output, *_, **__):
        output.touch()

    monkeypatch.setattr(notebooks, "execute", execute)
    (point,) = loaded(here, grid={"x": [1]}).points
    assert sweep.run_point(point, 1) == sweep.FAILED
    assert point.status()[1]["reason"].startswith("it wrote no record")
    assert point.file(".failed.ipynb").exists() and not point.file(".ipynb").exists()


def test_scheduler_that_does_not_answer_is_one_sentence(here):
    start = time.monotonic()
    trial = loaded(here, seeds=1)
    for address in ("tcp://127.0.0.1:1", "nonsense"):
        with pytest.raises(RuntimeError, match=f"the scheduler at {address} does not answer"):
            sweep.run(trial, 1, address)
    assert time.monotonic() - start < 30


def test_folder_of_another_sweep_is_refused(here):
    trial = loaded(here, seeds=1)
    (here / "trial.yaml").write_text((here / "notebooks/sweeps/trial.yaml").read_text())
    with pytest.raises(ValueError, match=r"trial.yaml has the name of .*: rename it"):
        sweep.run(sweep.load(here / "trial.yaml"), 1)
    trial.folder.mkdir(parents=True)
    (trial.folder / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds files, but of no sweep"):
        sweep.refuse_foreign_folder(trial)
    begun = {"name": "trial", "file": trial.file, "spec": {"notebook": "02_other"}}
    (trial.folder / "sweep.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="whose notebook is 02_other and not 01_tiny"):
        sweep.run(trial, 1)


# --- the run, for real ----------------------------------------------------------------------


def begin(folder, *arguments):
    """The command line, in a session of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "ff_utils.sweep", "trial", "--jobs", "2", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What starts the tests in the background may ignore the interrupts of these.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kernels(folder):
    """Kernels that run in this repository."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(folder)) and "ipykernel_launcher" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition, what):
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {what}")


def finished(folder):
    return list((folder / "data" / "results" / "sweeps" / "trial").glob("*[0-9a-f].ipynb"))


@pytest.fixture
def house(tmp_path):
    folder = repository(tmp_path)
    (folder / "tmp").mkdir()
    write(folder, SPEC | {"grid": {"x": [1, -1]}, "fixed": {"pause": 1}})
    return folder


def test_sweep_survives_lost_kernel_kill_and_interrupt(house):
    place = house / "data" / "results" / "sweeps" / "trial"
    process = begin(house)
    (kernel, *_) = wait_for(lambda: kernels(house), "kernel")
    kernel.kill()
    wait_for(
        lambda: any("kernel died" in path.read_text() for path in place.glob("*.failed.json")),
        "point whose kernel died",
    )
    wait_for(lambda: kernels(house), "kernel")
    process.kill()
    process.communicate()
    wait_for(lambda: not kernels(house), "end of the kernels")
    process = begin(house)
    wait_for(lambda: kernels(house), "kernel")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    said = process.communicate(timeout=60)[0]
    assert not kernels(house)
    assert process.returncode == 130 and "stopped; trial: 4 points" in said, said
    assert "Traceback" not in said
    table = written(house)
    assert "to do" in set(table.status)
    dead = table[table.reason.fillna("").str.contains("kernel died")]
    assert len(dead) == 1 and set(dead.status) == {"failed"}
    assert (place / f"{dead.point.item()}.failed.ipynb").exists()
    said = begin(house, "--retry-failed").communicate(timeout=120)[0]
    assert "2 done, 2 failed, 0 to do" in said, said
    table = written(house)
    assert list(table.status) == ["done"] * 2 + ["failed"] * 2 and list(table.y[:2]) == [1, 2]
    assert set(table.reason[2:]) == {"ValueError: x is -1.0; give more."}
    assert not list(place.glob(".[0-9a-f]*")) and not list((house / "tmp").glob("ff-*"))


@contextmanager
def dask_process(folder, *arguments):
    """A process of a Dask cluster that imports the module of `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_sweep_survives_a_lost_worker(house):
    with ExitStack() as stack:
        known = house / "tmp" / "scheduler.json"
        options = ("--scheduler-file", str(known))
        quiet = ("--no-dashboard", "--host", "127.0.0.1")
        stack.enter_context(dask_process(house, "dask_scheduler", *options, *quiet, "--port", "0"))
        wait_for(known.exists, "scheduler")
        address = yaml.safe_load(known.read_text())["address"]
        # Without a nanny, a killed worker stays away.
        alone = ("--no-nanny", "--nthreads", "1", "--local-directory", str(house / "tmp"), *quiet)
        workers = []
        for _ in range(2):
            process = dask_process(house, "dask_worker", address, *alone)
            workers.append(stack.enter_context(process))
        stack.enter_context(Client(address)).wait_for_workers(2)
        process = begin(house, "--scheduler", address)
        both = {worker.pid for worker in workers}
        wait_for(lambda: {k.ppid() for k in kernels(house)} == both, "kernels of both workers")
        workers[0].kill()
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert list(written(house).status) == ["done"] * 2 + ["failed"] * 2, said
    assert set(ran(house)) == {"1.0 0", "1.0 1", "-1.0 0", "-1.0 1"}
