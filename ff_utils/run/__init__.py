"""Running: notebooks, sweeps of them, and full-length trainings."""
