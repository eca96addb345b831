"""How many CPU cores there are for this process: workers and ranks are no more than these."""

import os


def count_cores() -> int:
    """CPU cores that this process may use, at least 1; all of the machine's where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
