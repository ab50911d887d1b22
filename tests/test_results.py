import json

import pandas as pd
import pytest

from ff_utils import datasets, paths, results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


def begin(profile="trial"):
    names = ["hidden", "theta", "steps", "epochs"]
    return results.start(
        "01_algorithm_walkthrough", {"profile": profile, "seed": 3, **dict.fromkeys(names, 1)}
    )


def test_a_record_holds_parameters_metrics_data_and_provenance(folder):
    data = datasets.load("digits")
    table = pd.DataFrame({"epoch": [1, 2], "layer": [None, 1.0]})
    written = begin().finish({"error": 0.123456789, "history": table}, data)
    record = results.read("01_algorithm_walkthrough", "trial")
    assert record == json.loads(json.dumps(written))
    assert record["parameters"]["seed"] == 3 and "profile" not in record["parameters"]
    assert record["metrics"]["error"] == 0.123457
    assert record["metrics"]["history"] == [{"epoch": 1, "layer": None}, {"epoch": 2, "layer": 1}]
    assert record["data"]["checksum"] == data.checksum
    assert {"commit", "torch", "device", "threads", "wall_seconds"} <= set(record["provenance"])
    assert results.digest(record) == results.digest(written)


def test_numbers_that_are_not_finite_are_null_so_that_records_stay_json(folder):
    begin().finish({"loss": float("nan")})
    text = results.record_path("01_algorithm_walkthrough", "trial").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"]["loss"] is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 9, "notebook": ""}'])
def test_a_record_that_is_not_whole_is_refused_with_the_remedy(folder, text):
    path = results.record_path("01_algorithm_walkthrough", "trial")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"delete it and run `make 01 PROFILE=trial`"):
        results.read("01_algorithm_walkthrough", "trial")


def test_a_missing_record_names_the_command_that_makes_it(folder):
    with pytest.raises(ValueError, match=r"is missing: run `make 05 PROFILE=smoke`"):
        results.read("05_memory_profiling", "smoke")


def test_by_hand_the_default_records_are_read_until_there_are_own_ones(folder):
    begin("default").finish({"from": "default"})
    read = results.read("01_algorithm_walkthrough", "interactive")
    assert read["metrics"]["from"] == "default"
    begin("interactive").finish({"from": "hand"})
    read = results.read("01_algorithm_walkthrough", "interactive")
    assert read["metrics"]["from"] == "hand"


def test_a_failed_write_leaves_the_old_record(folder, monkeypatch):
    begin().finish({"error": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        begin().finish({"error": 2})
    assert results.read("01_algorithm_walkthrough", "trial")["metrics"]["error"] == 1
    assert len(list((folder / "trial").iterdir())) == 1
