"""Alias: `python -m ff_utils.sweep ...` is `python -m ff_utils sweep ...`."""

from ff_utils.run.sweep import main

if __name__ == "__main__":
    main()
