"""A Ray node for this machine alone: on loopback, with a token and, where the user has none, a home
folder of its own (docs/security.md)."""

from __future__ import annotations

import importlib
import os
import pwd
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

#: Ray takes 127.0.0.1 for its address where a machine is not meant to be part of a cluster; its
#: servers then listen there only.
_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


def has_home() -> bool:
    """Whether tokens and caches can be written where libraries look for them."""
    try:
        folder = Path.home()
        pwd.getpwuid(os.getuid())
    except (RuntimeError, KeyError):
        return False
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


class PrivateNode:
    """Between ``start`` and ``stop`` this process and its children start Ray privately. Afterwards
    the environment is as before and the token is gone.

    A token, its path or a mode in the environment is the user's choice and stays.
    """

    def __init__(self) -> None:
        self._before: dict[str, str | None] = {}
        self._folder: Path | None = None
        self._was_cluster = True

    def start(self) -> None:
        """Call it before Ray is started."""
        self._folder = Path(tempfile.mkdtemp(prefix="avatar-"))  # 0700
        self._set(_CLUSTER, "0")
        if not any(os.environ.get(name) for name in _TOKENS):
            token = self._folder / "ray-token"
            token.touch(0o600)
            token.write_text(secrets.token_hex(32))
            self._set("RAY_AUTH_TOKEN_PATH", str(token))
            self._set("RAY_AUTH_MODE", "token")
        if not has_home():
            self._set("HOME", str(self._folder))
            self._set("LOGNAME", f"user-{os.getuid()}")
        self._refresh(is_cluster=False)

    def stop(self) -> None:
        """Call it once Ray is down; a second call does nothing."""
        if self._folder is None:
            return
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before.clear()
        self._refresh(is_cluster=self._was_cluster)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _set(self, name: str, value: str) -> None:
        self._before.setdefault(name, os.environ.get(name))
        os.environ[name] = value

    def _refresh(self, *, is_cluster: bool) -> None:
        """Ray reads the environment when it is imported and keeps the token it has read."""
        if "ray" not in sys.modules:
            return
        from ray._private import ray_constants

        native = importlib.import_module("ray._raylet")  # compiled: no names for a type checker
        if not is_cluster:
            self._was_cluster = ray_constants.ENABLE_RAY_CLUSTER
        ray_constants.ENABLE_RAY_CLUSTER = is_cluster
        native.Config.initialize("")
        native.AuthenticationTokenLoader.instance().reset_cache()
