"""How much memory a process has taken."""

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_resident_mib() -> float:
    """Highest resident memory of this process so far, in MiB.

    From `VmHWM` on Linux: `ru_maxrss` begins there at what the parent had when it started this process.
    """
    if STATUS.exists():
        return int(STATUS.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
