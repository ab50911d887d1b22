"""`python -m ff_utils.memory`: the report of an arm (`--arm`), or of any network (`--network`)."""

import sys


def main() -> None:
    """Report an arm, or any network where `--network` is given."""
    if any(argument.startswith("--network") for argument in sys.argv[1:]):
        from ff_utils.memory.compare import main as report
    else:
        from ff_utils.memory.measure import main as report
    report()


if __name__ == "__main__":
    main()
