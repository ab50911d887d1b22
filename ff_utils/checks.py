"""Refusals in one sentence: what was given, what is wanted."""

from collections.abc import Collection
from numbers import Integral, Real


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of: {', '.join(choices)}.")


def number(
    name: str,
    value: object,
    low: float,
    high: float | None = None,
    *,
    whole: bool = False,
    above: bool = False,
) -> None:
    """Raise ValueError unless `value` is a number from `low` (excluded if `above`) to `high`."""
    kind = Integral if whole else Real
    is_number = isinstance(value, kind) and not isinstance(value, bool) and value == value
    if (
        not is_number
        or value < low
        or (above and value == low)
        or (high is not None and value > high)
        or value == float("inf")
    ):
        noun = "a whole number" if whole else "a number"
        lower = f"above {low:g}" if above else f"of at least {low:g}"
        upper = "" if high is None else f" and at most {high:g}"
        raise ValueError(f"{name} is {value!r}; give {noun} {lower}{upper}.")


def whole_numbers(name: str, values: object, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `values` is a non-empty list of whole numbers in the range."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{name} is {values!r}; give a non-empty list of whole numbers.")
    for position, value in enumerate(values):
        number(f"{name}[{position}]", value, low, high, whole=True)
