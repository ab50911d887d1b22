"""Alias: `python -m ff_utils.pipelined ...` is `python -m ff_utils distributed ...`."""

from ff_utils.distributed import main

if __name__ == "__main__":
    main()
