"""The house keeps its shape: imports go down only, modules stay small, the top level is the agreed
one (DESIGN 1)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "common": 0,
    "prompts": 1,
    "buffer_service": 2,
    "actors": 3,
    "learner": 3,
    "rewards": 3,
    "cluster": 4,
}
#: Beside the packages; what starts with a dot and what git ignores does not count.
FOLDERS = {*FLOORS, "avatar_rl", "tests", "recipes", "benchmarks", "docs", "deploy"}
MAX_LINES = 500
MODULES = sorted(file for package in FLOORS for file in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, those inside functions and TYPE_CHECKING blocks
    included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join((*parents, node.module or ""))


def violations(source: str, package: tuple[str, ...]) -> list[str]:
    """Imports of ``source``, a module of ``package``, that go up or sideways."""
    own = package[0]
    found = []
    for line, module in imports(ast.parse(source), package):
        top = module.partition(".")[0]
        if top == "avatar_rl":
            top = module.split(".")[1] if "." in module else top
        if top in ("tests", "benchmarks"):
            found.append(f"line {line}: {own} imports {module}")
        elif top in FLOORS and top != own and FLOORS[top] >= FLOORS[own]:
            found.append(
                f"line {line}: {own} (floor {FLOORS[own]}) imports {module} (floor {FLOORS[top]})"
            )
    return found


def test_imports_go_down() -> None:
    assert len(MODULES) > 50
    found = {
        str(file.relative_to(ROOT)): violations(file.read_text(), file.relative_to(ROOT).parts[:-1])
        for file in MODULES
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        (("prompts",), "from avatar_rl.buffer_service.codec import decode"),
        (("buffer_service",), "import avatar_rl.actors.engine"),
        (("actors",), "def f():\n    from avatar_rl.learner.policy import Policy"),
        (
            ("learner",),
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import "
            "avatar_rl.rewards.suite",
        ),
        (("rewards",), "import os, avatar_rl.cluster.config"),
        (("learner",), "from tests.tiny_models import video"),
    ],
)
def test_the_check_sees_imports_that_go_up_or_sideways(
    package: tuple[str, ...], source: str
) -> None:
    assert len(violations(source, package)) == 1


def test_the_check_lets_imports_down_pass() -> None:
    source = (
        "import torch\nfrom prompts.record import Prompt\nfrom buffer_service import "
        "store\nfrom . import config"
    )
    assert violations(source, ("learner",)) == []
    assert (
        violations(
            "from avatar_rl.learner.rank import LearnerRank\nimport actors.rollout", ("cluster",)
        )
        == []
    )


def test_modules_stay_readable() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_the_top_level_is_the_agreed_one() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: build outputs cannot be told from sources")
    folders = {
        Path(line).parts[0] for line in listed.stdout.splitlines() if len(Path(line).parts) > 1
    }
    assert {name for name in folders if not name.startswith(".")} <= FOLDERS
    assert set(FLOORS) <= folders


LIGHT = (
    "avatar_rl.cluster.training.restarts",
    "avatar_rl.rewards.scorer",
    "avatar_rl.buffer_service.weights.store",
    "avatar_rl.learner.state_replica",
    "avatar_rl.learner.actor",
)


def test_who_computes_nothing_imports_no_torch() -> None:
    """Driver, reward actors, weight board and state keeper: seconds of every start and 150 MiB
    each."""
    code = (
        f"import importlib, sys\nfor name in {LIGHT}: "
        "importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "False"


def test_every_package_has_its_config_section() -> None:
    for package in FLOORS:
        assert (ROOT / package / "config.py").is_file()
