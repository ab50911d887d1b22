"""Progress: a bar where someone watches, one plain line an item elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import pandas as pd


def track(items: Sequence, what: str = "epoch", done: int = 0, total: int = 0) -> Iterator:
    """Iterate over `items`, telling how many of `total` are done and how long the rest takes.

    done: items of the same work that were finished before. Under make (FF_PROGRESS=plain) each
    line replaces the last, so that a saved notebook keeps one.
    """
    total = total or len(items)
    plain = os.environ.get("FF_PROGRESS") == "plain"
    if not plain and (_in_notebook() or sys.stderr.isatty()):
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=what, leave=False)
        return
    start = time.perf_counter()
    for number, item in enumerate(items, start=1):
        yield item
        spent = time.perf_counter() - start
        left = spent / number * (total - done - number)
        ending = f"about {left:.0f} s left" if left else f"{spent:.0f} s"
        if _in_notebook():
            from IPython.display import clear_output

            clear_output(wait=True)
        print(f"{what} {done + number} of {total}, {ending}", flush=True)


def take_turns(tasks: dict[str, Callable[[], object]], rounds: int) -> pd.DataFrame:
    """Seconds of every task (columns), all in turn, `rounds` times (rows) after one to warm up.

    A machine's speed drifts: taking turns, every task meets the same drift.
    """
    rows = []
    for _ in track(range(rounds + 1), "round"):
        rows.append({})
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            rows[-1][name] = time.perf_counter() - start
    return pd.DataFrame(rows[1:])


def _in_notebook() -> bool:
    """Whether IPython runs this. Elsewhere it need not even be installed."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
