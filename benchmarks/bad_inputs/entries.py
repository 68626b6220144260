"""One bad input: how it is tried, and what must be said of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.recipe.load import load_recipe, parse_overrides
from avatar_rl.common.errors import AvatarError
from avatar_rl.common.types import JsonObject
from avatar_rl.prompts.config import DataConfig, MediaConfig
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import MediaItem
from avatar_rl.prompts.validate import validate

#: Raises the AvatarError that is expected, or returns what was said ("" when nothing was).
Try = Callable[[Path], str]
Outcome = Literal["named", "unnamed", "traceback", "silent"]
DATA = "data: {synthetic: {n_train: 8}}\n"
COMMAND_TIMEOUT_S = 120


@dataclass(frozen=True)
class BadInput:
    """``words``: what names the input, and what names the remedy, in any case of letters."""

    group: Literal["A", "B", "C", "D", "E", "F"]
    name: str
    act: Try
    words: tuple[str, ...]
    timed: bool = False  # an error of a recipe or a row: its time to the message counts


@dataclass(frozen=True)
class Found:
    """What became of one bad input."""

    outcome: Outcome
    said: str
    seconds: float


class UnexpectedTraceback(Exception):
    """A command ended in a traceback, or with another exit code than 1 or 2."""


def tried(entry: BadInput, folder: Path) -> Found:
    """Try ``entry`` in its own empty ``folder``."""
    folder.mkdir(parents=True)
    began = time.perf_counter()
    try:
        said = entry.act(folder)
    except AvatarError as error:
        said = str(error)
    except Exception:  # what the benchmark looks for: an error that nobody has named
        return Found("traceback", traceback.format_exc(), time.perf_counter() - began)
    seconds = time.perf_counter() - began
    if not said:
        return Found("silent", "", seconds)
    lower = said.lower()
    named = all(word.lower() in lower for word in entry.words)
    return Found("named" if named else "unnamed", said, seconds)


# -- ways to try ---------------------------------------------------------------------------------


def recipe(text: str, *overrides: str) -> Try:
    """Load a recipe of this text, the synthetic world where it names no data."""

    def act(folder: Path) -> str:
        file = folder / "recipe.yaml"
        file.write_text(text if "data:" in text else DATA + text, encoding="utf-8")
        load_recipe(file, parse_overrides(overrides))
        return ""

    return act


def row(fields: JsonObject | str | bytes, **config: object) -> Try:
    """Check a dataset of one row (or of this text) as `avatar data validate` does."""
    raw = fields if isinstance(fields, str | bytes) else json.dumps(fields)
    return dataset("d.jsonl", raw.encode() if isinstance(raw, str) else raw, **config)


def dataset(name: str, content: bytes | None, **config: object) -> Try:
    """Check a dataset file of this content; None writes none."""

    def act(folder: Path) -> str:
        path = folder / name
        if content is not None:
            path.write_bytes(content)
        report = validate(path, DataConfig.model_validate(config), decode=False)
        return "\n".join(f"{p.where}: {p.what}; {p.remedy}" for p in report.problems)

    return act


def medium(kind: str, write: Callable[[Path], str], **item: object) -> Try:
    """Decode what ``write`` leaves in a folder; it returns the name in the row."""

    def act(folder: Path) -> str:
        config = MediaConfig(roots=(folder / "allowed",)) if item.get("roots") else MediaConfig()
        named = {"kind": kind, "uri": write(folder)} | {
            k: v for k, v in item.items() if k != "roots"
        }
        MediaLoader(config, folder).load(MediaItem.model_validate(named))
        return ""

    return act


def command(*words: str) -> Try:
    """Type a command in this process, in the entry's folder; {} in a word is that folder."""

    def act(folder: Path) -> str:
        out, err = io.StringIO(), io.StringIO()
        typed = [word.replace("{}", str(folder)) for word in words]
        code: int | str | None
        with contextlib.chdir(folder), redirected(out, err):
            try:
                code = main(typed)
            except SystemExit as ended:
                code = ended.code
        return said_by(code, err.getvalue() + out.getvalue())

    return act


def process(*words: str, **environment: str) -> Try:
    """Type a command in a process of its own."""

    def act(folder: Path) -> str:
        typed = [word.replace("{}", str(folder)) for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "avatar_rl.cluster.cli", *typed],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())} | environment,
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        return said_by(done.returncode, (done.stderr + done.stdout).decode())

    return act


def said_by(code: int | str | None, text: str) -> str:
    """What a command said. Raises UnexpectedTraceback for one that did not end as it should."""
    if "Traceback" in text or code not in (0, 1, 2):
        raise UnexpectedTraceback(f"exit code {code}: {text[-2000:]}")
    return text if code else ""


def after(prepare: Callable[[Path], object], act: Try) -> Try:
    """``act`` in a folder that ``prepare`` filled."""

    def both(folder: Path) -> str:
        prepare(folder)
        return act(folder)

    return both


def with_environment(act: Try, **values: str) -> Try:
    """``act`` with these environment variables; {} is the entry's folder."""

    def inside(folder: Path) -> str:
        given = {name: value.replace("{}", str(folder)) for name, value in values.items()}
        with environment(given):
            return act(folder)

    return inside


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def redirected(out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
