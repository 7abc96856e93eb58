"""What this machine offers: CPU cores and GPUs. Importing this module loads no torch."""

from __future__ import annotations

import os
import subprocess


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """Return the share of the available cores for each process of a launch, at least 1."""
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1
    return max(1, available_cores() // int(processes))


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA may use, by number or by name."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return named_gpus(named)
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def named_gpus(value: str) -> list[str]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names."""
    return [name.strip() for name in value.split(",") if name.strip() not in ("", "-1")]
