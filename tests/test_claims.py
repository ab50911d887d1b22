import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from ff_utils import utils
from ff_utils.report import claims, records


@pytest.fixture
def default():
    return {name: records.read(name, "default") for name in claims.notebooks()}


@pytest.fixture
def simulated(monkeypatch, default):
    """Stand-in for the simulation, which has tests of its own; returns what it computes."""
    values = dict(default[claims.MEMORY]["metrics"]["claims"])
    monkeypatch.setitem(
        sys.modules, "ff_utils.memory", SimpleNamespace(memory_metrics=lambda: values)
    )
    return values


def test_ledger_agrees_with_the_records(default):
    table = claims.judge(default)
    assert (table.verdict == table.expected).all()
    assert {"holds", "fails", "open"} <= set(table.verdict) <= set(claims.VERDICTS)
    assert table.why.str.fullmatch(r"[A-Z].*\.").all()
    assert not table[["source", "claim"]].duplicated().any()


def test_a_claim_whose_source_gives_no_number_says_that_the_threshold_is_ours():
    vague = [claim for claim in claims.read() if "significantly" in claim.claim]
    assert len(vague) >= 5 and {claim.threshold for claim in vague} == {"ours"}


@pytest.mark.parametrize(
    ("low", "high", "relation", "verdict"),
    [
        (0.0120, 0.0136, "at most", "holds"),  # its upper end is at most the claim
        (0.0120, 0.0137, "at most", "indistinguishable"),
        (0.0137, 0.0150, "at most", "fails"),  # its lower end is above the claim
        (0.0136, 0.0150, "at least", "holds"),
        (0.0135, 0.0150, "at least", "indistinguishable"),
        (0.0120, 0.0135, "at least", "fails"),
        (None, None, "at most", "open"),  # one seed
    ],
)
def test_verdict_on_an_error_respects_its_interval(
    low, high, relation, verdict, tmp_path, monkeypatch
):
    entry = {"claim": "1.36 %.", "source": "paper", "metric": "errors: x", "unit": "%"}
    entry |= {"relation": relation, "claimed": 0.0136, "verdict": "holds", "why": "So."}
    monkeypatch.setattr(claims, "LEDGER", tmp_path / "claims.yaml")
    claims.LEDGER.write_text(yaml.safe_dump([entry]))
    summary = {"mean": 0.0130, "standard_error": 0.0, "low": low, "high": high, "seeds": 5}
    monkeypatch.setattr(claims.accuracy, "over_seeds", lambda: {"x": summary})
    (row,) = claims.judge({}).itertuples()
    assert row.verdict == verdict
    assert row.measured.startswith("1.3 %") and (low is None) == ("one seed" in row.measured)


def test_a_record_whose_code_has_changed_since_is_named(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a", *words]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(utils, "ROOT", tmp_path)
    monkeypatch.setattr(utils, "RESULTS", tmp_path / "results")
    code = tmp_path / "ff_utils" / "ff" / "layers.py"
    utils.write_text(code, "a = 1\n")
    utils.write_text(tmp_path / "ff_utils" / "report" / "plots.py", "b = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    record = tmp_path / "results" / "default" / "01_x.json"

    def notes(name):
        utils.write_text(record, json.dumps({"provenance": {"commit": name}}))
        return claims.changed_since()

    assert notes(commit) == []
    assert notes(commit + "+") == [f"01_x: it was made with changes on top of {commit}."]
    assert notes("0" * 12) == [f"01_x: its commit {'0' * 12} is not in this repository."]
    utils.write_text(tmp_path / "ff_utils" / "report" / "plots.py", "b = 2\n")
    assert notes(commit) == []  # draws, and computes nothing
    utils.write_text(code, "a = 2\n")
    assert notes(commit) == [f"01_x: since its commit {commit} changed ff_utils/ff/layers.py."]
    utils.write_text(record.parents[1] / "full_length" / "x-0-1.json", record.read_text())
    assert notes(commit)[1:] == ["full_length: 1 of 1 trainings were made before changes of code."]


def test_verify_prints_every_claim(simulated, capsys):
    claims.main([])
    printed = capsys.readouterr().out
    assert all(claim.claim in printed for claim in claims.read())


def test_verdict_that_changes_is_an_error(default, simulated, monkeypatch):
    default[claims.MEMORY]["metrics"]["claims"]["seed_growth"] *= 2
    simulated["seed_growth"] *= 2
    monkeypatch.setattr(records, "read", lambda name, profile: default[name])
    (wrong,) = claims.verify()
    assert wrong.endswith("The ledger says 'holds', the records 'fails'.")


def test_record_that_is_stale_is_an_error(simulated):
    simulated["seed_growth"] *= 2
    stale = "error: 04_memory_profiling's record says seed_growth is .* run `make publish`"
    with pytest.raises(SystemExit, match=stale):
        claims.main([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "claim 1: verdict is 'maybe'; choose one of: holds"),
        ({"relation": "near"}, "claim 1: relation is 'near'; choose one of: about"),
        ({"relation": "about"}, "claim 1: a tolerance goes with the relation 'about' alone"),
        ({"unit": "KiB"}, "claim 1: unit is 'KiB'"),
        ({"threshold": "mine"}, "claim 1: threshold is 'mine'; choose one of: source, ours"),
        ({"clam": 1}, "claim 1: .*unexpected keyword argument 'clam'"),
        ({"why": None}, "claim 1: .*missing .*'why'"),
        ({"metric": f"{claims.MEMORY}: claims.nothing"}, "claims.nothing is in no record"),
    ],
)
def test_ledger_that_is_wrong_is_refused(change, message, default, tmp_path, monkeypatch):
    entry = yaml.safe_load(claims.LEDGER.read_text())[0] | change
    entry = {key: value for key, value in entry.items() if value is not None}
    monkeypatch.setattr(claims, "LEDGER", tmp_path / "claims.yaml")
    claims.LEDGER.write_text(yaml.safe_dump([entry]))
    with pytest.raises(ValueError, match=message):
        claims.judge(default)


@pytest.mark.parametrize("text", ["", "[]", "a: b", "- 1"])
def test_ledger_of_another_shape_is_one_sentence(text, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEDGER", tmp_path / "claims.yaml")
    claims.LEDGER.write_text(text)
    with pytest.raises(ValueError, match=r"claims.yaml(, claim 1: | is no list of claims)"):
        claims.read()


def test_metric_finds_items_rows_and_ratios():
    rows = [{"arm": "a", "depth": 2, "bytes": 6}, {"arm": "b", "depth": 2, "bytes": 3}]
    known = {"x": {"metrics": {"rows": rows, "part": {"list": [1, 5]}, "none": None}}}
    assert claims.metric("x: part.list.-1", known) == 5
    assert claims.metric("x: rows[arm=b,depth=2].bytes", known) == 3
    assert claims.metric("x: rows[arm=a].bytes / rows[arm=b].bytes", known) == 2
    for nothing in ("x: rows[arm=c].bytes", "x: part.other", "x: none", "gpu/x: part"):
        assert claims.metric(nothing, known) is None


def test_claims_of_a_gpu_are_judged_once_it_has_measured(default, tmp_path, monkeypatch):
    asked = {c.claim: c.metric for c in claims.read() if c.metric.startswith("gpu/")}
    shutil.copytree(utils.RESULTS / "full_length", tmp_path / "full_length")
    monkeypatch.setattr(utils, "RESULTS", tmp_path)
    assert set(claims.judge(default).set_index("claim").measured[list(asked)]) == {"-"}
    names = [metric.rpartition(".")[2] for metric in asked.values()]
    records.Run(claims.MEMORY, "gpu", {}).finish({"gpu": dict.fromkeys(names, 0.01)})
    table = claims.judge(default).set_index("claim").loc[list(asked)]
    assert len(asked) >= 3 and table.measured.iloc[0] == "1 %"
    assert set(table.verdict) == {"open"}  # until a person has entered the verdict


def test_readme_has_the_numbers_of_the_records():
    text = claims.README.read_text()
    assert claims.with_numbers(text) == text
    assert len(claims.NUMBER.findall(text)) == text.count("<!-- ") > 10


def test_readme_is_filled_in_with_the_unit_and_the_decimals_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "README", tmp_path / "README.md")
    mark = "<!-- 04_memory_profiling: simulated[arm=backprop,depth=47].peak_bytes -->"
    short = "<!-- 04: slopes.backprop -->"
    text = f"{mark}1 MB, {mark}0.00 GB, {short}1,000.5 kB; <!-- 03: test_error -->9.9 % of 5"
    error = 100 * records.read("03_backprop_baseline", "default")["metrics"]["test_error"]
    filled = f"{mark}4,204 MB, {mark}4.20 GB, {short}88,024.0 kB; "
    filled += f"<!-- 03: test_error -->{error:.1f} % of 5"
    claims.README.write_text(text)
    claims.fill_readme()
    assert claims.README.read_text() == filled
    with pytest.raises(ValueError, match=r"04: slopes\.none is in no record"):
        claims.with_numbers("<!-- 04: slopes.none -->1 MB")
