"""Alias: `python -m ff_utils.pipeline run ...` is `python -m ff_utils run ...`."""

from ff_utils.run.notebooks import main

if __name__ == "__main__":
    main()
