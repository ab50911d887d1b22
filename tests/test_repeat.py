import json
from types import SimpleNamespace

import pytest

from ff_utils.run import faults, repeat
from ff_utils.run.faults import without_times


def test_times_and_process_memory_are_left_out():
    rows = [{"instrument": "rss", "peak_bytes": 1}, {"instrument": "tracked", "peak_bytes": 2}]
    metrics = {"rows": rows, "speed_up": 1.2, "error": 0.1, "deep": {"step_seconds": 3, "n": [4]}}
    kept = {"rows": [rows[1]], "error": 0.1, "deep": {"n": [4]}}
    assert without_times(metrics) == kept


def test_differences_name_their_places():
    one = {"error": 0.1, "same": None, "rows": [{"a": 1.0}, {"a": float("nan")}], "gone": 2}
    other = {"error": 0.1, "same": None, "rows": [{"a": 1}, {"a": float("nan")}]}
    assert list(repeat.differences(one, other, "smoke")) == [
        "smoke.rows[0].a is 1.0 and 1",
        "smoke.gone is 2 and None",
    ]
    assert list(repeat.differences([1], [1, 2], "x")) == ["x is [1] and [1, 2]"]


@pytest.mark.parametrize(("errors", "wrong"), [((0.5, 0.5), ""), ((0.5, 0.25), "smoke.01_a.error")])
def test_two_runs_are_compared(errors, wrong, monkeypatch, capsys):
    errors = iter(errors)

    def run(folder, _):
        def write(command):
            place = folder / command.result
            place.mkdir(parents=True)
            record = {"metrics": {"error": next(errors), "seconds": id(folder)}}
            (place / "01_a.json").write_text(json.dumps(record))
            return 0

        return SimpleNamespace(folder=folder, run=write)

    monkeypatch.setattr(faults, "copy_checkout", lambda folder: None)
    monkeypatch.setattr(repeat, "Trial", run)
    if wrong:
        with pytest.raises(SystemExit, match=f"error: {wrong} is 0.5 and 0.25"):
            repeat.main([])
    else:
        repeat.main([])
        assert "the metrics of 1 records are the same" in capsys.readouterr().out
