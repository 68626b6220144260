"""What the page is told, as JSON documents with names; the server and the export give the same.

    runs                        all runs of the folder, each with its curve
    run/RUN                     status, curves, events, recipe, faults
    run/RUN/rollouts            a row per saved completion
    run/RUN/texts               whole completions, for the search
    run/RUN/steps               groups of each saved step, with the rewards of their halves
    run/RUN/group/FILE/NUMBER   one group: prompt, media, completions with their tokens

RUN is the name of a folder below the parent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from avatar_rl.cluster.telemetry.run_files import Sample
from avatar_rl.cluster.view.media import Clip, MediaShelf, clip_of
from avatar_rl.cluster.view.reading import (
    Faults,
    columns,
    config_of,
    events_of,
    headline_of,
    list_statuses,
    metrics_of,
    quarantined,
)
from avatar_rl.cluster.view.rollouts import Rollouts
from avatar_rl.common.errors import DataError
from avatar_rl.common.types import Json, JsonObject

#: Files whose change is a change of the run; samples/ besides.
WATCHED = ("status.json", "metrics.jsonl", "events.jsonl")


class NoSuchResourceError(DataError):
    """A name that leads to nothing: the run is gone, or never was."""


class Resources:
    """The documents of the runs below ``parent``; of ``only`` these, where given. Thread-safe."""

    def __init__(
        self, parent: Path, *, only: Sequence[str] = (), media: Sequence[Path] = ()
    ) -> None:
        self.parent = parent
        self.only = tuple(only)
        self.shelf = MediaShelf(media)
        self._rollouts: dict[str, Rollouts] = {}
        self._curves: dict[str, tuple[object, JsonObject]] = {}
        self._clips: dict[str, dict[str, Clip]] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Json:
        """The document. Raises NoSuchResourceError."""
        parts = name.split("/")
        if parts == ["runs"]:
            return self.runs()
        if len(parts) > 1 and parts[0] == "run":
            run, rest = self.folder(parts[1]), parts[2:]
            if not rest:
                return self.run(run)
            if len(rest) == 1 and rest[0] in ("rollouts", "texts", "steps"):
                return self._of_run(run, rest[0])
            if len(rest) == 3 and rest[0] == "group" and rest[2].isdecimal():
                return self.group(run, rest[1], int(rest[2]))
        raise NoSuchResourceError(f"there is no {name}")

    def stamp(self, name: str) -> Json:
        """Something that changes when the document may have changed."""
        parts = name.split("/")
        if parts == ["runs"]:
            statuses, _ = list_statuses(self.parent)
            return [
                [run, status.lost, *self._stat(self.parent / run)]
                for run, status in statuses
                if self._is_shown(run)
            ]
        if len(parts) < 2:
            return None
        run = self.folder(parts[1])
        return [*self._stat(run), *self.rollouts(run).stamp()]

    def _stat(self, run: Path) -> list[Json]:
        found: list[Json] = []
        for file in WATCHED:
            try:
                stat = (run / file).stat()
                found += [stat.st_mtime_ns, stat.st_size]
            except OSError:
                found.append(None)
        return found

    def _is_shown(self, run: str) -> bool:
        return not self.only or run in self.only

    def names(self) -> list[str]:
        return [run for run, _ in list_statuses(self.parent)[0] if self._is_shown(run)]

    def folder(self, run: str) -> Path:
        """A run's folder by its name. Raises NoSuchResourceError for any that is not one of the
        parent's own."""
        path = self.parent / run
        plain = run not in ("", ".", "..") and Path(run).name == run and "\0" not in run
        if not plain or not self._is_shown(run) or not (path / "status.json").is_file():
            raise NoSuchResourceError(f"there is no run {run!r} below {self.parent}")
        return path

    def rollouts(self, run: Path) -> Rollouts:
        with self._lock:
            return self._rollouts.setdefault(run.name, Rollouts(run))

    # -- the documents -----------------------------------------------------------------------------

    def runs(self) -> JsonObject:
        statuses, damaged = list_statuses(self.parent)
        shown: list[Json] = []
        for run, status in statuses:
            if not self._is_shown(run):
                continue
            entry: JsonObject = status.model_dump(mode="json")
            entry |= {"name": run, "lost": status.lost, "curve": self._headline(run)}
            shown.append(entry)
        return {
            "folder": str(self.parent.resolve()),
            "runs": shown,
            "damaged": list(damaged),
            "now": round(time.time(), 1),
        }

    def _headline(self, run: str) -> JsonObject:
        file = self.parent / run / "metrics.jsonl"
        try:
            stat = file.stat()
        except OSError:
            return {"name": "", "points": []}
        stamp = (stat.st_mtime_ns, stat.st_size)
        known = self._curves.get(run)
        if known is None or known[0] != stamp:
            known = (stamp, headline_of(metrics_of(file.parent, Faults())))
            self._curves[run] = known
        return known[1]

    def run(self, run: Path) -> JsonObject:
        faults = Faults()
        statuses, damaged = list_statuses(run.parent)
        status = next((status for name, status in statuses if name == run.name), None)
        files = self.rollouts(run).files()
        document: JsonObject = {
            "name": run.name,
            "folder": str(run.resolve()),
            "status": None if status is None else status.model_dump(mode="json"),
            "lost": status is not None and status.lost,
            **columns(metrics_of(run, faults)),
            "events": events_of(run, faults),
            "config": config_of(run, faults),
            "saved": {
                "steps": sum(not file.held_out for file in files),
                "rollouts": sum(len(file.rows) for file in files),
            },
            "report": (run / "report.html").is_file(),
        }
        ours = [message for message in damaged if str(run) in message]
        document["faults"] = [
            *ours,
            *faults.said,
            *(fault for file in files for fault in file.faults),
        ]
        return document

    def _of_run(self, run: Path, what: str) -> Json:
        rollouts = self.rollouts(run)
        if what == "texts":
            return list(rollouts.texts())
        if what == "steps":
            return list(rollouts.summaries())
        return rollouts.table(quarantined(run, Faults()))

    def group(self, run: Path, file: str, number: int) -> JsonObject:
        rows = self.rollouts(run).group(file, number)
        if rows is None:
            raise NoSuchResourceError(f"{run.name}: there is no group {number} in samples/{file}")
        aside = quarantined(run, Faults())
        return {
            "file": file,
            "number": number,
            "held_out": file.startswith("eval_"),
            "quarantined": rows[0].get("prompt_id") in aside,
            "rows": [cast(JsonObject, row) for row in rows],
            "media": self._media(run, rows[0]),
            "prompts": [
                # A replay may answer another prompt than its group's: it has media of its own.
                self._media(run, row) if row.get("prompt_id") != rows[0].get("prompt_id") else None
                for row in rows
            ],
        }

    # -- media -------------------------------------------------------------------------------------

    def _media(self, run: Path, row: Sample) -> list[Json]:
        roots, clips = self.roots(run), _clips(row)
        with self._lock:
            self._clips.setdefault(run.name, {}).update({clip.key: clip for clip in clips})
        return [self.shelf.describe(clip, roots) for clip in clips]

    def roots(self, run: Path) -> list[Path]:
        """``data.media.roots`` of the run's recipe, relative ones below its working folder."""
        config = config_of(run, Faults())
        value = config.get("data.media.roots")
        if not isinstance(value, str) or value in ("", "[]", "null"):
            return []
        try:
            return [Path(str(root)) for root in json.loads(value)]
        except ValueError:
            return []

    def clip(self, run: Path, key: str) -> Clip:
        """The clip of that key that one of the run's samples names. Raises NoSuchResourceError."""
        with self._lock:
            known = self._clips.setdefault(run.name, {})
        if key not in known:
            self._look_for_clips(run, known)
        if key not in known:
            raise NoSuchResourceError(f"{run.name}: no sample names such a clip")
        return known[key]

    def _look_for_clips(self, run: Path, known: dict[str, Clip]) -> None:
        for clip in self.all_clips(run):
            known[clip.key] = clip

    def all_clips(self, run: Path, progress: Callable[[], None] = lambda: None) -> list[Clip]:
        """Every clip that the run's samples name, once."""
        found: dict[str, Clip] = {}
        rollouts = self.rollouts(run)
        for file in rollouts.files():
            progress()
            for row in rollouts.samples(file.name):
                found |= {clip.key: clip for clip in _clips(row)}
        return list(found.values())


def _clips(row: Sample) -> list[Clip]:
    media = row.get("media")
    entries = media if isinstance(media, list) else []
    return [clip for entry in entries if (clip := clip_of(entry)) is not None]
