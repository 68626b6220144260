"""`avatar doctor` looks at this machine, and at what a recipe needs of it. Its fast checks run
before every training, and nothing is made before they pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from avatar_rl.cluster.commands import doctor_inputs as inputs
from avatar_rl.cluster.commands import doctor_machine as machine
from avatar_rl.cluster.commands import doctor_network as network
from avatar_rl.cluster.commands import doctor_plan as plan
from avatar_rl.cluster.commands.doctor_redis import redis_findings
from avatar_rl.cluster.commands.findings import Finding
from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.errors import AvatarError, ConfigError, ResourceError
from avatar_rl.common.text import printable

Check = Callable[[], Iterator[Finding]]
#: What a run is told at its start though it can do without.
_TOLD = ("/dev/shm", "GPU")


def examine(recipe: Path | None = None, overrides: Sequence[tuple[str, str]] = ()) -> list[Finding]:
    """All findings, in a fixed order; of a curriculum those of its last stage. A check that breaks
    is itself a finding; nothing is raised and nothing is left behind."""
    config: RunConfig | None = None
    findings: list[Finding] = []
    if recipe is not None:
        try:
            config = _resolved(recipe, overrides)
            findings.append(Finding("recipe", "ok", f"{recipe} is valid"))
        except AvatarError as error:
            findings.append(
                Finding(
                    "recipe",
                    "fail",
                    str(error),
                    "correct the recipe; `avatar train --dry-run` shows it",
                )
            )
    slow: list[Check] = [machine.python, machine.packages, machine.vllm, machine.limits]
    return findings + _found([*slow, machine.decoding, *_fast(config)])


def preflight(configs: Mapping[str, RunConfig]) -> None:
    """The fast checks of a run, or of all stages of one by their names ("" for a run without).

    Raises ConfigError or ResourceError with everything that is wrong, each fault with its remedy.
    """
    told: dict[tuple[str, str], Finding] = {}
    for stage, config in configs.items():
        for item in _found(_fast(config)):
            told.setdefault((item.subject, item.found), item)
            if stage and item.level == "fail" and told[item.subject, item.found] is item:
                name = f"stage {stage}: {item.subject}"
                told[item.subject, item.found] = Finding(name, item.level, item.found, item.remedy)
    for item in told.values():
        if item.level == "warn" and item.subject in _TOLD:
            print(
                printable(f"avatar: {item.subject}: {item.found}; {item.remedy}"), file=sys.stderr
            )
    failed = [item for item in told.values() if item.level == "fail"]
    if not failed:
        return
    lines = [f"{item.subject}: {item.found}; {item.remedy}" for item in failed]
    kind = ConfigError if any("." in item.subject for item in failed) else ResourceError
    raise kind("nothing was started:\n  " + "\n  ".join(lines))


def shortcomings(config: RunConfig) -> list[str]:
    """What the fast checks find missing for a run, each with its remedy."""
    return [
        f"{item.subject}: {item.found}; {item.remedy}"
        for item in _found(_fast(config))
        if item.level == "fail"
    ]


def missing_inputs(config: RunConfig) -> list[str]:
    """What a recipe names and this machine does not have: model, data, secrets. Nothing is opened,
    so that a login node may ask."""
    checks: list[Check] = [lambda: inputs.files(config), lambda: inputs.secrets(config)]
    path = config.model.path
    absent = [] if path == "tiny" or Path(path).is_dir() else [f"model: {path} is not a folder"]
    return [f"{line}; set model.path" for line in absent] + [
        f"{item.subject}: {item.found}; {item.remedy}"
        for item in _found(checks)
        if item.level == "fail"
    ]


def _fast(config: RunConfig | None) -> list[Check]:
    """Milliseconds each, unless a network must be asked."""
    of_recipe: list[Check] = []
    if config is not None:
        known = config
        of_recipe = [
            lambda: inputs.model(known),
            lambda: inputs.learner(known),
            lambda: inputs.cold_start(known),
            lambda: inputs.files(known),
            lambda: inputs.secrets(known),
            lambda: inputs.rewards(known),
            lambda: inputs.folders(known),
        ]
    return [
        *of_recipe,
        lambda: plan.machine(config),
        lambda: plan.cpus(config),
        lambda: plan.gpu(config),
        lambda: plan.memory(config),
        lambda: plan.shm(config),
        lambda: plan.disk(config),
        network.sockets,
        network.home,
        lambda: network.proxies(config),
        lambda: network.ports(config),
        lambda: network.cluster(config),
        lambda: redis_findings(config.buffer if config is not None else None),
    ]


def _found(checks: Sequence[Check]) -> list[Finding]:
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except (OSError, AvatarError, subprocess.SubprocessError, ValueError) as error:
            name = getattr(check, "__name__", "check").strip("_<>").replace("lambda", "check")
            findings.append(
                Finding(name, "fail", f"could not be looked at: {error}", "see the message")
            )
    return findings


def _resolved(recipe: Path, overrides: Sequence[tuple[str, str]]) -> RunConfig:
    from avatar_rl.cluster.curriculum.stages import resolve
    from avatar_rl.cluster.recipe.load import load_recipe, read_recipe

    raw = read_recipe(recipe)
    if "stages" in raw:
        return resolve(raw, overrides, preset_name=None, source=str(recipe)).stages[-1].config
    return load_recipe(recipe, overrides)
