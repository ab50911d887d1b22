"""The ledger of claims, and README's numbers: both are checked against the records.

`make verify` recomputes the memory metrics and judges every claim of data/claims.yaml from the
default profile's records and those of full-length trainings; a verdict that changed is an error.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd
import yaml

from ff_utils import utils
from ff_utils.report import accuracy, records

LEDGER = utils.DATA / "claims.yaml"
README = utils.ROOT / "README.md"
MEMORY = "04_memory_profiling"
ERRORS = "errors"  # in a metric's name: test errors of full-length trainings, over seeds
VERDICTS = ("holds", "fails", "indistinguishable", "open")
THRESHOLDS = ("source", "ours")
CODE = ("ff_utils", ":!ff_utils/report", ":!ff_utils/run")  # what computes a record's numbers
RELATIONS = {
    "about": lambda value, claim: abs(value - claim.claimed) <= claim.tolerance * claim.claimed,
    "at least": lambda value, claim: value >= claim.claimed,
    "at most": lambda value, claim: value <= claim.claimed,
}
UNITS = {
    "%": lambda value: f"{100 * value:.4g} %",
    "MB": lambda value: f"{value / 1e6:,.0f} MB",
    "times": lambda value: f"{value:.4g}x",
}
# In README a mark names the source of a number: <!-- 04: slopes.backprop -->88 MB
NUMBER = re.compile(
    r"<!-- (?P<metric>[\w/]+: [^>]+) -->(?P<number>-?[\d,.]*\d)(?P<unit> ?%| [kMG]B|)"
)
FACTORS = {"": 1, "%": 100, "kB": 1e-3, "MB": 1e-6, "GB": 1e-9}


@dataclass(frozen=True)
class Claim:
    """An entry of the ledger, whose head says what each key is."""

    claim: str
    source: str
    unit: str
    relation: str
    claimed: float
    verdict: str
    why: str
    metric: str = ""
    tolerance: float | None = None
    threshold: str = "source"

    def __post_init__(self) -> None:
        """Refuse what is not a choice."""
        utils.check_choice("relation", self.relation, RELATIONS)
        utils.check_choice("verdict", self.verdict, VERDICTS)
        utils.check_choice("unit", self.unit, UNITS)
        utils.check_choice("threshold", self.threshold, THRESHOLDS)
        if (self.relation == "about") != (self.tolerance is not None):
            raise ValueError("a tolerance goes with the relation 'about' alone.")


def read() -> list[Claim]:
    """The ledger's claims; ValueError with the number of an entry that is not as it should be."""
    claims, place = [], utils.relative(LEDGER)
    entries = yaml.safe_load(LEDGER.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{place} is no list of claims: fetch it again.")
    for number, entry in enumerate(entries, start=1):
        try:
            claims.append(Claim(**entry))
        except (TypeError, ValueError) as error:
            reason = re.sub(r"^\S*Claim(\.__init__)?\(\) ", "", str(error))
            raise ValueError(f"{place}, claim {number}: {reason}") from error
    return claims


def notebooks() -> set[str]:
    """Notebooks whose default records the ledger asks."""
    asked = {claim.metric.partition(": ")[0] for claim in read()}
    return {name for name in asked if name and "/" not in name} - {ERRORS}


def metric(name: str, known: dict[str, dict]) -> float | dict | None:
    """The number that `name` stands for, or None if it is in no record.

    "errors: FORM" is a form's test error over seeds, as `accuracy.over_seeds` gives it.

    name: "RECORD: path", or "RECORD: path / path" for a ratio. RECORD is a key of `known`, a
    notebook (or its number) of the default profile, or PROFILE/NOTEBOOK. Paths: `utils.value_at`.
    """
    place, _, paths = name.partition(": ")
    record = {"metrics": accuracy.over_seeds()} if place == ERRORS else known.get(place)
    if not record:
        profile, notebook = PurePosixPath("default", place).parts[-2:]
        if notebook.isdigit():
            notebook = next(utils.NOTEBOOKS.glob(f"{notebook}_*.ipynb")).stem
        if not records.record_path(notebook, profile).exists():
            return None
        record = records.read(notebook, profile)
    values = [utils.value_at(record["metrics"], path) for path in paths.split(" / ")]
    if None in values:
        return None
    return values[0] if len(values) == 1 else values[0] / values[1]


def judge(known: dict[str, dict]) -> pd.DataFrame:
    """Every claim with what was measured and the verdict that follows.

    known: records by notebook, as `records.read` gives them. Columns: claim, source, claimed,
    measured (both with their units), verdict, expected (the ledger's), why.
    """
    rows = []
    for claim in read():
        value = metric(claim.metric, known) if claim.metric else None
        if value is None and claim.verdict != "open":
            raise ValueError(f"{utils.relative(LEDGER)}: {claim.metric} is in no record.")
        ours = ", a threshold of ours" if claim.threshold == "ours" else ""
        rows.append(
            {
                "claim": claim.claim,
                "source": claim.source,
                "claimed": f"{claim.relation} {UNITS[claim.unit](claim.claimed)}{ours}",
                "measured": _text(value, UNITS[claim.unit]),
                "verdict": _verdict(claim, value),
                "expected": claim.verdict,
                "why": claim.why,
            }
        )
    return pd.DataFrame(rows)


def _verdict(claim: Claim, value: float | dict | None) -> str:
    if claim.verdict == "open":  # until a person has entered another
        return "open"
    if not isinstance(value, dict):
        return "holds" if RELATIONS[claim.relation](value, claim) else "fails"
    if value["low"] is None:  # one seed is not a result
        return "open"
    ends = [RELATIONS[claim.relation](value[end], claim) for end in ("low", "high")]
    return "indistinguishable" if ends[0] != ends[1] else "holds" if ends[0] else "fails"


def _text(value: float | dict | None, show: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return show(value)
    if value["low"] is None:
        return f"{show(value['mean'])}, one seed"
    interval = f"95 % interval {show(value['low'])} to {show(value['high'])}"
    return f"{show(value['mean'])}, {interval} over {value['seeds']} seeds"


def changed_since() -> list[str]:
    """A sentence for every default record whose code has changed since it was made, and one for
    the full-length trainings.

    A note and no error: a change of code need not change a number.
    """
    if not shutil.which("git"):
        return ["without git, changes of code since the records can't be named."]
    notes = []
    for path in sorted((utils.RESULTS / "default").glob("*.json")):
        if change := _change_since(path):
            notes.append(f"{path.stem}: {change}.")
    trainings = list((utils.RESULTS / accuracy.FOLDER).glob("*.json"))
    if older := [path for path in trainings if _change_since(path)]:
        count = f"{len(older)} of {len(trainings)} trainings"
        notes.append(f"{accuracy.FOLDER}: {count} were made before changes of code.")
    return notes


def _change_since(path: Path) -> str:
    commit = json.loads(path.read_text(encoding="utf-8"))["provenance"]["commit"]
    command = ["git", "diff", "--name-only", commit.removesuffix("+"), "--", *CODE]
    done = subprocess.run(command, cwd=utils.ROOT, capture_output=True, text=True)
    files = done.stdout.split()
    if done.returncode:
        return f"its commit {commit} is not in this repository"
    if files:
        more = f" and {len(files) - 3} more" if files[3:] else ""
        return f"since its commit {commit} changed {', '.join(files[:3])}{more}"
    return f"it was made with changes on top of {commit[:-1]}" if commit.endswith("+") else ""


def verify() -> list[str]:
    """Judge the ledger from the default records and print it; returns what is wrong with it."""
    from ff_utils.memory import memory_metrics  # simulates training steps, so it loads all networks

    known = {name: records.read(name, "default") for name in notebooks()}
    kept = known[MEMORY]["metrics"].get("claims", {})
    wrong = [
        f"{MEMORY}'s record says {name} is {kept.get(name)}, computed again it is {value:.6g}: "
        "run `make publish`."
        for name, value in memory_metrics().items()
        if not abs(value - kept.get(name, float("nan"))) <= 1e-5 * abs(value)
    ]
    table = judge(known)
    for row in table.itertuples():
        print(f"{row.verdict}: {row.claim}")
        about = f"claimed {row.claimed}, measured {row.measured} ({row.source})"
        for text in (about, row.why):
            print(textwrap.fill(text, 96, initial_indent=" " * 7, subsequent_indent=" " * 7))
        if row.verdict != row.expected:
            told = f"The ledger says {row.expected!r}, the records {row.verdict!r}."
            wrong.append(f"{row.claim} {told}")
    counts = ", ".join(f"{(table.verdict == v).sum()} {v}" for v in VERDICTS)
    print(f"\n{len(table)} claims: {counts}")
    for note in changed_since():
        print(f"note: {note}")
    return wrong


def with_numbers(text: str) -> str:
    """`text` with every marked number as the records have it, in the unit and the decimals that it
    is written in. ValueError for a mark whose number is in no record."""

    def fill(found: re.Match) -> str:
        mark, number, unit = found["metric"], found["number"], found["unit"]
        value = metric(mark, {})
        if value is None:
            raise ValueError(f"README.md: {mark} is in no record.")
        decimals = len(number.partition(".")[2])
        return f"<!-- {mark} -->{value * FACTORS[unit.strip()]:,.{decimals}f}{unit}"

    return NUMBER.sub(fill, text)


def fill_readme() -> None:
    """Write the default records' numbers into README."""
    utils.write_text(README, with_numbers(README.read_text(encoding="utf-8")))


def main(arguments: list[str] | None = None) -> None:
    """Judge every claim of the ledger against the records."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils verify", description=main.__doc__)
    parser.parse_args(arguments)
    try:
        wrong = verify()
    except (ValueError, yaml.YAMLError) as error:
        wrong = [str(error)]
    if wrong:
        sys.exit("\n".join(f"error: {sentence}" for sentence in wrong))
