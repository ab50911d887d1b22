"""Test errors of the full-length trainings: every reading, intervals, two networks compared."""

import json

import pandas as pd
from scipy import stats

from ff_utils import utils

FOLDER = "full_length"  # of the records, below data/results/
CONFIDENCE = 0.95
COLUMNS = ["form", "seed", "epochs", "dataset", "error", "by", "low", "high", "images", "wrong"]
COLUMNS += ["finished", "earlier"]


def readings() -> pd.DataFrame:
    """Every reading of a test set by a full-length training, in order of time.

    A run whose settings were later changed, and whose place another run took, is in the folder
    `earlier`. Columns: form, seed, epochs (passes, as in the record's name), dataset, error, by
    (the way to predict that validation images chose), low and high (of its interval), images,
    wrong (numbers of the images, where the record has them), finished (when), earlier.
    """
    rows = []
    for path in sorted((utils.RESULTS / FOLDER).glob("**/*-*-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        metrics, (form, seed, epochs) = record["metrics"], path.stem.rsplit("-", 2)
        if "test_error" not in metrics:  # a candidate, which has a validation error only
            continue
        error, images = metrics["test_error"], record["data"]["test"]
        low, high = wilson(error, images)
        row = {"form": form, "seed": int(seed), "epochs": int(epochs)}
        row |= {"dataset": record["data"]["name"], "error": error, "by": metrics["chosen"]}
        row |= {"low": low, "high": high, "images": images, "wrong": metrics.get("wrong")}
        row |= {
            "finished": record["provenance"].get("finished", ""),
            "earlier": path.parent.name != FOLDER,
        }
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values("finished", kind="stable", ignore_index=True)


def latest() -> pd.DataFrame:
    """Of `readings`, the longest run of every form and seed with today's settings."""
    rows = readings()
    rows = rows[~rows.earlier.astype(bool)].sort_values("epochs", kind="stable")
    return rows.drop_duplicates(["form", "seed"], keep="last").sort_values(["form", "seed"])


def over_seeds() -> dict[str, dict]:
    """Each form's test error over seeds: mean, standard_error, low, high and seeds.

    low, high: the 95 % t interval of the mean. It holds the variation between seeds, on this one
    test set. One seed has none: standard_error, low and high are None.
    """
    found = {}
    for form, runs in latest().groupby("form"):
        mean, seeds = float(runs.error.mean()), len(runs)
        summary = {"mean": mean, "standard_error": None, "low": None, "high": None, "seeds": seeds}
        if seeds > 1:
            error = float(runs.error.std()) / seeds**0.5
            reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * error
            summary |= {"standard_error": error, "low": mean - reach, "high": mean + reach}
        found[form] = summary
    return found


def wilson(error: float, images: int) -> tuple[float, float]:
    """The 95 % Wilson interval of an error that was measured on so many images."""
    wrong = round(error * images)
    interval = stats.binomtest(wrong, images).proportion_ci(CONFIDENCE, method="wilson")
    return interval.low, interval.high


def mcnemar(wrong: list[int], others: list[int]) -> dict[str, float]:
    """McNemar's exact test of two networks on the same test images.

    wrong, others: numbers of the images that each gets wrong. Returns only_first and only_second
    (images that only one of them gets wrong) and p, the probability of so uneven a split if both
    had the same error.
    """
    first, second = set(wrong), set(others)
    only_first, only_second = len(first - second), len(second - first)
    count = only_first + only_second
    p = stats.binomtest(only_first, count).pvalue if count else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def paired(first: str, second: str) -> pd.DataFrame:
    """McNemar's test of two forms for every seed whose records say which images are wrong.

    Columns: seed, both errors (named after the forms), only_first, only_second, p.
    """
    known = latest().dropna(subset="wrong")
    runs = [known[known.form == form].set_index("seed") for form in (first, second)]
    rows = []
    for seed in runs[0].index.intersection(runs[1].index):
        one, other = (table.loc[seed] for table in runs)
        errors = {first: one.error, second: other.error}
        rows.append({"seed": seed, **errors, **mcnemar(one.wrong, other.wrong)})
    columns = ["seed", first, second, "only_first", "only_second", "p"]
    return pd.DataFrame(rows, columns=columns)
