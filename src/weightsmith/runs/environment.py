"""The machine and the packages a result was made with; never a host name, a user or a path."""

from __future__ import annotations

import os
import platform
from typing import Any

PACKAGES = ("weightsmith", "numpy", "safetensors", "torch", "transformers")


def environment() -> dict[str, Any]:
    """Facts for the run's record: Python, system, cores, threads, memory, package versions."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions(),
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the installed ones of `packages`, read from their metadata without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra that is not installed had no part in the result
    return found


def cores() -> int:
    """Cores this process may use (its CPU affinity where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
