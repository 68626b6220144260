"""Experiment trackers beside the run folder: Weights & Biases, trackio, MLflow, SwanLab.

Each is an optional package (`pip install avatar-rl[wandb]` ...), spoken to by a thread of its own:
a tracker without network, key or package costs one warning, and the run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import netrc
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.telemetry.metric_names import aliases
from avatar_rl.cluster.telemetry.run_files import commit, mask_secrets
from avatar_rl.common.types import JsonObject

log = logging.getLogger(__name__)

#: Seconds that a tracker may take to begin, and to send what is left at the end.
BEGIN_S, CLOSE_S = 60.0, 30.0
#: Seconds that one which has not begun by the end of the run still gets.
LATE_S = 5.0
#: Messages kept for a tracker that is slower than the run; the oldest go first.
MOST = 10_000
#: Columns of a table of samples.
SAMPLE_COLUMNS = (
    "prompt_id",
    "question",
    "answer",
    "text",
    "reward",
    "accuracy",
    "version",
    "media",
)
#: What MLflow knows a run by that is resumed.
RUN_TAG = "avatar_rl.run"
#: A clip that is larger is named and not sent.
MOST_CLIP_BYTES = 4 << 20


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of the run."""

    run_id: str
    project: str
    folder: Path  # the run's
    config: JsonObject  # resolved, secrets masked
    commit: str | None
    media: bool = False  # whether clips may be sent

    @classmethod
    def of(cls, config: RunConfig, folder: Path) -> Tracked:
        """Of a recipe, and of the checkout that runs it."""
        settings = mask_secrets(config.model_dump(mode="json"))
        assert isinstance(settings, dict)
        head = commit()["commit"]
        return cls(
            folder.name,
            config.output.project,
            folder,
            settings,
            str(head) if head else None,
            config.output.tracker_media,
        )


@dataclass(frozen=True)
class Clip:
    """A file for a tracker that shows clips: ``clip`` of a row of samples, or None."""

    kind: str  # video, audio or image
    path: Path


class Backend(Protocol):
    """One tracker's own calls, all made from one thread."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def finish(self) -> None: ...


Begin = Callable[[Tracked], tuple[Backend, str]]  # also says where the run is to be seen


class Tracker:
    """A sink that hands everything to a backend in a thread.

    Args:
        name: Of the tracker, for messages.
        begin: Makes the backend; may take its time, and may raise anything.
        run: What the backend is told.
        names: Whose metric names are sent beside ours: trl, verl or none.
        tell: Hears one sentence when it begins, and one when it gives up.
    """

    def __init__(
        self, name: str, begin: Begin, run: Tracked, *, names: str, tell: Callable[[str], None]
    ) -> None:
        self.name, self.names = name, names
        self._begin, self._run, self._tell = begin, run, tell
        self._jobs: queue.Queue[Callable[[Backend], None] | None] = queue.Queue(MOST)
        self._given_up, self._begun = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        values = {name: value for name, value in metrics.items() if value is not None}
        values |= aliases({**values, "step": float(step)}, self.names)
        self._put(lambda backend: backend.log(step, values))

    def samples(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        kept = [{column: row.get(column) for column in SAMPLE_COLUMNS} for row in rows]
        for row, shown in zip(rows, kept, strict=True):
            media = row.get("media") or ()
            shown["media"] = ", ".join(Path(str(entry.get("uri"))).name for entry in media)
            shown["clip"] = self._clip(media)
        self._put(lambda backend: backend.table(step, name, kept))

    def _clip(self, media: Sequence[Mapping[str, Any]]) -> Clip | None:
        """The first medium that is there and not too large, where clips may be sent."""
        for entry in media if self._run.media else ():
            path = Path(str(entry.get("uri")).removeprefix("file://"))
            with contextlib.suppress(OSError):
                if 0 < path.stat().st_size <= MOST_CLIP_BYTES:
                    return Clip(str(entry.get("kind")), path)
        return None

    def close(self) -> None:
        """Send what is left, within ``CLOSE_S``."""
        self._put(None)
        self._thread.join(CLOSE_S if self._begun.is_set() else LATE_S)
        if self._thread.is_alive():
            has = "sent everything" if self._begun.is_set() else "answered at all"
            self._give_up(f"it has not {has} by the end of the run")

    def _put(self, job: Callable[[Backend], None] | None) -> None:
        while not self._given_up.is_set():
            try:
                self._jobs.put_nowait(job)
                return
            except queue.Full:
                with_room = self._jobs.get_nowait()
                log.debug("tracker %s is slow: %s left out", self.name, with_room)

    def _work(self) -> None:
        try:
            backend, where = self._begin(self._run)
            self._begun.set()
            self._tell(f"tracker {self.name}: {where}")
            while (job := self._jobs.get()) is not None:
                job(backend)
            backend.finish()
        except Exception as error:  # each of them raises kinds of its own
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            self._give_up(first[:300])
        except SystemExit as error:  # a library that thinks it is a command
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        if not self._given_up.is_set():
            self._given_up.set()
            self._tell(f"tracker {self.name} is left out: {why}; the run goes on")


def open_trackers(
    names: Sequence[str], run: Tracked, *, metric_names: str, tell: Callable[[str], None]
) -> list[Tracker]:
    """The trackers of a recipe. TensorBoard's files are in the run folder whether it is named or
    not. One that is not installed is told of, with the command that installs it."""
    found = []
    for name in names:
        if name == "tensorboard":
            continue
        if importlib.util.find_spec(PACKAGES[name]) is None:
            tell(
                f"tracker {name} is left out: its package is not installed "
                f"(pip install 'avatar-rl[{name}]'); the run goes on"
            )
            continue
        found.append(Tracker(name, BEGIN[name], run, names=metric_names, tell=tell))
    return found


def _shown(tracker: Any, clip: Clip | None, videos: Sequence[str]) -> object:
    """A clip as W&B's or trackio's own object, which have one interface; None where it does not
    take the format. ``videos``: those it does."""
    if clip is None:
        return None
    suffix = clip.path.suffix.lstrip(".").lower()
    if clip.kind == "video" and suffix in videos:
        return tracker.Video(str(clip.path), format=suffix)
    if clip.kind == "audio" and suffix == "wav":
        return tracker.Audio(str(clip.path))
    return tracker.Image(str(clip.path)) if clip.kind == "image" else None


class _Wandb:
    VIDEOS = ("mp4", "webm", "ogg", "gif")

    def __init__(self, run: Any, wandb: Any) -> None:
        self.run, self.wandb = run, wandb

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(SAMPLE_COLUMNS)
        clips = [_shown(self.wandb, row["clip"], self.VIDEOS) for row in rows]
        data = [[row[column] for column in columns] for row in rows]
        # A column of W&B's has one type: that of the first clip.
        first = next((clip for clip in clips if clip is not None), None)
        if first is not None:
            columns.append("clip")
            for row, clip in zip(data, clips, strict=True):
                row.append(clip if type(clip) is type(first) else None)
        table = self.wandb.Table(columns=columns, data=data)
        self.run.log({f"samples/{name}": table}, step=step)

    def finish(self) -> None:
        self.run.finish()


def _begin_wandb(run: Tracked) -> tuple[Backend, str]:
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if os.environ.get("WANDB_API_KEY") or _has_netrc() else "offline"

    def begin(how: str) -> Any:
        return wandb.init(
            project=run.project,
            name=run.run_id,
            id=run.run_id,
            resume="allow",
            dir=str(run.folder),
            config={**run.config, "commit": run.commit},
            mode=how,
            settings=wandb.Settings(silent=True, init_timeout=BEGIN_S),
        )

    try:
        begun = begin(mode)
    except wandb.errors.CommError:
        begun, mode = begin("offline"), "offline"
    if mode == "offline":
        return _Wandb(begun, wandb), f"kept in {run.folder / 'wandb'}; `wandb sync` sends it"
    return _Wandb(begun, wandb), str(begun.url or mode)


def _has_netrc() -> bool:
    """Whether `wandb login` has left a key."""
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


class _Trackio:
    VIDEOS = ("mp4", "webm", "gif")

    def __init__(self, trackio: Any) -> None:
        self.trackio = trackio

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import pandas

        named = [{column: row[column] for column in SAMPLE_COLUMNS} for row in rows]
        for row, shown in zip(rows, named, strict=True):
            shown["clip"] = _shown(self.trackio, row["clip"], self.VIDEOS)
        table = self.trackio.Table(dataframe=pandas.DataFrame(named))
        self.trackio.log({f"samples/{name}": table}, step=step)

    def finish(self) -> None:
        self.trackio.finish()


def _begin_trackio(run: Tracked) -> tuple[Backend, str]:
    import trackio

    trackio.init(
        project=run.project,
        name=run.run_id,
        config={**run.config, "commit": run.commit},
        resume="allow",
        embed=False,
    )
    return _Trackio(trackio), f"`trackio show --project {run.project}` shows it"


class _Mlflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # a dot for every slash: in MLflow's files entropy could not lie beside entropy/fresh
        rows = [Metric(name.replace("/", "."), value, now, step) for name, value in values.items()]
        for first in range(0, len(rows), 1000):  # the most of one call
            self.client.log_batch(self.run_id, metrics=rows[first : first + 1000])

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        content = {column: [row[column] for row in rows] for column in SAMPLE_COLUMNS}
        self.client.log_dict(self.run_id, content, f"samples/{name}_{step:06d}.json")
        for clip in {row["clip"] for row in rows if row["clip"] is not None}:
            self.client.log_artifact(self.run_id, str(clip.path), f"samples/{name}_{step:06d}")

    def finish(self) -> None:
        self.client.set_terminated(self.run_id)


def _begin_mlflow(run: Tracked) -> tuple[Backend, str]:
    from mlflow import MlflowClient

    place = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlruns").absolute().as_uri()
    if place.startswith("file:"):  # MLflow warns of its own files since it prefers a database
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=place)
    known = client.get_experiment_by_name(run.project)
    experiment = known.experiment_id if known else client.create_experiment(run.project)
    tags = {RUN_TAG: run.run_id}
    if run.commit:
        tags["mlflow.source.git.commit"] = run.commit
    wanted = f"tags.`{RUN_TAG}` = '{run.run_id}'"
    if earlier := client.search_runs([experiment], wanted, max_results=1):  # a run that is resumed
        name = earlier[0].info.run_id
        client.update_run(name, status="RUNNING")
    else:
        name = client.create_run(experiment, run_name=run.run_id, tags=tags).info.run_id
        for key, value in flat(run.config).items():
            client.log_param(name, key, str(value)[:500])
    return _Mlflow(client, name), place


class _Swanlab:
    def __init__(self, swanlab: Any) -> None:
        self.swanlab = swanlab

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.swanlab.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        texts = [self.swanlab.Text(str(row.get("text")), caption=_caption(row)) for row in rows]
        self.swanlab.log({f"samples/{name}": texts}, step=step)
        for kind, make in (("image", self.swanlab.Image), ("audio", self.swanlab.Audio)):
            of_kind = [row for row in rows if row["clip"] is not None and row["clip"].kind == kind]
            if of_kind:
                shown = [make(str(row["clip"].path), caption=_caption(row)) for row in of_kind]
                self.swanlab.log({f"samples/{name}/{kind}": shown}, step=step)

    def finish(self) -> None:
        self.swanlab.finish()


def _begin_swanlab(run: Tracked) -> tuple[Backend, str]:
    import swanlab

    mode = os.environ.get("SWANLAB_MODE")
    if mode is None:
        mode = "cloud" if os.environ.get("SWANLAB_API_KEY") else "offline"
    place = run.folder / "swanlog"
    # Its own ids are of so many such characters; only its server knows a run again.
    known = hashlib.sha256(run.run_id.encode()).hexdigest()[:21]
    again = {"id": known, "resume": "allow"} if mode in ("cloud", "online") else {}
    swanlab.init(
        project=run.project,
        experiment_name=run.run_id,
        config={**run.config, "commit": run.commit},
        logdir=str(place),
        mode=mode,
        **again,
    )
    return _Swanlab(swanlab), f"{mode}, in {place}"


def _caption(row: Mapping[str, Any]) -> str:
    return f"{row.get('prompt_id')}: {row.get('question')} ({row.get('answer')}), {row['reward']}"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their plain values."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


#: Name in a recipe -> what is imported.
PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow", "swanlab": "swanlab"}
BEGIN: dict[str, Begin] = {
    "wandb": _begin_wandb,
    "trackio": _begin_trackio,
    "mlflow": _begin_mlflow,
    "swanlab": _begin_swanlab,
}
