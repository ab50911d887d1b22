import copy
import subprocess
import sys

import pytest
import yaml

from ff_utils import claims, paths, results


@pytest.fixture(scope="module")
def records():
    return {name: results.read(name, "default") for name in claims.notebooks()}


def test_the_ledger_agrees_with_the_records(records):
    table = claims.judge(records)
    assert (table.verdict == table.expected).all()
    assert set(table.verdict) == set(claims.VERDICTS)
    assert table.why.str.fullmatch(r"[A-Z].*\.").all()


def test_the_command_recomputes_and_prints_every_claim():
    done = subprocess.run(
        [sys.executable, "-m", "ff_utils.claims"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for claim in claims.read():
        assert claim["claim"] in done.stdout


def test_a_verdict_that_changes_is_an_error(records, monkeypatch):
    changed = copy.deepcopy(records)
    changed["05_memory_profiling"]["metrics"]["claims"]["seed_growth"] *= 2
    table = claims.judge(changed)
    (row,) = table[table.verdict != table.expected].itertuples()
    assert row.verdict == "fails" and row.expected == "holds"
    monkeypatch.setattr(results, "read", lambda name, profile: changed[name])
    monkeypatch.setattr(claims, "memory_metrics", dict)
    assert claims.verify() == [f"{row.claim} The ledger says 'holds', the records 'fails'."]


def test_a_record_that_is_stale_is_an_error(records, monkeypatch):
    kept = records["05_memory_profiling"]["metrics"]["claims"]
    monkeypatch.setattr(claims, "memory_metrics", lambda: {"seed_growth": 2 * kept["seed_growth"]})
    (wrong,) = claims.verify()
    assert "record says seed_growth is" in wrong and "run `make publish`" in wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "claim 1: verdict is 'maybe'; choose one of: holds"),
        ({"relation": "near"}, "claim 1: relation is 'near'; choose one of: about"),
        ({"relation": "about"}, "claim 1: a tolerance goes with the relation 'about' alone"),
        ({"unit": "KiB"}, "claim 1: unit is 'KiB'"),
        ({"clam": 1}, "claim 1: missing or unknown key: clam"),
        ({"metric": "05_memory_profiling: claims.nothing"}, "is in no record; run `make 05`"),
    ],
)
def test_a_wrong_ledger_is_refused(change, message, records, tmp_path, monkeypatch):
    found = yaml.safe_load(claims.LEDGER.read_text())
    found[0] |= change
    ledger = tmp_path / "claims.yaml"
    ledger.write_text(yaml.safe_dump(found))
    monkeypatch.setattr(claims, "LEDGER", ledger)
    monkeypatch.setattr(paths, "relative", lambda path: path.name)
    with pytest.raises(ValueError, match=message):
        claims.judge(records)
