"""What every other module may need: paths, files, checks, progress, bytes."""

import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # make starts many processes, most of which need neither pandas nor PyTorch
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
RESULTS = DATA / "results"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
BUILD = ROOT / "build"
HOST = "host"  # category of allocations outside the device, never part of a peak
_categories: list[str] = []


def relative(path: Path) -> str:
    """`path` as seen from the repository, so that no message or record names a home folder."""
    return os.path.relpath(path, ROOT)


def user_path(text: str | os.PathLike) -> Path:
    """A path as a person gives it: `~` expanded, relative to the folder they work in.

    A notebook's kernel works in another folder; the person's is then in FF_WORKING_DIR.
    """
    if not str(text):
        raise ValueError("a path is empty: give one.")
    try:
        return Path(os.environ.get("FF_WORKING_DIR", Path.cwd()), Path(text).expanduser())
    except RuntimeError as error:  # `~name` of nobody
        raise ValueError(f"{text} names a home folder that is not known: {error}.") from error


def data_folders(dataset: str) -> list[Path]:
    """Folders that may hold the files of `dataset`, in the order they are searched.

    `FF_DATA_DIR` (the folder itself, or its parent); `data/` of this checkout, where downloads
    go; `shared/data/` beside it, which several checkouts can have in common. ValueError for an
    `FF_DATA_DIR` that is no folder.
    """
    folders = [DATA / dataset, ROOT.parent / "shared" / "data" / dataset]
    if given := os.environ.get("FF_DATA_DIR"):
        folder = user_path(given)
        if not folder.is_dir():
            raise ValueError(f"FF_DATA_DIR is {given!r}, which is no folder: give one that exists.")
        folders = [folder / dataset, folder, *folders]
    return folders


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """What `write` puts into the temporary file it is given becomes `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or none."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of: {', '.join(choices)}.")


def check_number(
    name: str,
    value: object,
    low: float,
    high: float | None = None,
    *,
    whole: bool = False,
    above: bool = False,
) -> None:
    """Raise ValueError unless `value` is a number from `low` (excluded if `above`) to `high`."""
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    limit = float("inf") if high is None else high
    # Not a number (nan) fails every comparison, and infinity is in no range.
    in_range = is_number and (low < value if above else low <= value) and value <= limit
    if not in_range or value == float("inf"):
        noun = "a whole number" if whole else "a number"
        lower = f"above {low:g}" if above else f"of at least {low:g}"
        upper = "" if high is None else f" and at most {high:g}"
        raise ValueError(f"{name} is {value!r}; give {noun} {lower}{upper}.")


def check_ints(name: str, values: object, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `values` is a non-empty list of whole numbers in the range."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{name} is {values!r}; give a non-empty list of whole numbers.")
    for position, value in enumerate(values):
        check_number(f"{name}[{position}]", value, low, high, whole=True)


def check_names(what: str, given: Iterable[object], known: Collection[str]) -> None:
    """Raise ValueError for the first name in `given` that is not in `known`; suggests the nearest.

    what: the sentence's beginning, such as "FILE has the key".
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(sorted(known))}."
            raise ValueError(f"{what} {name!r}, which does not exist: {hint}")


def value_at(found: object, path: str) -> object:
    """What a path into a record's metrics leads to; None where it ends early.

    a.b is an item, a.0 one of a list, a[arm=ff_streamed,depth=47] the first row with these values.
    """
    for step in re.findall(r"\[[^]]+\]|[^.\[]+", path):
        try:
            if step.startswith("["):
                pairs = re.split(r",(?=\w+=)", step[1:-1])  # a value may have commas
                wanted = dict(pair.split("=") for pair in pairs).items()
                found = next(row for row in found if all(str(row[k]) == v for k, v in wanted))
            else:
                found = found[int(step)] if isinstance(found, list) else found[step]
        except (LookupError, TypeError, ValueError, StopIteration):
            return None
    return found


def format_bytes(count: float) -> str:
    """Bytes with three digits, in decimal units: 683_000_000 -> "683 MB"."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    decimals = 0 if unit == "B" else sum(abs(size) < limit for limit in (9.995, 99.95))
    return f"{size:.{decimals}f} {unit}"


@contextmanager
def allocation_category(name: str) -> Iterator[None]:
    """Memory that is allocated in here counts under `name`: "host", "inputs", "gradients"."""
    _categories.append(name)
    try:
        yield
    finally:
        _categories.pop()


def current_category() -> str | None:
    """The innermost `allocation_category`, None outside of all."""
    return _categories[-1] if _categories else None


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def track(items: Sequence, what: str = "epoch", done: int = 0, total: int = 0) -> Iterator:
    """Iterate over `items`, showing how many of `total` are done and the time left.

    A bar where someone watches, else one plain line an item, on standard error but for notebooks.
    done: items of the same work that were finished before. Under make (FF_PROGRESS=plain) each line
    replaces the last, so that a saved notebook keeps one.
    """
    total = total or len(items)
    plain = os.environ.get("FF_PROGRESS") == "plain"
    if not plain and (_in_notebook() or sys.stderr.isatty()):
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=what, leave=False, initial=done, total=total)
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
        stream = sys.stdout if _in_notebook() else sys.stderr
        print(f"{what} {done + number} of {total}, {ending}", file=stream, flush=True)


def time_alternately(
    tasks: dict[str, Callable[[], object]], rounds: int, *, quiet: bool = False
) -> "pd.DataFrame":
    """Seconds of every task (columns), all in turn, `rounds` times (rows) after one to warm up.

    A machine's speed drifts: in turn, every task meets the same drift.
    """
    import pandas as pd

    rows, numbers = [], range(rounds + 1)
    for _ in numbers if quiet else track(numbers, "round"):
        seconds = {}
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name] = time.perf_counter() - start
        rows.append(seconds)
    return pd.DataFrame(rows[1:])


def _in_notebook() -> bool:
    """Whether IPython runs this. Elsewhere it need not even be installed."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
