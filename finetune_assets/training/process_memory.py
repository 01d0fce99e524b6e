"""Peak memory of the current process."""

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_resident_mib() -> float:
    """Return the peak RSS of this process, in MiB.

    Uses `VmHWM` on Linux, where `ru_maxrss` starts at the RSS of the parent process at the time of the fork.
    """
    if STATUS.exists():
        return int(STATUS.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
