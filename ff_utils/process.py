"""A process's peak of resident memory, as the operating system has it."""

import resource
import sys
from pathlib import Path

# The C library gives freed blocks back to the system at once, so that a process's peak is what it
# needed and not what its allocator kept. Set in the environment of a fresh process.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_resident_bytes() -> int:
    """The most resident memory that this process has had since `reset_peak`."""
    status = Path("/proc/self/status")  # of this process alone; getrusage's is the parent's too
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(peak.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak() -> bool:
    """Start a new peak of resident memory; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
