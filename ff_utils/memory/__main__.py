"""`python -m ff_utils.memory --arm ff_streamed --depth 47 --json`: one arm's report."""

from ff_utils.memory.measure import main

if __name__ == "__main__":
    main()
