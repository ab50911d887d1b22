import json
import os
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from ff_utils import claims, memory, paths, readme, reference, results
from ff_utils.arms import ARMS

SIZES = ["--hidden", "24", "--batch", "40", "--depths", "2", "--deepest", "2"]
# What a machine with PyTorch and the scientific packages alone does not have.
ABSENT = ("IPython", "ipykernel", "ipywidgets", "jupyterlab", "nbclient", "nbconvert", "nbformat")
ABSENT += ("papermill", "pooch", "requests", "dask", "psutil", "seaborn", "tqdm", "yaml")


def rehearse(folder, *arguments, **environment):
    """The command on the CPU, its records in a folder, by a Python that has only what it needs."""
    (folder / "sitecustomize.py").write_text(f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: (
    None if name.split(".")[0] in {ABSENT!r} else find(name, *rest)
)
""")
    code = "import pathlib; from ff_utils import reference as r; "
    code += f"r.REHEARSALS = pathlib.Path({str(folder)!r}); r.main()"
    where = os.pathsep.join([str(folder), str(paths.ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code, "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        cwd=paths.ROOT,
        env=os.environ | {"PYTHONPATH": where} | environment,
        check=False,
    )


def test_it_runs_without_notebooks_packages_and_goes_on_where_it_stopped(tmp_path):
    chosen = ["--arms", "backprop", "ff_streamed", *SIZES]
    done = rehearse(tmp_path, *chosen)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "cpu.jsonl"
    rows = reference.read(file)
    told = [(row["arm"], row["kind"], row["depth"]) for row in rows]
    wanted = [("backprop", "step", 2), ("ff_streamed", "step", 2), ("backprop", "training", 4)]
    assert told == wanted
    assert not any(row.get("error") for row in rows)
    streamed = rows[1]
    expected = memory.measure("ff_streamed", depth=2, hidden=24, batch=40)
    assert streamed["peak_bytes"] == expected.peak_bytes
    assert streamed["evaluation_peak_bytes"] == expected.evaluation_peak_bytes
    assert streamed["moved_bytes"] == expected.moved_bytes
    before = file.read_text()
    file.write_text("".join(before.splitlines(keepends=True)[:-1]))
    again = rehearse(tmp_path, *chosen)
    assert f"{len(rows)} points, {len(rows) - 1} of them there already" in again.stdout
    kept = [{**json.loads(line), "seconds": 0} for line in before.splitlines()][:-1]
    assert [{**row, "seconds": 0} for row in reference.read(file)][:-1] == kept


def test_when_time_is_over_what_is_left_is_told_and_nothing_started(tmp_path):
    point = {"kind": "step", "arm": "backprop", "depth": 2, "hidden": 9, "batch": 9}
    run = reference.Run(tmp_path / "cpu.jsonl", "cpu", -1)
    assert run.measure([point]) == [point] and not run.path.exists()


def test_points_come_with_the_most_telling_first_and_each_once():
    found = reference.points(list(ARMS), list(reference.DEPTHS), 1000, 2000, 5000)
    assert [p["depth"] for p in found[: len(ARMS)]] == [47] * len(ARMS)
    keys = [reference._key(point) for point in found]
    assert len(set(keys)) == len(keys)
    steps = {(p["arm"], p["depth"]) for p in found if p["kind"] == "step"}
    assert {(arm, depth) for arm in ARMS for depth in reference.DEPTHS} <= steps
    assert {("ff_streamed", 1000), ("backprop_offload", 1000), ("ff_resident", 1000)} <= steps
    assert reference.spread([2, 7, 12, 17, 47]) == [47, 2, 17, 7, 12]


def test_what_needs_too_much_memory_or_dies_is_a_row_with_its_reason(tmp_path, monkeypatch):
    point = {"kind": "step", "arm": "ff_streamed", "depth": 10, "hidden": 90_000, "batch": 40}
    assert "of the host's may be needed" in reference.measure(point, "cpu")["error"]

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.31 GiB.\nOf which")

    monkeypatch.setattr(reference, "_step", out_of_memory)
    found = reference.measure(point, "cuda")
    assert found == {"error": "out of memory: CUDA out of memory. Tried to allocate 9.31 GiB."}
    monkeypatch.setattr(sys, "executable", "/bin/false")
    run = reference.Run(tmp_path / "cpu.jsonl", "cpu", 1)
    assert run.measure([point]) == []
    (row,) = reference.read(tmp_path / "cpu.jsonl")
    assert row["error"].startswith("ended with status 1")
    # It is tried again, as what ran out of memory is not.
    assert reference.Run(tmp_path / "cpu.jsonl", "cpu", 1).rows == []


def test_what_is_left_of_the_time_goes_to_trainings_that_go_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    assert reference.train_at_length([("wide", 0)], time.monotonic()) == [("wide", 0)]
    assert capfd.readouterr().out == ""  # no time, nothing started
    start = time.monotonic()
    assert reference.train_at_length([("wide", 1)], start + 3) == [("wide", 1)]
    assert 3 <= time.monotonic() - start < 30
    assert capfd.readouterr().out == "at full length: wide, seed 1\n"
    assert reference.train_at_length([("nonesuch", 0)], start + 300) == [("nonesuch", 0)]
    assert "study is 'nonesuch'" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_sentence(capsys):
    with pytest.raises(SystemExit):
        reference.main([])
    told = capsys.readouterr().err
    assert told == "error: there is no CUDA device here; --device cpu rehearses on the CPU.\n"


@pytest.fixture
def records():
    return {name: results.read(name, "default") for name in readme.NOTEBOOKS}


@pytest.fixture
def measured(records, tmp_path, monkeypatch):
    """A made-up GPU's table: the simulation, 1 % more, a workspace and large blocks."""
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    simulated = records["05_memory_profiling"]["metrics"]["simulated"]
    deep = [s | {"depth": 1000} for s in simulated if s["arm"] == "ff_streamed"][-1:]
    rows = []
    for s in simulated + deep:
        requested = 1.01 * s["peak_bytes"] + 32e6
        rows.append(
            {key: s[key] for key in ("arm", "depth", "hidden", "batch")}
            | {"kind": "step", "workspace_bytes": 32e6, "requested_bytes": requested}
            | {"peak_bytes": 1.04 * requested, "seconds": s["depth"] / 500, "gpu": "Made-up 100"}
        )
    rows.append({"kind": "step", "arm": "ff_frugal", "depth": 1000, "error": "out of memory"})
    rows.append({"kind": "training", "arm": "backprop", "test_error": 0.015, "gpu": "Made-up 100"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "made-up-100.jsonl").write_text(text)
    (tmp_path / "other.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return pd.DataFrame(simulated)


def test_measured_steps_stand_beside_simulated_ones(measured):
    found = reference.compared(measured)
    assert len(found) == len(measured) and found.ratio.to_numpy() == pytest.approx(1.01)
    parts = found.tensors + found.workspace + found.rounding
    assert parts.to_numpy() == pytest.approx(found.measured.to_numpy())
    assert "On Made-up 100, at" in reference.about(found)
    assert len(reference.table()) == len(measured) + 2


def test_without_records_there_is_a_sentence_and_an_empty_table(records, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "none")
    simulated = pd.DataFrame(records["05_memory_profiling"]["metrics"]["simulated"])
    found = reference.compared(simulated)
    assert found.empty and "`make gpu-reference`" in reference.about(found)
    assert reference.metrics(simulated) == {} and reference.table("training").empty
    assert "No GPU has measured" in readme._caption(records)


def test_claims_of_a_gpu_are_judged_once_it_has_measured(measured, records, monkeypatch):
    asked = [c for c in claims.read() if c.get("metric", "").startswith("reference: ")]
    names = {c["metric"].removeprefix("reference: ") for c in asked}
    assert names == set(reference.metrics(measured))
    table = claims.judge(records).set_index("claim")
    assert (table.measured[[c["claim"] for c in asked]] != "-").all()
    assert (table.verdict[[c["claim"] for c in asked]] == "open").all()
    entered = [c | {"verdict": "holds"} for c in asked]
    monkeypatch.setattr(claims, "read", lambda: entered)
    verdicts = claims.judge(records).set_index("claim")
    assert verdicts.measured[asked[0]["claim"]] == "1 %"
    assert verdicts.verdict[asked[0]["claim"]] == "holds"
    monkeypatch.setattr(reference, "FOLDER", paths.ROOT / "nowhere")
    with pytest.raises(ValueError, match="is in no record; run `make gpu-reference`"):
        claims.judge(records)


def test_the_readme_names_the_gpu_that_measured(measured, records):
    assert "Made-up 100" in readme._caption(records)
    assert any("Made-up 100, 47 layers" in line for line in readme._gpu_results(records))
    assert readme._gpu_time().startswith("| Made-up 100 | `make gpu-reference`")
    assert "backprop 1.5%" in readme._gpu_time()
