"""How much memory a training step needs: arms, the tracker, four instruments, formulas."""

from ff_utils.memory.arms import ARMS, LEANEST, Arm, Sizes
from ff_utils.memory.gpu import about, compared, gpu_grid, gpu_metrics
from ff_utils.memory.measure import (
    DoesNotFitError,
    Report,
    beside_simulated,
    extended,
    measure,
    measure_grid,
    memory_metrics,
    saving_map,
    time_steps,
    timeline,
)
from ff_utils.memory.profile import profile
from ff_utils.memory.steps import build
from ff_utils.memory.tracker import CATEGORIES, MemoryTracker, track_step

__all__ = [
    "ARMS",
    "CATEGORIES",
    "LEANEST",
    "Arm",
    "DoesNotFitError",
    "MemoryTracker",
    "Report",
    "Sizes",
    "about",
    "beside_simulated",
    "build",
    "compared",
    "extended",
    "gpu_grid",
    "gpu_metrics",
    "measure",
    "measure_grid",
    "memory_metrics",
    "profile",
    "saving_map",
    "time_steps",
    "timeline",
    "track_step",
]
