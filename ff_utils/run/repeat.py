"""The smoke profile twice, each time in a fresh copy of this checkout: are the metrics the same?

`python -m ff_utils repeat`, with which `make verify` ends. It takes about ten minutes.
"""

import argparse
import json
import sys
from collections.abc import Iterator

from ff_utils.run.faults import Command, Trial, without_times, workplace

SMOKE = Command("make -j2 VENV=environment reproduce PROFILE=smoke", "data/results/smoke")


def differences(one: object, other: object, place: str) -> Iterator[str]:
    """Places in two records' metrics whose values differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one | other:
            yield from differences(one.get(name), other.get(name), f"{place}.{name}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif repr(one) != repr(other):
        yield f"{place} is {one!r} and {other!r}"


def main(arguments: list[str] | None = None) -> None:
    """Run the smoke profile twice; exits with every metric that differs, times apart."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils repeat", description=main.__doc__)
    parser.parse_args(arguments)
    runs = []
    with workplace("repeat-") as work:
        for number in (1, 2):
            print(f"smoke profile in a fresh copy, {number} of 2", flush=True)
            trial = Trial(work / str(number), work / "checkout")
            if trial.run(SMOKE):
                sys.exit(f"error: `{SMOKE.line}` fails: {trial.said[-1000:]}")
            paths = sorted((trial.folder / SMOKE.result).glob("*.json"))
            records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
            runs.append(
                {name: without_times(record["metrics"]) for name, record in records.items()}
            )
    if found := list(differences(*runs, "smoke")):
        sys.exit("\n".join(f"error: {difference}" for difference in found))
    print(f"the metrics of {len(runs[0])} records are the same in both, bit for bit, times apart")
