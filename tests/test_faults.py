"""The trials of `make faults`, with a small job in place of the commands that take long."""

import pytest

from ff_utils.run import faults
from ff_utils.run.faults import FAULTS, Command, run_trial

JOB = """import json, sys, time
from pathlib import Path
if Path("in.txt").read_text() != "whole":
    sys.exit("error: in.txt is not whole: fetch it again.")
time.sleep(0.3)
record = Path("build/record.json")
record.parent.mkdir(exist_ok=True)
number = NUMBER
temporary = record.with_name("temporary")
temporary.write_text(json.dumps({"metrics": {"number": number, "seconds": time.time()}}))
temporary.replace(record)
"""
COUNTING = "json.loads(record.read_text())['metrics']['number'] + 1 if record.exists() else 1"


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Run the trial of a fault; number: what the job computes. turn: how many had that fault."""

    def run(fault, number="1", turn=0):
        checkout = tmp_path / "checkout"
        (checkout / "data").mkdir(parents=True)
        (checkout / "job.py").write_text(JOB.replace("NUMBER", number))
        (checkout / "in.txt").write_text("whole")
        job = Command("python3 job.py", "build/record.json", ("in.txt",), inputs=True)
        monkeypatch.setattr(faults, "COMMANDS", {"job": job, "another": job})
        monkeypatch.setattr(faults, "DAMAGED", {"in.txt": job})
        return run_trial(FAULTS.index(fault) + turn * len(FAULTS), tmp_path, {})

    return run


@pytest.mark.parametrize("fault", sorted(set(FAULTS)))
def test_job_that_can_be_given_again_survives(trial, fault):
    row = trial(fault)
    assert row["survived"] and row["fault"] == fault, row


def test_result_that_depends_on_what_was_there_does_not_survive(trial):
    row = trial("two at once", COUNTING)
    assert not row["survived"] and "metrics differ" in row["why"]


def test_what_a_job_leaves_behind_is_named(trial):
    row = trial("kill", "Path('build/.left').touch() or 1")
    assert not row["survived"] and "left behind: .left" in row["why"]


@pytest.mark.parametrize(("turn", "name"), [(0, "job"), (1, "another"), (2, "job")])
def test_commands_take_turns(trial, turn, name):
    assert trial("full disk", turn=turn)["of"] == name
