"""What a measurement has to say about the machine it was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """Return the facts without which a time means little.

    Args:
        device: Where the measurement ran.

    Returns:
        Names and versions; plain strings and numbers.
    """
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, unisono and these packages.

    Example:
        >>> sorted(package_versions("torch"))
        ['python', 'torch', 'unisono']
    """
    from unisono import __version__

    found = {name: importlib.metadata.version(name) for name in packages}
    return {"unisono": __version__, "python": platform.python_version(), **found}


def cpu_name() -> str:
    """Return the name of the processor, as well as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not a Linux machine
    return platform.processor() or platform.machine()
