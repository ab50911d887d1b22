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
    assert set(table.verdict) == set(claims.VERDICTS)
    assert table.why.str.fullmatch(r"[A-Z].*\.").all()


def test_verify_prints_every_claim(simulated, capsys):
    claims.main()
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
        claims.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "claim 1: verdict is 'maybe'; choose one of: holds"),
        ({"relation": "near"}, "claim 1: relation is 'near'; choose one of: about"),
        ({"relation": "about"}, "claim 1: a tolerance goes with the relation 'about' alone"),
        ({"unit": "KiB"}, "claim 1: unit is 'KiB'"),
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
    monkeypatch.setattr(utils, "RESULTS", tmp_path)
    assert set(claims.judge(default).set_index("claim").measured[list(asked)]) == {"-"}
    names = [metric.rpartition(".")[2] for metric in asked.values()]
    records.Run(claims.MEMORY, "gpu", {}).finish({"gpu": dict.fromkeys(names, 0.01)})
    table = claims.judge(default).set_index("claim").loc[list(asked)]
    assert len(asked) >= 4 and table.measured.iloc[0] == "1 %"
    assert set(table.verdict) == {"open"}  # until a person has entered the verdict


def test_readme_has_the_numbers_of_the_records():
    text = claims.README.read_text()
    assert claims.with_numbers(text) == text
    assert len(claims.NUMBER.findall(text)) == text.count("<!-- ") > 30


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
    with pytest.raises(ValueError, match=r"05: slopes\.none is in no record"):
        claims.with_numbers("<!-- 04: slopes.none -->1 MB")
