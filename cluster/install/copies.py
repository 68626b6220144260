"""One copy of the project: what Python and Ray would find as `avatar_rl`, and whether it is one.

Two copies end in errors far from their cause: the driver imports one, a worker process the other.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from avatar_rl.common.errors import ConfigError

NAME = __name__.partition(".")[0]
ROOT = Path(os.path.realpath(str(sys.modules[NAME].__file__))).parent
#: Names the copy that is meant where there are two, e.g. /src/avatar/avatar_rl.
CHOICE = "AVATAR_RL_ROOT"
#: Ray unpacks what `ray job submit --working-dir .` uploads below a folder of this name, and puts
#: it first on the path of the job's driver and of all its workers.
UPLOADS = "working_dir_files"


def check_copies() -> str | None:
    """What to tell the user, if anything. Raises ConfigError naming both where `avatar_rl` is found
    at two real places.

    A checkout that is installed editable and run from its root is one place. Two are accepted in
    two cases, since both were asked for: AVATAR_RL_ROOT names the one in use, or the one in use was
    uploaded with a Ray job and the image holds the same version of it."""
    if choice := os.environ.get(CHOICE):
        if Path(os.path.realpath(choice)) != ROOT:
            raise ConfigError(
                f"{CHOICE} is {choice}, but {NAME} is imported from {ROOT}: start avatar from the "
                f"copy you mean, or unset {CHOICE}"
            )
        return None
    others = [place for place in dict.fromkeys(copies()) if place != ROOT]
    if not others:
        return None
    other = others[0]
    here, there = version_of(ROOT), version_of(other)
    if UPLOADS in ROOT.parts and here == there:
        return f"the job's upload {ROOT} stands in for the installed {other}"
    raise ConfigError(
        f"{NAME} is there twice: {ROOT} ({here}, in use) and {other} ({there}). Some process would "
        f"import the other one. Remove one of them (`pip uninstall avatar-rl`, or leave out "
        f"--working-dir), use the environment of the copy you mean, start from another folder, or "
        f"set {CHOICE}={ROOT}"
    )


def copies() -> Iterator[Path]:
    """Real folders that an import of `avatar_rl` could lead to, here or in a Ray worker: those on
    sys.path, in the current folder (Ray adds it), and of editable installs."""
    for entry in [*sys.path, os.getcwd()]:
        spec = PathFinder.find_spec(NAME, [entry or os.getcwd()])
        if spec is not None and spec.origin is not None:
            yield Path(os.path.realpath(spec.origin)).parent
    for finder in sys.meta_path:
        if getattr(finder, "__name__", "") == "_EditableFinder":  # setuptools' own
            spec = finder.find_spec(NAME, None)
            if spec is not None and spec.origin is not None:
                yield Path(os.path.realpath(spec.origin)).parent


def version_of(root: Path) -> str:
    found = re.search(r'^__version__ = "(.+)"$', (root / "__init__.py").read_text(), re.MULTILINE)
    return found[1] if found else "unknown version"
