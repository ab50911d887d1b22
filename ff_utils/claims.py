"""The claims ledger: what others say, what the records say, and the verdict.

`python -m ff_utils.claims` judges every claim of data/claims.yaml from the default profile's
records, having recomputed the memory metrics; a verdict that changed is an error.
"""

import sys
import textwrap

import pandas as pd
import yaml

from ff_utils import checks, closed_form, memory, paths, reference, results
from ff_utils.closed_form import Setting

LEDGER = paths.DATA / "claims.yaml"
RELATIONS = ("about", "at least", "at most")
VERDICTS = ("holds", "fails", "open")
NEEDED = {"claim", "source", "unit", "relation", "claimed", "verdict", "why"}
OPTIONAL = {"metric", "tolerance"}
UNITS = {
    "%": lambda value: f"{100 * value:.4g} %",
    "MB": lambda value: f"{value / 1e6:,.0f} MB",
    "times": lambda value: f"{value:.3g}x",
}


def read() -> list[dict]:
    """The ledger's claims; ValueError with the place where one is not as the file's head says."""
    try:
        claims = yaml.safe_load(LEDGER.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{paths.relative(LEDGER)} is not YAML: {error}") from error
    for number, claim in enumerate(claims, start=1):
        where = f"{paths.relative(LEDGER)}, claim {number}:"
        keys = set(claim)
        if not keys >= NEEDED or not keys <= NEEDED | OPTIONAL:
            odd = ", ".join(sorted(NEEDED - keys or keys - NEEDED - OPTIONAL))
            raise ValueError(f"{where} missing or unknown key: {odd}.")
        if (claim["relation"] == "about") != ("tolerance" in claim):
            raise ValueError(f"{where} a tolerance goes with the relation 'about' alone.")
        checks.one_of(f"{where} relation", claim["relation"], RELATIONS)
        checks.one_of(f"{where} verdict", claim["verdict"], VERDICTS)
        checks.one_of(f"{where} unit", claim["unit"], UNITS)
    return claims


def notebooks() -> set[str]:
    """Those whose records the ledger asks; what it asks of a GPU stands elsewhere."""
    asked = {claim["metric"].partition(": ")[0] for claim in read() if "metric" in claim}
    return asked - {"reference"}


def memory_metrics(hidden: int = 2000, batch: int = 5000, depth: int = 47) -> dict[str, float]:
    """What the ledger asks of memory, at the seed's sizes unless others are given.

    Peaks are simulated, but for depths between, where the closed form (within 1 %) stands in.
    """
    sizes = {"hidden": hidden, "batch": batch}
    found: dict[tuple[str, int], memory.Report] = {}

    def report(arm: str, layers: int) -> memory.Report:
        if (arm, layers) not in found:
            found[arm, layers] = memory.measure(arm, depth=layers, **sizes)
        return found[arm, layers]

    def saved(lean: str, other: str) -> float:
        return 1 - report(lean, depth).peak_bytes / report(other, depth).peak_bytes

    def a_layer(arm: str, size) -> float:
        return size(report(arm, depth)) - size(report(arm, depth - 1))

    def form(arm: str, layers: int) -> int:
        return closed_form.peak(arm, Setting(layers, hidden, batch))

    shallow = report("ff_seed", 2)
    every = range(2, depth + 1)
    return {
        "seed_saved_at_47_layers": saved("ff_seed", "backprop_seed"),
        "seed_saved_against_plain": saved("ff_seed", "backprop"),
        "saved_at_47_layers": saved("ff_resident", "backprop"),
        "saved_against_remedies": saved("ff_resident", "backprop_frugal"),
        "seed_most_saved": max(1 - form("ff_seed", d) / form("backprop_seed", d) for d in every),
        "seed_bytes_a_layer": a_layer("ff_seed", lambda r: r.peak_bytes),
        "seed_growth": report("ff_seed", depth).peak_bytes - shallow.peak_bytes,
        "seed_shallow": shallow.peak_bytes,
        "seed_shallow_evaluation": shallow.evaluation_peak_bytes,
        "streamed_1000_over_2_layers": form("ff_streamed", 1000) / form("ff_streamed", 2),
        "streamed_backprop_over_streamed_ff": report("backprop_streamed_frugal", depth).peak_bytes
        / report("ff_frugal", depth).peak_bytes,
        "activations_a_layer": a_layer("ff_resident", lambda r: r.breakdown["activations"]),
        "recurrent_over_backprop": min(
            form("ff_recurrent", d) / form("backprop_seed", d) for d in every
        ),
    }


def judge(records: dict[str, dict]) -> pd.DataFrame:
    """Every claim with what was measured and the verdict that follows.

    records: by notebook, as `results.read` gives them; what a GPU measured is looked up beside
    them. A claim may stay open until its metric is there. Columns: claim, source, claimed,
    measured (both with their units), verdict, expected (the ledger's), why.
    """
    rows = []
    records = records | {"reference": {"metrics": _measured(records)}}
    for claim in read():
        value = _lookup(claim, records) if "metric" in claim else None
        verdict = "open" if claim["verdict"] == "open" else _verdict(claim, value)
        show = UNITS[claim["unit"]]
        rows.append(
            {
                "claim": claim["claim"],
                "source": claim["source"],
                "claimed": f"{claim['relation']} {show(claim['claimed'])}",
                "measured": "-" if value is None else show(value),
                "verdict": verdict,
                "expected": claim["verdict"],
                "why": claim["why"],
            }
        )
    return pd.DataFrame(rows)


def _measured(records: dict[str, dict]) -> dict[str, float]:
    simulated = records["05_memory_profiling"]["metrics"]["simulated"]
    return reference.metrics(pd.DataFrame(simulated))


def _lookup(claim: dict, records: dict[str, dict]) -> float | None:
    notebook, _, path = claim["metric"].partition(": ")
    value = records.get(notebook, {}).get("metrics", {})
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None and claim["verdict"] != "open":
        remedy = "make gpu-reference" if notebook == "reference" else f"make {notebook[:2]}"
        raise ValueError(
            f"{paths.relative(LEDGER)}: {claim['metric']} is in no record; run `{remedy}`."
        )
    return value


def _verdict(claim: dict, value: float) -> str:
    claimed = claim["claimed"]
    holds = {
        "about": abs(value - claimed) <= claim.get("tolerance", 0) * abs(claimed),
        "at least": value >= claimed,
        "at most": value <= claimed,
    }[claim["relation"]]
    return "holds" if holds else "fails"


def verify() -> list[str]:
    """Judge the ledger from the default records and print it; returns what is wrong with it."""
    records = {name: results.read(name, "default") for name in notebooks()}
    kept = records["05_memory_profiling"]["metrics"].get("claims", {})
    wrong = []
    for name, value in memory_metrics().items():
        if abs(value - kept.get(name, float("nan"))) <= 1e-5 * abs(value):
            continue
        wrong.append(
            f"05_memory_profiling's record says {name} is {kept.get(name)}, computed again it is "
            f"{value:.6g}: run `make publish`."
        )
    table = judge(records)
    for row in table.itertuples():
        print(f"{row.verdict:6} {row.claim}")
        about = f"claimed {row.claimed}, measured {row.measured} ({row.source})"
        for text in (about, row.why):
            print(textwrap.fill(text, 96, initial_indent=" " * 7, subsequent_indent=" " * 7))
        if row.expected == "open" and row.measured != "-":
            print("       It is measured: enter a verdict, or say in `why` what is missing.")
        if row.verdict != row.expected:
            wrong.append(
                f"{row.claim} The ledger says {row.expected!r}, the records {row.verdict!r}."
            )
    counts = ", ".join(f"{(table.verdict == v).sum()} {v}" for v in VERDICTS)
    print(f"\n{len(table)} claims: {counts}")
    return wrong


def main() -> None:
    """Exit with status 1 and a sentence for everything that is wrong."""
    try:
        wrong = verify()
    except ValueError as error:
        wrong = [str(error)]
    if wrong:
        sys.exit("\n".join(f"error: {sentence}" for sentence in wrong))


if __name__ == "__main__":
    main()
