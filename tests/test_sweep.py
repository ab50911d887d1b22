"""Sweeps of a tiny notebook in a repository of its own; what is killed here is really killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from distributed import Client
from nbformat.v4 import new_code_cell, new_notebook

from ff_utils import paths, points, sweep
from ff_utils.pipeline import PipelineError

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
Path(os.environ["FF_RECORD"]).write_text(json.dumps(record))"""
SPEC = {"notebook": "01_tiny", "grid": {"x": [1, 2.5, -1]}, "seeds": 2, "fixed": {"pause": 0.4}}
PROVENANCE = ["wall_seconds", *sweep.PROVENANCE]


def repository(folder):
    """A checkout with this module and one notebook."""
    shutil.copytree(paths.ROOT / "ff_utils", folder / "ff_utils")
    (folder / "notebooks" / "sweeps").mkdir(parents=True)
    (folder / "notebooks" / "profiles").mkdir()
    (folder / "notebooks" / "profiles" / "quick.yaml").write_text("01_tiny: {size: 7}")
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(CODE)]
    about = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    notebook = new_notebook(cells=cells, metadata=about)
    nbformat.write(notebook, folder / "notebooks" / "01_tiny.ipynb")
    return folder


def write(folder, spec=SPEC, name="trial"):
    (folder / "notebooks" / "sweeps" / f"{name}.yaml").write_text(yaml.safe_dump(spec))


def begin(folder, *arguments):
    """The command line, in a session of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "ff_utils.sweep", "trial", "--jobs", "2", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What starts the tests in the background may ignore the interrupts of these.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def command(folder, *arguments):
    process = begin(folder, *arguments)
    return process.communicate(timeout=600)[0], process.returncode


def written(folder):
    """The table on disk but for wall times and provenance; both files say the same."""
    place = folder / "data" / "results" / "sweeps"
    parquet = pd.read_parquet(place / "trial.parquet")
    csv = pd.read_csv(place / "trial.csv")
    both = [table.astype(object).where(table.notna(), None) for table in (csv, parquet)]
    pd.testing.assert_frame_equal(*both, check_exact=False)
    return parquet.drop(columns=PROVENANCE)


def ran(folder):
    return (folder / "notebooks" / "log").read_text().splitlines()


def wait_for(condition, what):
    for _ in range(3000):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {what}")


def finished(folder):
    return list((folder / "data" / "results" / "sweeps" / "trial").glob("*[0-9a-f].ipynb"))


def kernels(folder):
    """Processes that run a point of this repository."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FF_RECORD", "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def house(tmp_path):
    folder = repository(tmp_path)
    write(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The table of a sweep that nothing happened to."""
    folder = repository(tmp_path_factory.mktemp("unbroken"))
    write(folder)
    said, status = command(folder)
    assert status == 0, said
    assert "6 of 6" in said and "6 points, 4 done, 2 failed, 0 to do" in said
    assert sorted(ran(folder)) == sorted(f"{x} {s}" for x in (1.0, 2.5, -1.0) for s in (0, 1))
    return written(folder)


def test_the_table_has_a_row_a_point_with_parameters_metrics_and_status(unbroken):
    assert list(unbroken.x) == [1, 1, 2.5, 2.5, -1, -1] and list(unbroken.seed) == [0, 1] * 3
    assert list(unbroken.status) == ["done"] * 4 + ["failed"] * 2
    assert list(unbroken.y[:4]) == [1, 2, 6.25, 7.25] and unbroken.y[4:].isna().all()
    assert list(unbroken.reason[4:]) == ["ValueError: x is -1.0; give more."] * 2
    assert list(unbroken["deep.z"][:4]) == [2] * 4 and set(unbroken.names) == {'["a", "b"]'}
    assert "rows" not in unbroken and "profile" not in unbroken


def test_killed_runner_and_interrupted_runner_lose_nothing_and_leave_no_kernel(house, unbroken):
    process = begin(house)
    wait_for(lambda: finished(house), "finished point")
    wait_for(lambda: kernels(house), "kernel")
    process.kill()
    process.wait()
    wait_for(lambda: not kernels(house), "end of the kernels")
    process = begin(house)
    wait_for(lambda: kernels(house), "kernel")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    said = process.communicate(timeout=600)[0]
    assert not kernels(house)
    assert process.returncode == 130 and "stopped; trial: 6 points" in said, said
    assert "Traceback" not in said
    assert "to do" in set(written(house).status)
    said, status = command(house)
    assert status == 0, said
    pd.testing.assert_frame_equal(written(house), unbroken)
    before = ran(house)
    command(house)
    assert ran(house) == before


def test_a_killed_kernel_is_a_row_with_its_reason_until_failed_points_are_retried(house, unbroken):
    process = begin(house)
    (kernel, *_) = wait_for(lambda: kernels(house), "kernel")
    kernel.kill()
    assert process.communicate(timeout=600) and process.returncode == 0
    table = written(house)
    dead = table[table.reason.fillna("").str.contains("kernel died")]
    assert len(dead) == 1 and set(dead.status) == {"failed"}
    place = house / "data" / "results" / "sweeps" / "trial"
    assert (place / f"{dead.point.item()}.failed.ipynb").exists()
    before = len(ran(house))
    command(house)  # failed points are not run again unasked
    assert len(ran(house)) == before
    said, _ = command(house, "--retry-failed")
    assert "2 failed" in said and "3 of 3" in said
    pd.testing.assert_frame_equal(written(house), unbroken)
    assert not (place / f"{dead.point.item()}.failed.ipynb").exists()


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


def test_a_worker_lost_in_mid_sweep_costs_nothing_but_time(house, unbroken, tmp_path_factory):
    place = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        known = place / "scheduler.json"
        options = ("--scheduler-file", str(known))
        quiet = ("--no-dashboard", "--host", "127.0.0.1")
        stack.enter_context(dask_process(house, "dask_scheduler", *options, *quiet, "--port", "0"))
        wait_for(known.exists, "scheduler")
        address = yaml.safe_load(known.read_text())["address"]
        # Without a nanny, a killed worker stays away.
        alone = ("--no-nanny", "--nthreads", "1", "--local-directory", str(place), *quiet)
        workers = []
        for _ in range(2):
            process = dask_process(house, "dask_worker", address, *alone)
            workers.append(stack.enter_context(process))
        stack.enter_context(Client(address)).wait_for_workers(2)
        process = begin(house, "--scheduler", address)
        both = {worker.pid for worker in workers}
        wait_for(lambda: {k.ppid() for k in kernels(house)} == both, "kernels of both workers")
        wait_for(lambda: finished(house), "finished point")
        workers[0].kill()
        said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    pd.testing.assert_frame_equal(written(house), unbroken)


def test_two_sweeps_on_one_folder_share_the_points(house, unbroken):
    processes = [begin(house), begin(house)]
    for process in processes:
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0 and "0 to do" in said, said
    assert len(ran(house)) == 6 == len(set(ran(house)))
    pd.testing.assert_frame_equal(written(house), unbroken)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """This process's paths led to a repository of one notebook."""
    folder = repository(tmp_path)
    monkeypatch.setattr(paths, "ROOT", folder)
    monkeypatch.setattr(paths, "NOTEBOOKS", folder / "notebooks")
    monkeypatch.setattr(paths, "PROFILES", folder / "notebooks" / "profiles")
    monkeypatch.setattr(paths, "RESULTS", folder / "data" / "results")
    return folder


def loaded(folder, **spec):
    write(folder, {"notebook": "01_tiny", **spec})
    return sweep.load("trial")


def values(folder, name, **spec):
    return [point.parameters[name] for point in loaded(folder, **spec).points]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"gird": {"x": [1]}}, "the key 'gird', which does not exist: did you mean grid?"),
        ({"notebook": "01_tin"}, "notebook is '01_tin'; choose one of: 01_tiny"),
        ({}, "it has no grid, points or seeds"),
        ({"grid": {}}, "grid is empty"),
        ({"grid": {"x": []}}, "x has no values in the grid"),
        ({"grid": {"xx": [1]}}, "the parameter 'xx', which does not exist"),
        ({"grid": {"x": ["high"]}}, "x is 'high'; 01_tiny wants float"),
        ({"grid": {"size": [1, 2.5]}}, "size is 2.5; 01_tiny wants int"),
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
        ({"fixed": {"x": 1}, "grid": {"x": [1]}}, "x is both fixed and varied"),
        ({"grid": {"x": [1]}, "points": [{"x": 2}]}, "x is varied twice"),
        ({"points": []}, "points is \\[\\]; give a list of mappings"),
        ({"points": [3]}, "an entry of points is 3; give a mapping"),
        ({"seeds": 0}, "seeds is 0; give a whole number"),
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
def test_a_wrong_file_is_one_sentence(here, spec, sentence):
    with pytest.raises(PipelineError, match=sentence) as info:
        loaded(here, **spec)
    assert "\n" not in str(info.value) and "trial.yaml" in str(info.value)


def test_files_that_are_no_sweep_are_refused(here):
    with pytest.raises(ValueError, match="sweep is 'none'; choose one of"):
        sweep.load("none")
    for text, sentence in (("a: [", "is not YAML"), ("- 1", "give a mapping"), ("", "is None")):
        (here / "x.yaml").write_text(text)
        with pytest.raises(PipelineError, match=sentence):
            sweep.load(here / "x.yaml")
    with pytest.raises(PipelineError, match="cannot be read"):
        sweep.load(here / "absent.yaml")


def test_a_scheduler_that_does_not_answer_is_one_sentence(here):
    start = time.monotonic()
    trial = loaded(here, seeds=1)
    for address in ("tcp://127.0.0.1:1", "nonsense"):
        with pytest.raises(PipelineError, match=f"the scheduler at {address} does not answer"):
            sweep.run(trial, 1, address)
    assert time.monotonic() - start < 30


def test_a_folder_of_another_sweep_is_refused(here):
    trial = loaded(here, seeds=1)
    trial.folder.mkdir(parents=True)
    (trial.folder / "mine.txt").write_text("precious")
    with pytest.raises(PipelineError, match="holds files, but of no sweep"):
        sweep.refuse_foreign_folder(trial)
    about = {"name": "trial", "file": trial.file, "spec": {"notebook": "02_other"}}
    (trial.folder / "sweep.json").write_text(json.dumps(about))
    with pytest.raises(PipelineError, match="whose notebook is 02_other and not 01_tiny"):
        sweep.run(trial, 1)


def test_ranges_are_written_out_with_both_ends(here):
    assert values(here, "size", grid={"size": {"range": [1, 6, 1]}}) == [1, 2, 3, 4, 5, 6]
    assert values(here, "x", grid={"x": {"range": [0, 0.3, 0.1]}}) == [0, 0.1, 0.2, 0.3]
    assert values(here, "x", grid={"x": {"log_range": [1, 100, 3]}}) == [1, 10, 100]
    assert values(here, "size", grid={"size": {"log_range": [125, 8000, 7]}})[2] == 500
    (here / "notebooks" / "sweeps" / "e.yaml").write_text("{notebook: 01_tiny, grid: {x: [1e-3]}}")
    assert sweep.load("e").points[0].parameters["x"] == 0.001


def test_points_are_crossed_with_the_grid_and_the_seeds_and_told_once(here):
    spec = {"points": [{"x": 1}, {"x": 2, "size": 3}], "grid": {"pause": [0, 1, 0]}, "seeds": [5]}
    found = [
        (p.given["x"], p.parameters["size"], p.given["pause"]) for p in loaded(here, **spec).points
    ]
    assert found == [(1, 2, 0), (1, 2, 1), (2, 3, 0), (2, 3, 1)]
    assert values(here, "size", seeds=1, profile="quick") == [7]


def test_a_point_is_named_by_its_parameters_and_by_the_code_it_runs(here):
    def key():
        return loaded(here, grid={"x": [1]}).points[0].key

    before = key()
    assert loaded(here, grid={"x": [1.0]}, fixed={"size": 2}).points[0].key == before
    assert loaded(here, grid={"x": [1]}, fixed={"size": 3}).points[0].key != before
    (here / "ff_utils" / "figures.py").write_text("# draws otherwise")
    assert key() == before
    (here / "ff_utils" / "layers.py").write_text("# learns otherwise")
    changed = key()
    assert changed != before
    path = here / "notebooks" / "01_tiny.ipynb"
    path.write_text(path.read_text().replace("x * x", "x + x"))
    assert key() not in (before, changed)


def test_a_list_in_the_record_gives_a_row_an_element(here):
    metrics = {"name": "rows[].name", "length": "rows[].length", "z": "deep.z", "last": "names.-1"}
    trial = loaded(here, grid={"x": [1, 2]}, metrics=metrics)
    rows = [{"name": "a", "length": 0}, {"name": "b", "length": 2}]
    record = {
        "notebook": "01_tiny",
        "metrics": {"rows": rows, "deep": {"z": 4}, "names": ["q", "r"]},
    }
    trial.folder.mkdir(parents=True)
    trial.points[0].file(".json").write_text(json.dumps(record))
    trial.points[0].file(".ipynb").touch()
    table = sweep.write_table(trial)
    assert list(table.name[:2]) == ["a", "b"] and list(table.length[:2]) == [0, 2]
    assert list(table.z[:2]) == [4, 4] and list(table["last"][:2]) == ["r", "r"]
    assert list(table.status) == ["done", "done", "to do"] and sweep.varied(table) == ["x"]
    # A clone has the table and not the runs.
    shutil.rmtree(trial.folder)
    pd.testing.assert_frame_equal(
        sweep.table("trial"), pd.read_parquet(sweep.table_path("trial", "parquet"))
    )
    with pytest.raises(ValueError, match="run `make sweep SWEEP=other`"):
        sweep.table("other")


def test_a_record_that_is_not_whole_is_to_do_again(here):
    (point,) = loaded(here, grid={"x": [1]}).points
    point.folder.mkdir(parents=True)
    point.file(".ipynb").touch()
    for text in ("", "{", "[]", '{"notebook": "02_other"}'):
        point.file(".json").write_text(text)
        assert point.status()[0] == "to do"


def test_a_notebook_without_a_record_fails_and_one_at_work_is_left_alone(here):
    path = here / "notebooks" / "01_tiny.ipynb"
    path.write_text(path.read_text().replace("Path(os.environ", "# Path(os.environ"))
    (point,) = loaded(here, grid={"x": [1]}).points
    with points.locked(point.folder, point.key) as mine:
        assert mine and points.run(point, 1, point.key) == points.BUSY
    assert points.run(point, 1, point.key) == points.FAILED
    assert point.status()[1]["reason"].startswith("it wrote no record")
    assert point.file(".failed.ipynb").exists() and not point.file(".ipynb").exists()


def test_a_dry_run_lists_the_points_and_runs_none(here, capsys):
    trial = loaded(here, grid={"x": [1, 2]}, seeds=2)
    sweep.dry_run(trial, 2)
    assert "4 points, 0 done, 0 failed, 4 to do; nobody knows" in capsys.readouterr().out
    trial.folder.mkdir(parents=True)
    record = {"notebook": "01_tiny", "metrics": {}, "seconds": 30.0}
    trial.points[1].file(".json").write_text(json.dumps(record))
    trial.points[1].file(".ipynb").touch()
    sweep.dry_run(trial, 2)
    said = capsys.readouterr().out
    assert f"done    {trial.points[1].key}  x=1.0 seed=1" in said
    assert "3 to do; about 60 s with 2 at a time (30.0 s each, the median of those done)" in said


def test_points_that_run_alone_never_run_beside_each_other(house):
    write(house, SPEC | {"grid": {"x": [1]}, "seeds": 2, "alone": True})
    processes = [begin(house), begin(house)]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, len(kernels(house)))
        time.sleep(0.1)
    assert most == 1 and len(ran(house)) == 2
    for process in processes:
        assert process.wait() == 0
        process.stdout.close()
