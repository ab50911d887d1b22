import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from ff_utils import data, utils
from ff_utils.report import records

NOTEBOOK = "01_algorithm_walkthrough"
DEFAULT = sorted((utils.RESULTS / "default").glob("*.json"))
FULL_LENGTH = sorted((utils.RESULTS / "full_length").glob("*.json"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "RESULTS", tmp_path)
    return tmp_path


def begin(profile="trial", **more):
    names = ["hidden", "theta", "steps", "epochs"]
    values = {"profile": profile, "seed": 3, **dict.fromkeys(names, 1)}
    return records.start(NOTEBOOK, values | more)


def test_record_holds_parameters_metrics_data_and_provenance(folder):
    digits = data.load_dataset("digits")
    table = pd.DataFrame({"epoch": [1, 2], "layer": [None, 1.0]})
    metrics = {"error": 0.123456789, "history": table, "loss": float("nan"), "best": np.int64(3)}
    written = begin().finish(metrics, digits)
    record = records.read(NOTEBOOK, "trial")
    assert record == json.loads(json.dumps(written))
    assert record["parameters"]["seed"] == 3 and "profile" not in record["parameters"]
    rows = [{"epoch": 1, "layer": None}, {"epoch": 2, "layer": 1}]
    assert record["metrics"] == {"error": 0.123457, "history": rows, "loss": None, "best": 3}
    assert record["data"]["checksum"] == digits.checksum
    assert {"commit", "torch", "device", "threads", "cpu_capability"} <= set(record["provenance"])
    assert records.digest(record) == records.digest(written)
    assert "NaN" not in records.record_path(NOTEBOOK, "trial").read_text()


@pytest.mark.parametrize("path", DEFAULT + FULL_LENGTH, ids=lambda path: path.stem)
def test_records_that_are_committed_stay_readable(path, capsys):
    record = json.loads(path.read_text())
    if path in DEFAULT:
        assert records.read(path.stem, "default") == record
    assert set(record) == records.KEYS
    assert records.digest(record) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    records.footer(record)
    assert f"torch {record['provenance']['torch']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", ["", "{", "[]", {"schema": 9}, {"notebook": ""}, {"metrics": {}}]
)
def test_record_that_is_not_whole_is_refused_with_the_remedy(folder, change):
    written = begin().finish({"error": 1})
    text = json.dumps(written | change) if isinstance(change, dict) else change
    records.record_path(NOTEBOOK, "trial").write_text(text)
    with pytest.raises(ValueError, match=r"delete it and run `make 01 PROFILE=trial`"):
        records.read(NOTEBOOK, "trial")


def test_what_is_missing_is_refused(folder):
    with pytest.raises(ValueError, match=r"is missing: run `make 04 PROFILE=smoke`"):
        records.read("04_memory_profiling", "smoke")
    with pytest.raises(ValueError, match=r"notebook is '01_algorithm'"):
        records.start("01_algorithm", {})


def test_interactive_run_reads_the_default_records_until_it_has_its_own(folder):
    begin("default").finish({"from": "default"})
    assert records.read(NOTEBOOK, "interactive")["metrics"]["from"] == "default"
    begin("interactive").finish({"from": "hand"})
    assert records.read(NOTEBOOK, "interactive")["metrics"]["from"] == "hand"


def test_sweep_says_where_the_record_goes(folder, monkeypatch, capsys):
    monkeypatch.setattr(utils, "ROOT", folder)
    run = begin(record_file="sweeps/trial/0a1b.json")
    record = run.finish({"error": 1})
    assert json.loads((folder / "sweeps/trial/0a1b.json").read_text()) == record
    assert "sweeps/trial/0a1b.json" in capsys.readouterr().out
    assert not records.record_path(NOTEBOOK, "trial").exists()
    assert "record_file" not in record["parameters"]
    assert run.figures.parts[-3:] == ("sweeps", "0a1b", "figures")


def test_figures_of_a_profile_are_kept_apart_from_the_published_ones():
    assert begin("default").figures == utils.ROOT / "figures"
    assert begin("smoke").figures == utils.BUILD / "smoke" / "figures"


def test_failed_write_leaves_the_old_record(folder, monkeypatch):
    begin().finish({"error": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        begin().finish({"error": 2})
    assert records.read(NOTEBOOK, "trial")["metrics"]["error"] == 1
    assert len(list((folder / "trial").iterdir())) == 1


def test_less_says_more_for_what_is_not_saved():
    assert records.less(0.123) == "12% less" and records.less(-0.03) == "3% more"
