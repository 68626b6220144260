"""The GPUs of this machine, as the driver tells of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """A row of nvidia-smi."""

    name: str
    bytes: int
    driver: int  # major version
    version: str = field(default="", compare=False)  # of the driver, whole


#: Dense bfloat16 operations per second by the name that the driver gives, as NVIDIA publishes
#: them. The first that fits counts, so the longer names come first.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("A40", 150e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
)


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 peak of a GPU; None where it is not known, and on a CPU."""
    return next(
        (
            peak
            for known, peak in PEAK_FLOPS
            if re.search(rf"(?<![A-Za-z0-9]){known}(?![A-Za-z0-9])", name)
        ),
        None,
    )


def local_gpus() -> tuple[list[Gpu], str]:
    """The GPUs that a run on this machine would see, and why there are none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], "no nvidia-smi"
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    answer = subprocess.run([tool, *query], capture_output=True, text=True, timeout=30)
    if answer.returncode != 0:
        return [], f"nvidia-smi: {answer.stdout.strip() or answer.stderr.strip()}"
    found = []
    for line in answer.stdout.splitlines():
        if row := re.fullmatch(r"(.+), (\d+), ((\d+)[.\d]*)", line.strip()):
            found.append(Gpu(row[1], int(row[2]) << 20, int(row[4]), row[3]))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        found = found[: len([word for word in shown.split(",") if word.strip()])]
        return found, "" if found else f"CUDA_VISIBLE_DEVICES is {shown!r}"
    return found, "" if found else "nvidia-smi lists none"
