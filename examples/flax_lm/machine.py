"""What figures have to be read against, and the one setting that moves them."""

import ctypes
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax


def machine(device_kind: str = "") -> dict[str, Any]:
    """Processor, cores, devices, and how busy the machine was.

    Args:
        device_kind: What to name the device where none is used; else jax's own.
    """
    return {
        "processor": _processor(),
        "cores": _cores(),
        "device_kind": device_kind or jax.devices()[0].device_kind,
        "devices": 0 if device_kind else jax.device_count(),
        "load_average": load_average(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "optax", "flax", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes; above the cores, the machine was shared."""
    return [round(x, 2) for x in os.getloadavg()]


def _cores() -> int:
    """Those that this process may use; not every system can tell."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name; Linux tells it only here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine()).strip()


# What malloc.h calls them, its numbers for them, and what they are set to.
_MALLOPT = {"M_MMAP_MAX": -4, "M_TRIM_THRESHOLD": -1, "M_ARENA_MAX": -8}
KEPT = {"M_MMAP_MAX": 0, "M_TRIM_THRESHOLD": 2**31 - 1, "M_ARENA_MAX": 1}


def keep_freed_memory() -> str:
    """Have glibc keep freed pages; return the setting in words.

    XLA's buffers on the CPU come from malloc, which by default hands large ones back
    to the system at once: a good part of a step goes into mapping them again.
    """
    if jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc":
        return "the system's own setting"
    libc = ctypes.CDLL(None)
    for name, value in KEPT.items():
        libc.mallopt(_MALLOPT[name], value)
    told = ", ".join(f"{name} {value}" for name, value in KEPT.items())
    return f"freed pages are kept ({told})"
