"""Where metrics go besides the run folder's JSONL: TensorBoard records and Prometheus gauges."""

from __future__ import annotations

import io
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cluster.metrics import describe


class Sink(Protocol):
    """Anything that wants each step's metrics as well (Prometheus, a user's tracker)."""

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def close(self) -> None: ...


class PrometheusSink:
    """Exports each metric as a Ray gauge ``avatar_<name>``, which Ray's agent serves to Prometheus."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._gauges: dict[str, Any] = {}

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        from ray.util.metrics import Gauge

        for name, value in {"step": float(step), **metrics}.items():
            if value is None:
                continue
            if name not in self._gauges:
                entry = describe(name)
                self._gauges[name] = Gauge(
                    prometheus_name(name), description=entry.meaning if entry else name, tag_keys=("run",)
                )
                self._gauges[name].set_default_tags({"run": self.run_id})
            self._gauges[name].set(value)

    def close(self) -> None:
        self._gauges.clear()


def prometheus_name(name: str) -> str:
    """ "reward/mean" -> "avatar_reward_mean"; other characters that Prometheus forbids become underscores too."""
    return "avatar_" + re.sub(r"[^A-Za-z0-9_]", "_", name)


def event_file(folder: Path) -> Path:
    return folder / f"events.out.tfevents.{time.time_ns() // 1_000_000_000}.{socket.gethostname()}.{os.getpid()}"


def scalar_event(step: int, metrics: Mapping[str, float | None], start: bool = False) -> bytes:
    """One TensorBoard record (no torch, no TensorFlow). ``start`` opens a file and purges re-run steps."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if value is not None]
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    if start:
        writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        log_start = SessionLog(status=SessionLog.START)
        writer.write(Event(wall_time=time.time(), step=step + 1, session_log=log_start).SerializeToString())
    else:
        writer.write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)).SerializeToString())
    return buffer.getvalue()
