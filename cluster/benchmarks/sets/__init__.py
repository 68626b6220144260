"""The sets by name; one folder each: its reader, its authors' prompt, its metric."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from avatar_rl.cluster.benchmarks.lmms import PREFIX, lmms_set
from avatar_rl.cluster.benchmarks.record import BenchmarkSet
from avatar_rl.common.errors import ConfigError


@cache
def benchmark_sets() -> dict[str, BenchmarkSet]:
    """Every set of this folder, by name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    sets: list[BenchmarkSet] = [module.SET for module in modules]
    return {one.name: one for one in sorted(sets, key=lambda one: one.name)}


def benchmark_set(name: str) -> BenchmarkSet:
    """The set ``name``; "lmms:TASK" is a task of an installed lmms-eval. Raises ConfigError that
    lists what there is."""
    if name.startswith(PREFIX):
        return lmms_set(name)
    known = benchmark_sets()
    if name not in known:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
        remedy = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise ConfigError(f"no benchmark {name!r}: {remedy} {', '.join(known)}")
    return known[name]
